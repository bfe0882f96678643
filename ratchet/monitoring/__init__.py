"""The request log, drift, novelty, topics, verdicts, the retraining budget."""
