"""Rows that a teacher model writes."""
