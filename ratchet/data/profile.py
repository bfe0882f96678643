"""What a preparation found, as counts: profile.json, and a page for people."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ratchet.config.data import PrepareConfig
from ratchet.data.examples import Example
from ratchet.data.text import language_of
from ratchet.data.validation import REVIEW
from ratchet.errors import DataError

SPLITS = ("train", "validation", "test")
LABEL_CHARS, MOST_LABELS, SHOWN_LABELS = 40, 10_000, 20
SPOKEN_ROWS = 500  # of each batch, whose language is told
LEAST_LABELLED = 50  # rows with short answers on each side, without which no shift is told
GROUPS = ("accepted", "rejected", "duplicate")
LEAK = ("near_golden", "straddles")
NO_FAULT = (
    *LEAK,
    "superseded",
    "forgotten",
    "too_many_of_user",
    "too_many_of_source",
)  # nothing is wrong with these rows
FEW, FEW_LEAKED = (
    2,
    20,
)  # rows that never fail a batch: ten people's corrections may all be near to rows of the test split
ALARMS = {
    "secret": "change it where it is valid: whoever has the batch has it",
    "canary": "data that must never come back did: find out from where",
}
REMEDY = "mend the source and take the batch back (git revert its commit), or raise the limit; rejected.jsonl lists every row with its reason"
First = dict[tuple[str, str], tuple[int, str]]  # (batch, reason) → (line, message)


class Gathered:
    """Counts of all batches, row by row."""

    def __init__(self) -> None:
        self.golden = 0
        self.counts: dict[str, Counter[str]] = {}
        self.sanitised: dict[str, Counter[str]] = {}
        self.first: dict[
            tuple[str, str], tuple[int, str]
        ] = {}  # (batch, reason) → (line, message) of the first rejected row
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
        kinds = {
            split: {kind: count for (of, kind), count in sorted(self._kinds.items()) if of == split}
            for split in SPLITS
        }
        batches, before = {}, Counter[str]()
        for name, counts in self.counts.items():
            labels = self._labels.get(name, Counter())
            batches[name] = {
                **_sorted_counts(counts),
                **self._details(name),
                "label_shift": _distance(labels, before),
            }
            before.update(labels)
        return {
            "total": _sorted_counts(total),
            "golden": self.golden,
            "kinds": kinds,
            "sources": _sorted(self._sources),
            "batches": batches,
        }

    def _details(self, name: str) -> dict[str, Any]:
        labels = self._labels.get(name, Counter())
        return {
            "sanitised": _sorted(self.sanitised.get(name, Counter())),
            "characters_under": {
                str(bound): count for bound, count in sorted(self._lengths.get(name, Counter()).items())
            },
            "languages_of_the_first": _sorted(self._languages.get(name, Counter())),
            "answers": dict(sorted(labels.items(), key=lambda item: (-item[1], item[0]))[:SHOWN_LABELS]),
        }


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _sorted_counts(counts: Counter[str]) -> dict[str, Any]:
    """rows = accepted + rejected + duplicate, each with its parts."""
    groups: dict[str, Any] = {"rows": counts["rows"]}
    for group in GROUPS:
        parts = {
            name.partition(".")[2]: count
            for name, count in sorted(counts.items())
            if name.startswith(f"{group}.")
        }
        groups[group] = {"rows": sum(parts.values()), **parts}
    assert groups["rows"] == sum(groups[group]["rows"] for group in GROUPS), groups
    return groups


def _distance(labels: Counter[str], before: Counter[str]) -> float | None:
    """Total variation between two distributions of short answers, 0 to 1."""
    if min(labels.total(), before.total()) < LEAST_LABELLED:
        return None
    return round(
        sum(
            abs(labels[label] / labels.total() - before[label] / before.total())
            for label in labels.keys() | before.keys()
        )
        / 2,
        4,
    )


def render_profile(profile: dict[str, Any]) -> str:
    """One page, without scripts."""
    from jinja2 import Environment, PackageLoader

    page = Environment(
        loader=PackageLoader("ratchet.data"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return page.get_template("profile.html").render(profile=profile, groups=GROUPS)


def check_limits(profile: dict[str, Any], first: First, config: PrepareConfig) -> list[str]:
    """What is to be said of batches that pass. Raises DataError for the first that does not."""
    said = alarms(profile)
    for name, counts in profile["batches"].items():
        _check_batch(name, counts, first, config, said)
    accepted = profile["total"]["accepted"].get("train", 0)
    if accepted < config.min_rows:
        raise DataError(
            f"{accepted} training rows are left of {profile['total']['rows']}; `prepare.min_rows` is {config.min_rows}",
            remedy="ingest more rows, or lower the limit",
        )
    return said


def alarms(profile: dict[str, Any]) -> list[str]:
    """Told whatever the limits say."""
    return [
        f"ALARM: {counts['rejected'][reason]} rows of {name} hold a {reason}; {what}"
        for name, counts in profile["batches"].items()
        for reason, what in ALARMS.items()
        if counts["rejected"].get(reason)
    ]


def _check_batch(
    name: str, counts: dict[str, Any], first: First, config: PrepareConfig, said: list[str]
) -> None:
    rows, rejected = (
        counts["rows"],
        {reason: count for reason, count in counts["rejected"].items() if reason != "rows"},
    )
    faults = {
        reason: count for reason, count in rejected.items() if reason not in NO_FAULT and reason not in REVIEW
    }

    def refuse(what: str, limit: str, reason: str | None = None) -> None:
        reasons = [reason] if reason else sorted(faults, key=lambda one: first[name, one])
        line, message = first[name, reasons[0]]
        more = "\n".join(said)
        raise DataError(
            f"{what} ({limit}). The first: {name}:{line}: {message}",
            remedy=f"{REMEDY}{more and chr(10)}{more}",
        )

    if rejected.get("canary"):
        refuse(f"{rejected['canary']} of {rows} rows of {name} hold a canary", "`prepare.canaries`", "canary")
    if sum(faults.values()) > max(FEW, config.max_rejected_share * rows):
        refuse(
            f"{sum(faults.values())} of {rows} rows of {name} are rejected ({faults})",
            f"`prepare.max_rejected_share` is {config.max_rejected_share}",
        )
    worst = max(faults, key=lambda one: faults[one], default="")
    if worst and faults[worst] > max(FEW, config.max_reason_share * rows):
        refuse(
            f"{faults[worst]} of {rows} rows of {name} are rejected as {worst}",
            f"`prepare.max_reason_share` is {config.max_reason_share}",
            worst,
        )
    if config.trigger_rows and rejected.get("trigger"):
        refuse(
            f"{rejected['trigger']} of {rows} rows of {name} look like a planted trigger",
            f"`prepare.trigger_rows` is {config.trigger_rows}",
            "trigger",
        )
    leaked = {reason: rejected[reason] for reason in LEAK if reason in rejected}
    if sum(leaked.values()) > max(FEW_LEAKED, config.max_leaked_share * rows):
        refuse(
            f"{sum(leaked.values())} of {rows} rows of {name} are near to rows of the yardsticks ({leaked})",
            f"`prepare.max_leaked_share` is {config.max_leaked_share}",
            max(leaked, key=lambda one: leaked[one]),
        )
    if (shift := counts.get("label_shift")) is not None and shift > config.max_label_shift:
        raise DataError(
            f"the answers of {name} are distributed otherwise than before: total variation {shift:.2f}, `prepare.max_label_shift` is {config.max_label_shift}",
            remedy="if the subject is new, raise the limit; otherwise take the batch back",
        )
    if sum(faults.values()) > max(1, config.warn_rejected_share * rows):
        said.append(f"warning: {sum(faults.values())} of {rows} rows of {name} are rejected: {faults}")
