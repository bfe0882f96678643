"""The sections of params.yaml, by what they are about; `ratchet.config` puts them together."""
