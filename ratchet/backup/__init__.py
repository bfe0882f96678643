"""Back up a whole project into one file, and restore it at any path."""
