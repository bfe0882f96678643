"""params.yaml as types, one module a section; `params` puts them together."""
