"""The base, adapters, the chat template, generation, merging and GGUF."""
