"""MLflow and its registry."""
