"""Every rule that can stop a candidate: statistics over tables, no model, no HTTP."""
