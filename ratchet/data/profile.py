"""Count what a preparation found (`profile.json`), render it as a page, and check it against the limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec

from ratchet.config.data import FEW, PrepareConfig
from ratchet.data.examples import Example
from ratchet.data.mixture import undesirable
from ratchet.data.text import language_of
from ratchet.data.validation import REVIEW
from ratchet.errors import DataError

SPLITS = ("train", "validation", "test")
GROUPS = ("accepted", "rejected", "duplicate")
# Characters of an answer that counts as short; different short answers counted a batch, and shown.
LABEL_CHARS, MOST_LABELS, SHOWN_LABELS = 40, 10_000, 20
SPOKEN_ROWS = 500  # first rows of each batch whose language is guessed
LEAST_LABELLED = 50  # rows with short answers that a shift needs, in the batch and before it
LEAK = ("near_golden", "straddles")
# Reasons that do not count as faults of a batch, since the rows themselves are sound.
NO_FAULT = (*LEAK, "superseded", "forgotten", "too_many_of_user", "too_many_of_source")
# This many leaked rows never fail a batch: ten people's corrections may all be near to test rows.
FEW_LEAKED = 20
ALARMS = {
    "secret": "change it where it is valid: whoever has the batch has it",
    "canary": "data that must never come back did: find out from where",
}
REMEDY = (
    "mend the source and take the batch back (ratchet data revert), or raise the limit; "
    "rejected.jsonl lists every row with its reason"
)
First = dict[tuple[str, str], tuple[int, str]]  # (batch, reason) → (line, message) of the first rejected row


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of rows = accepted + rejected + duplicate; each group holds its sum as `rows`, and its parts."""

    rows: int
    accepted: dict[str, int]
    rejected: dict[str, int]
    duplicate: dict[str, int]


class BatchProfile(Counts, frozen=True, kw_only=True):
    sanitised: dict[str, int]
    characters_under: dict[str, int]  # power of two → rows with fewer characters
    languages_of_the_first: dict[str, int]
    answers: dict[str, int]  # the most frequent short ones → rows
    label_shift: float | None  # total variation against earlier batches, 0 to 1


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    total: Counts
    golden: int
    kinds: dict[str, dict[str, int]]  # split → kind → rows
    sources: dict[str, int]
    batches: dict[str, BatchProfile]


class Gathered:
    """Running counts of all batches, to which `add` adds one row."""

    def __init__(self) -> None:
        self.golden = 0
        self.counts: dict[str, Counter[str]] = {}
        self.sanitised: dict[str, Counter[str]] = {}
        self.first: First = {}
        self._kinds: Counter[tuple[str, str]] = Counter()
        self._lengths: dict[str, Counter[int]] = {}
        self._labels: dict[str, Counter[str]] = {}
        self._languages: dict[str, Counter[str]] = {}
        self._sources: Counter[str] = Counter()
        self._accepted: Counter[str] = Counter()

    def add(self, example: Example, batch: str, side: str) -> None:
        """Count an accepted row."""
        self._kinds[side, str(example.meta.get("kind", ""))] += 1
        self._sources[str(example.meta["source"])] += 1
        length = sum(len(message.text) for message in example.messages)
        self._lengths.setdefault(batch, Counter())[1 << length.bit_length()] += 1
        labels = self._labels.setdefault(batch, Counter())
        if len(example.answer) <= LABEL_CHARS and (len(labels) < MOST_LABELS or example.answer in labels):
            labels[example.answer] += 1
        self._accepted[batch] += 1
        if self._accepted[batch] <= SPOKEN_ROWS:
            languages = self._languages.setdefault(batch, Counter())
            languages[language_of(example.question) or "?"] += 1

    def profile(self) -> Profile:
        total: Counter[str] = Counter()
        for counts in self.counts.values():
            total.update(counts)
        kinds = {
            split: {kind: count for (of, kind), count in sorted(self._kinds.items()) if of == split}
            for split in SPLITS
        }
        batches, before = {}, Counter[str]()
        for name in self.counts:
            batches[name] = self._profile_batch(name, before)
            before.update(self._labels.get(name, {}))
        return Profile(
            total=_count(total),
            golden=self.golden,
            kinds=kinds,
            sources=_sorted(self._sources),
            batches=batches,
        )

    def _profile_batch(self, name: str, before: Counter[str]) -> BatchProfile:
        """Profile one batch; `before` holds the short answers of earlier batches."""
        labels, lengths = self._labels.get(name, Counter[str]()), self._lengths.get(name, Counter[int]())
        return BatchProfile(
            **msgspec.structs.asdict(_count(self.counts[name])),
            sanitised=_sorted(self.sanitised.get(name, Counter())),
            characters_under={str(bound): count for bound, count in sorted(lengths.items())},
            languages_of_the_first=_sorted(self._languages.get(name, Counter())),
            answers=dict(sorted(labels.items(), key=lambda item: (-item[1], item[0]))[:SHOWN_LABELS]),
            label_shift=_distance(labels, before),
        )


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _count(counts: Counter[str]) -> Counts:
    """Put counters such as `rejected.loop` into their groups."""
    groups: dict[str, dict[str, int]] = {}
    for group in GROUPS:
        parts = {
            name.partition(".")[2]: count
            for name, count in sorted(counts.items())
            if name.startswith(f"{group}.")
        }
        groups[group] = {"rows": sum(parts.values()), **parts}
    assert counts["rows"] == sum(parts["rows"] for parts in groups.values()), groups
    return Counts(rows=counts["rows"], **groups)


