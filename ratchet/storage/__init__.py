"""Keep the project's small state where every process sees it: in files, or in a shared PostgreSQL."""
