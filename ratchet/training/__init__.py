"""The trainer, losses, checkpoints, packing, distribution, sweeps and estimates."""
