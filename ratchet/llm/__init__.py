"""Requests to a language model over HTTP, for teachers and judges alike."""
