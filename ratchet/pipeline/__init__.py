"""git, DVC, workspaces and stages."""
