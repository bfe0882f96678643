"""What a loop of continuous retraining is worth, and what each of its parts is worth: docs/loopbench.md."""
