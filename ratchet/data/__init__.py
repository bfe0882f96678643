"""Rows: examples, validation, personal data, duplicates, poisoning, batches, erasure, mixture."""
