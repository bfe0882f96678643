"""The story of `make demo`: its clients, its teacher, what it prints."""
