"""The command `ratchet`, one module a group of commands; the only place that starts flows."""
