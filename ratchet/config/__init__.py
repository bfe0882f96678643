"""The settings in params.yaml as typed models, one module per group of sections; `params` combines them."""
