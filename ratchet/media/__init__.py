"""Pictures and recordings of rows: check and normalise them, keep them by name."""
