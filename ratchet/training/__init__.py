"""The trainer, checkpoints, packing, distribution, sweeps, estimates."""
