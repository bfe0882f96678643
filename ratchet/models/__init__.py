"""The base, adapters, the chat template, generation, merging, GGUF."""
