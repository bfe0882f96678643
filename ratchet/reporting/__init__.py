"""Show results to people: pages, charts, cards, Markdown."""
