"""Bring a base here from where it is, and prove it before anything is spent on it."""
