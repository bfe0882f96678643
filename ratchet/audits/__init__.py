"""Probes of a model: attacks, bias, fairness, memorisation, public suites, judges."""
