"""Rows that a teacher writes."""
