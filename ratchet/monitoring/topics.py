"""Find the topics of a window that grew: find words that came into use, and cluster the rows with them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ratchet.config.monitoring import MonitorConfig, TopicSource
from ratchet.data.words import is_pair, terms_of
from ratchet.errors import DataError
from ratchet.files import write_json
from ratchet.monitoring.verdicts import Topic

LEAST_ROWS, GROWTH, EVIDENCE = (
    3,
    3.0,
    6.0,
)  # least rows of the window; least growth of the share, as a factor; least evidence of growth, in nats
TERMS, EXAMPLES, ROWS_A_TOPIC = 12, 3, 12
EXAMPLE_LENGTH = 300  # characters: topics are sent in an event, whose size Prefect limits
LEAST_SHARE = 0.01  # least growth, as a share of the window: smaller topics are noise for the reader
FILE = Path("data/region.json")
FEEDBACK = TopicSource(match="", source="feedback")


def find_topics(
    window: Sequence[str], reference: Sequence[str], training: Sequence[str], *, most: int, seed: int
) -> list[Topic]:
    """Find at most `most` topics of the window; the one that grew most comes first.

    The list is empty when no word came into use; then the drift is of another kind than new subjects.
    """
    terms = grown_terms(window, [*reference, *training])
    rows = [text for text in window if terms.keys() & set(terms_of(text))]
    if not rows:
        return []
    groups = _cluster(rows, sorted(terms), most, seed)
    found = [_topic(group, rows, terms, window, reference) for group in groups]
    # Rows that share all their words may be in several groups; then no word is typical of one group.
    if common := [
        row for group, topic in zip(groups, found, strict=True) if not topic.terms for row in group
    ]:
        found.append(_topic(common, common, terms, window, reference))
    kept = [topic for topic in found if topic.terms and topic.share - topic.reference_share >= LEAST_SHARE]
    return sorted(kept, key=lambda topic: (topic.reference_share - topic.share, topic.name))[:most]


def grown_terms(window: Sequence[str], known: Sequence[str]) -> dict[str, float]:
    """Map each word that grew beyond chance to the log-likelihood ratio of its growth.

    The ratio is in nats, for a Poisson count (Dunning 1993).
    """
    inside = Counter(word for text in window for word in set(terms_of(text)))
    before = Counter(word for text in known for word in set(terms_of(text)))
    found = {}
    for word, count in inside.items():
        expected = len(window) * (before[word] + 0.5) / (len(known) + 1)
        evidence = count * math.log(count / expected) - (count - expected)
        if (
            count >= LEAST_ROWS
            and count >= GROWTH * expected
            and evidence >= EVIDENCE
            and (len(word) > 2 or is_pair(word))
            and not word.isdigit()
        ):
            found[word] = evidence
    return found


def _cluster(rows: list[str], terms: list[str], most: int, seed: int) -> list[list[str]]:
    """Group the rows by the grown words that they share (TF-IDF, k-means)."""
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors: Any = TfidfVectorizer(analyzer=terms_of, vocabulary=terms).fit_transform(rows)
    distinct = len({tuple(row.indices) for row in vectors})
    count = max(1, min(most, len(rows) // ROWS_A_TOPIC, distinct))
    labels = KMeans(count, n_init=4, random_state=seed).fit_predict(vectors)
    return [
        [row for row, label in zip(rows, labels, strict=True) if label == number] for number in range(count)
    ]


def _topic(
    group: list[str],
    rows: list[str],
    terms: dict[str, float],
    window: Sequence[str],
    reference: Sequence[str],
) -> Topic:
    """Make a topic, named by the words that are typical of this group: most rows with such a word belong to
    the group.

    Its examples are the rows with the strongest of these words.
    """
    inside = Counter(word for text in group for word in set(terms_of(text)) if word in terms)
    whole = Counter(word for text in rows for word in set(terms_of(text)) if word in terms)
    own = [word for word, count in inside.items() if count >= 2 and 2 * count > whole[word]]
    chosen = sorted(own, key=lambda word: (-terms[word], word))[:TERMS]
    topic = Topic(", ".join(chosen[:3]), chosen)
    share, before = (
        sum(belongs(topic, text) for text in texts) / max(1, len(texts)) for texts in (window, reference)
    )
    telling = {
        text: sum(terms[word] for word in set(terms_of(text)) if word in chosen)
        for text in dict.fromkeys(group)
    }
    examples = sorted(telling, key=lambda text: (-telling[text], text))[:EXAMPLES]
    return Topic(
        topic.name,
        chosen,
        share,
        before,
        [text if len(text) <= EXAMPLE_LENGTH else text[:EXAMPLE_LENGTH] + " …" for text in examples],
    )


def belongs(topic: Topic, text: str) -> bool:
    """Tell whether the text contains a term of the topic as a word."""
    return not set(topic.terms).isdisjoint(terms_of(text))


class Region(msgspec.Struct, frozen=True):
    topics: list[Topic] = []


def read_region(path: Path) -> Region:
    """Read the drifted topics; without a file there are none.

    Raises DataError for a malformed file.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Region)
    except FileNotFoundError:
        return Region()
    except msgspec.DecodeError as error:
        raise DataError(
            f"{path} is no list of drifted topics: {error}",
            remedy=f"git checkout HEAD -- {FILE}; retrainings write it",
        ) from None


def write_region(path: Path, region: Region) -> None:
    """Write the names and terms of the topics, and nothing else.

    Prompts of users must not get into git, and shares that change every hour would make the evaluation stale.
    """
    topics = [{"name": topic.name, "terms": topic.terms} for topic in region.topics]
    write_json(path, {"topics": topics})


def sources_for(topics: list[Topic], config: MonitorConfig) -> list[TopicSource]:
    """List the sources from which rows of these topics come; people's feedback is always among them.

    For each topic this is the first of `monitor.sources` that matches its name, terms or examples, if any
    does.
    """
    found: list[TopicSource] = []
    for topic in topics:
        said = "\n".join([topic.name, *topic.terms, *topic.examples])
        match = next(
            (source for source in config.sources if re.search(source.match, said, re.IGNORECASE)), FEEDBACK
        )
        found += [match] if match not in found else []
    return found if FEEDBACK in found else [*found, FEEDBACK]


def mark(questions: list[str], topics: list[Topic]) -> list[str]:
    """Return for each question the names of its topics, separated by `|`."""
    return ["|".join(topic.name for topic in topics if belongs(topic, question)) for question in questions]


def parts(scores: Any) -> dict[str, Any]:
    """Map each topic to its rows of a table of scores, as `mark` assigned them.

    The map is empty for the table of an older evaluation, which has no topics.
    """
    if "region" not in scores:
        return {}
    named = scores.region.str.split("|")
    names = sorted({name for row in named for name in row if name})
    return {name: scores[[name in row for row in named]] for name in names}
