"""Engines and what they load; no HTTP server."""
