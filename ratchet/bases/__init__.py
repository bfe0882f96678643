"""Fetch a base model, and check it before any expensive work."""
