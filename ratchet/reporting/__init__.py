"""What people see: pages, charts, cards, Markdown."""
