"""The demo of `make demo`: its steps, its clients and its base models."""
