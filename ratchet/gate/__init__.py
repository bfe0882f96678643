"""Apply every rule that can stop a candidate: statistics over tables, without a model or HTTP."""
