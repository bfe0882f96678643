"""The HTTP gateway: routing, completions, authentication, limits, the pages' routes."""
