"""Invariants of a living project: each is a function that looks and changes nothing."""
