"""Log requests and find drift, novelty and topics; keep verdicts and the retraining budget."""
