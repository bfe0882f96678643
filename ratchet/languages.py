"""The language of a text, by py3langid (a classifier on n-grams of bytes; offline)."""

from __future__ import annotations

LEAST = 20  # characters; on less the classifier guesses


def language_of(text: str) -> str | None:
    """ISO 639-1; None for a text that is too short to tell."""
    import py3langid

    return str(py3langid.classify(text)[0]) if len(text) >= LEAST else None
