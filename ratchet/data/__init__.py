"""Rows: examples, forms, validation, personal data, duplicates, poisoning, batches, erasure, mixture."""
