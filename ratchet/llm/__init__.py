"""Asking a language model over HTTP: teachers and judges alike."""
