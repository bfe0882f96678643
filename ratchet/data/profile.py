"""What a preparation found, as counts: profile.json, and a page for people."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ratchet.data.examples import Example
from ratchet.languages import language_of

SPLITS = ("train", "validation", "test")
LABEL_CHARS, MOST_LABELS, SHOWN_LABELS = 40, 10_000, 20
SPOKEN_ROWS = 500  # of each batch, whose language is told
LEAST_LABELLED = 50  # rows with short answers on each side, without which no shift is told
GROUPS = ("accepted", "rejected", "duplicate")


class Gathered:
    """Counts of all batches, row by row."""

    def __init__(self) -> None:
        self.golden = 0
        self.counts: dict[str, Counter[str]] = {}
        self.sanitised: dict[str, Counter[str]] = {}
        self.first: dict[tuple[str, str], tuple[int, str]] = {}  # (batch, reason) → (line, message) of the first rejected row
        self._kinds: Counter[tuple[str, str]] = Counter()
        self._lengths: dict[str, Counter[int]] = {}
        self._labels: dict[str, Counter[str]] = {}
        self._languages: dict[str, Counter[str]] = {}
        self._sources: Counter[str] = Counter()
        self._accepted: Counter[str] = Counter()

    def add(self, example: Example, batch: str, side: str) -> None:
        """An accepted row."""
        self._kinds[side, str(example.meta.get("kind", ""))] += 1
        self._sources[str(example.meta["source"])] += 1
        length = sum(len(message.content) for message in example.messages)
        self._lengths.setdefault(batch, Counter())[1 << length.bit_length()] += 1
        labels = self._labels.setdefault(batch, Counter())
        if len(example.answer) <= LABEL_CHARS and (len(labels) < MOST_LABELS or example.answer in labels):
            labels[example.answer] += 1
        self._accepted[batch] += 1
        if self._accepted[batch] <= SPOKEN_ROWS:
            languages = self._languages.setdefault(batch, Counter())
            languages[language_of(example.question) or "?"] += 1

    def profile(self) -> dict[str, Any]:
        total: Counter[str] = Counter()
        for counts in self.counts.values():
            total.update(counts)
        kinds = {split: {kind: count for (of, kind), count in sorted(self._kinds.items()) if of == split} for split in SPLITS}
        batches, before = {}, Counter[str]()
        for name, counts in self.counts.items():
            labels = self._labels.get(name, Counter())
            batches[name] = {**_sorted_counts(counts), **self._details(name), "label_shift": _distance(labels, before)}
            before.update(labels)
        return {"total": _sorted_counts(total), "golden": self.golden, "kinds": kinds, "sources": _sorted(self._sources), "batches": batches}

    def _details(self, name: str) -> dict[str, Any]:
        labels = self._labels.get(name, Counter())
        return {
            "sanitised": _sorted(self.sanitised.get(name, Counter())),
            "characters_under": {str(bound): count for bound, count in sorted(self._lengths.get(name, Counter()).items())},
            "languages_of_the_first": _sorted(self._languages.get(name, Counter())),
            "answers": dict(sorted(labels.items(), key=lambda item: (-item[1], item[0]))[:SHOWN_LABELS]),
        }


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _sorted_counts(counts: Counter[str]) -> dict[str, Any]:
    """rows = accepted + rejected + duplicate, each with its parts."""
    groups: dict[str, Any] = {"rows": counts["rows"]}
    for group in GROUPS:
        parts = {name.partition(".")[2]: count for name, count in sorted(counts.items()) if name.startswith(f"{group}.")}
        groups[group] = {"rows": sum(parts.values()), **parts}
    assert groups["rows"] == sum(groups[group]["rows"] for group in GROUPS), groups
    return groups


def _distance(labels: Counter[str], before: Counter[str]) -> float | None:
    """Total variation between two distributions of short answers, 0 to 1."""
    if min(labels.total(), before.total()) < LEAST_LABELLED:
        return None
    return round(sum(abs(labels[label] / labels.total() - before[label] / before.total()) for label in labels.keys() | before.keys()) / 2, 4)


def render_profile(profile: dict[str, Any]) -> str:
    """One page, without scripts."""
    from jinja2 import Environment, PackageLoader

    page = Environment(loader=PackageLoader("ratchet.data"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return page.get_template("profile.html").render(profile=profile, groups=GROUPS)
