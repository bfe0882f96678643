"""Metrics, scoring, slices, paired statistics and the answer cache."""
