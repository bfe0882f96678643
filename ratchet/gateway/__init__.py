"""The HTTP gateway: routing, completions, authentication, limits, and the routes of the pages."""
