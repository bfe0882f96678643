"""Train with differential privacy: noise, gradients of single rows, accounting, the ledger, the audit."""
