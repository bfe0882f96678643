"""What an engine is, what it loads, and how requests are read; no HTTP server."""
