"""Shared nouns of the pipeline: config, examples, models, tracking, registry, workspaces, and the command
line.
"""

__version__ = "0.1.0"
