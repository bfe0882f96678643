"""The champion, rollouts, lineage and the sequential test."""