def _distance(labels: Counter[str], before: Counter[str]) -> float | None:
    """Return the total variation between two distributions of short answers, 0 to 1.

    None when either has too few answers.
    """
    here, there = labels.total(), before.total()
    if min(here, there) < LEAST_LABELLED:
        return None
    apart = (abs(labels[label] / here - before[label] / there) for label in labels.keys() | before.keys())
    return round(sum(apart) / 2, 4)


def render_profile(profile: Profile) -> str:
    """Render the profile as one page of HTML, without scripts."""
    from jinja2 import Environment, PackageLoader

    page = Environment(
        loader=PackageLoader("ratchet.data"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return page.get_template("profile.html").render(profile=profile, groups=GROUPS)


# --- limits -------------------------------------------------------------------------------------------------


def place_in_batch(name: str, line: int) -> str:
    return f"{name}:{line}"


def check_limits(
    profile: Profile,
    first: First,
    config: PrepareConfig,
    place: Callable[[str, int], str] = place_in_batch,
) -> list[str]:
    """Return alarms and warnings. Raises DataError for the first limit that a batch or the whole breaks.

    `place` names a row by its batch and line.
    """
    said = [
        f"ALARM: {batch.rejected[reason]} rows of {name} hold a {reason}; {what}"
        for name, batch in profile.batches.items()
        for reason, what in ALARMS.items()
        if batch.rejected.get(reason)
    ]
    for name, batch in profile.batches.items():
        _check_batch(name, batch, first, config, said, place)
    accepted = sum(profile.total.accepted.get(side, 0) for side in ("train", undesirable("train")))
    if accepted < config.min_rows:
        raise DataError(
            f"{accepted} training rows are left of {profile.total.rows}; "
            f"`prepare.min_rows` is {config.min_rows}",
            remedy="ingest more rows, or lower the limit",
        )
    return said


def _check_batch(
    name: str,
    batch: BatchProfile,
    first: First,
    config: PrepareConfig,
    said: list[str],
    place: Callable[[str, int], str],
) -> None:
    """Add warnings to `said`. Raises DataError for the first limit that the batch breaks."""
    rows, rejected = batch.rows, {key: count for key, count in batch.rejected.items() if key != "rows"}
    faults = {
        reason: count for reason, count in rejected.items() if reason not in NO_FAULT and reason not in REVIEW
    }

    def refuse(what: str, limit: str, reason: str) -> None:
        line, message = first[name, reason]
        raise DataError(
            f"{what} ({limit}). The first: {place(name, line)}: {message}",
            remedy="\n".join([REMEDY, *said]),
        )

    if rejected.get("canary"):
        refuse(f"{rejected['canary']} of {rows} rows of {name} hold a canary", "`prepare.canaries`", "canary")
    if sum(faults.values()) > config.may_drop(rows):
        refuse(
            f"{sum(faults.values())} of {rows} rows of {name} are rejected ({faults})",
            f"`prepare.max_rejected_share` is {config.max_rejected_share}",
            min(faults, key=lambda reason: first[name, reason]),
        )
    worst = max(faults, key=lambda reason: faults[reason], default="")
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
            max(leaked, key=lambda reason: leaked[reason]),
        )
    if batch.label_shift is not None and batch.label_shift > config.max_label_shift:
        raise DataError(
            f"the answers of {name} are distributed otherwise than before: "
            f"total variation {batch.label_shift:.2f}, `prepare.max_label_shift` is {config.max_label_shift}",
            remedy="if the subject is new, raise the limit; otherwise take the batch back",
        )
    if sum(faults.values()) > max(1, config.warn_rejected_share * rows):
        said.append(f"warning: {sum(faults.values())} of {rows} rows of {name} are rejected: {faults}")
