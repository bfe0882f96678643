"""The drifted topics of `data/region.json` and the test rows that belong to them: what a retraining for drift has to cure.

The file is in git and an input of `evaluate`; a retraining that drift started writes it, and later ones go on reporting it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from ratchet.config.serving import MonitorConfig, TopicSource
from ratchet.errors import DataError
from ratchet.monitoring.novelty import WORD
from ratchet.files import write_json

FILE = Path("data/region.json")
FEEDBACK = TopicSource(match="", source="feedback")


class Topic(msgspec.Struct, frozen=True):
    """A topic of the traffic, told by its words: its share of the window and of the reference, and prompts that belong to it."""

    name: str
    terms: list[str]
    share: float = 0.0
    reference_share: float = 0.0
    examples: list[str] = []


def belongs(topic: Topic, text: str) -> bool:
    """Whether the text holds a term of the topic as a word."""
    return not set(topic.terms).isdisjoint(WORD.findall(text.lower()))


class Region(msgspec.Struct, frozen=True):
    topics: list[Topic] = []


def read_region(path: Path) -> Region:
    """Empty where there is no file. Raises DataError for one that is no region."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Region)
    except FileNotFoundError:
        return Region()
    except msgspec.DecodeError as error:
        raise DataError(f"{path} is no list of drifted topics: {error}", remedy=f"git checkout HEAD -- {FILE}; retrainings write it") from None


def write_region(path: Path, region: Region) -> None:
    """Names and terms alone: prompts of users do not belong into git, and shares that change by the hour would make an evaluation stale."""
    topics = [{"name": topic.name, "terms": topic.terms} for topic in region.topics]
    write_json(path, {"topics": topics})


def sources_for(topics: list[Topic], config: MonitorConfig) -> list[TopicSource]:
    """Where rows of these topics come from: for each the first of `monitor.sources` that matches its terms or examples; and people's feedback."""
    found: list[TopicSource] = []
    for topic in topics:
        said = "\n".join([topic.name, *topic.terms, *topic.examples])
        match = next((source for source in config.sources if re.search(source.match, said, re.IGNORECASE)), FEEDBACK)
        found += [match] if match not in found else []
    return found if FEEDBACK in found else [*found, FEEDBACK]


def mark(questions: list[str], topics: list[Topic]) -> list[str]:
    """For each question the names of its topics, with `|` between them."""
    return ["|".join(topic.name for topic in topics if belongs(topic, question)) for question in questions]


def parts(scores: Any) -> dict[str, Any]:
    """Topic → the rows of a table of scores that `mark` gave it. Empty for a table of an older evaluation."""
    if "region" not in scores:
        return {}
    named = scores.region.str.split("|")
    names = sorted({name for row in named for name in row if name})
    return {name: scores[[name in row for row in named]] for name in names}
