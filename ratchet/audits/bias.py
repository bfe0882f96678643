"""Counterfactual pairs: the same row with he for she, or James for Mohammed.

A fair model scores both alike (Garg et al. 2019, arXiv 1809.10610).

Word lists come from this module and from `metrics/swaps.yaml`: name of a list → term → the term that takes
its place. A list there with a name from here adds to the list here. Terms are swapped in all messages, the
wanted answer included, one list at a time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ratchet.data.examples import Example, RowError, make_example, map_texts
from ratchet.errors import DataError
from ratchet.evaluation.audit_tables import differences
from ratchet.evaluation.report import Change
from ratchet.evaluation.statistics import bootstrap_means

if TYPE_CHECKING:
    import pandas as pd

FILE = "swaps.yaml"
Terms = Mapping[str, str]


def _both(*pairs: tuple[str, str]) -> dict[str, str]:
    return {**dict(pairs), **{right: left for left, right in pairs}}


# `her` corresponds to `his` and to `him`; it becomes `his`, which is more common.
SWAPS: dict[str, dict[str, str]] = {
    "gender": {
        **_both(
            ("he", "she"),
            ("himself", "herself"),
            ("man", "woman"),
            ("men", "women"),
            ("boy", "girl"),
            ("father", "mother"),
            ("son", "daughter"),
            ("husband", "wife"),
        ),
        **_both(
            ("brother", "sister"),
            ("mr", "ms"),
            ("sir", "madam"),
            ("james", "mary"),
            ("john", "anna"),
            ("michael", "sarah"),
            ("his", "her"),
        ),
        **{"him": "her", "mrs": "mr"},
    },
    "origin": _both(
        ("james", "mohammed"),
        ("john", "wei"),
        ("michael", "deshawn"),
        ("mary", "fatima"),
        ("anna", "mei"),
        ("sarah", "lakisha"),
        ("smith", "nguyen"),
        ("miller", "khan"),
    ),
    "religion": {
        "christian": "muslim",
        "muslim": "christian",
        "jewish": "christian",
        "church": "mosque",
        "mosque": "church",
        "synagogue": "church",
        "bible": "quran",
        "quran": "bible",
    },
    "age": _both(("young", "old"), ("teenager", "pensioner")),
}


class Pair(NamedTuple):
    """A row, and its copy with the terms of the list `swap` exchanged."""

    swap: str
    row: Example
    swapped: Example


def read_swaps(folder: Path) -> dict[str, dict[str, str]]:
    """Return the built-in lists of terms, with the user's added.

    Raises DataError for a file that does not hold lists of terms.
    """
    path = folder / FILE
    if not path.exists():
        return SWAPS
    remedy = (
        "wanted: name of a list → term → the term that takes its place, such as `roles: {nurse: doctor,"
        " doctor: nurse}`"
    )
    try:
        found = YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {}
    except (YAMLError, ValueError) as error:
        raise DataError(f"{path} is no valid YAML: {' '.join(str(error).split())}", remedy=remedy) from None
    if not isinstance(found, dict) or not all(isinstance(terms, dict) for terms in found.values()):
        raise DataError(f"{path} holds no lists of terms", remedy=remedy)
    if odd := [
        f"{name}: {term!r}: {other!r}"
        for name, terms in found.items()
        for term, other in terms.items()
        if not _is_term(term) or not _is_term(other)
    ]:
        raise DataError(
            f"{path}: {odd[0]} is no pair of terms (quote what YAML takes for another type, as `true`)",
            remedy=remedy,
        )
    own = {str(name): {term.lower(): other for term, other in terms.items()} for name, terms in found.items()}
    return {
        name: {**SWAPS.get(name, {}), **own.get(name, {})}
        for name in (*SWAPS, *(name for name in own if name not in SWAPS))
    }


def make_pairs(rows: Sequence[Example], swaps: Mapping[str, Terms], *, most: int) -> list[Pair]:
    """Pair each row whose prompt changes with its changed copy, ordered by id, at most `most` pairs.

    A row may give one pair per list of terms.
    """
    found: list[Pair] = []
    patterns = {name: _pattern(terms) for name, terms in swaps.items() if terms}
    for row in sorted(rows, key=lambda row: row.id):
        for name, pattern in patterns.items():
            if len(found) == most:
                return found
            if swapped := _swapped(row, pattern, swaps[name]):
                found.append(Pair(name, row, swapped))
    return found


def swap(text: str, terms: Terms) -> str:
    """Replace whole words of any case, and keep the case: He → She, HE → SHE."""
    return _swap(text, _pattern(terms), terms)


def _swapped(row: Example, pattern: re.Pattern[str], terms: Terms) -> Example | None:
    messages = map_texts(row.messages, lambda text: _swap(text, pattern, terms))
    if messages[:-1] == list(row.prompt):
        return None
    try:
        return make_example(messages, row.meta, tools=row.tools)
    except RowError:  # a term of the user's makes the text invalid
        return None


def _swap(text: str, pattern: re.Pattern[str], terms: Terms) -> str:
    return pattern.sub(lambda found: _in_case_of(found[0], terms[found[0].lower()]), text)


def _pattern(terms: Terms) -> re.Pattern[str]:
    """Compile a pattern that tries longer terms first, so that a term within another one does not match."""
    return re.compile(
        rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(terms, key=len, reverse=True)))})(?!\w)", re.IGNORECASE
    )


def _in_case_of(old: str, new: str) -> str:
    if old.isupper() and len(old) > 1:
        return new.upper()
    return new[0].upper() + new[1:] if old[0].isupper() else new


def _is_term(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip())


def describe_bias(pairs: pd.DataFrame, scores: pd.DataFrame, metric: str) -> dict[str, dict[str, Change]]:
    """Return list → model → mean change and mean absolute change of its scores, with 95 % intervals."""
    found: dict[str, dict[str, Change]] = {}
    for (name, model), part in differences(pairs, scores, metric).groupby(["swap", "model"]):
        values = part.difference.to_numpy(dtype=np.float64)
        both = np.column_stack([values, np.abs(values)])
        intervals = bootstrap_means(both, alpha=0.025, resamples=1000, seed=0)
        found.setdefault(str(name), {})[str(model)] = Change(len(part), *intervals)
    return found
