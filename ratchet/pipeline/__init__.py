"""Git, DVC, workspaces and stages."""
