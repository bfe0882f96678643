"""Say in fifteen lines who answers, what is wrong and what waits for a person: `ratchet status`.

What matters first stands first, and what has no room is left to `ratchet status --all`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from ratchet.config.params import Config
from ratchet.errors import RatchetError
from ratchet.monitoring.retrain_budget import is_under_way
from ratchet.monitoring.verdicts import Recorded
from ratchet.pipeline.workspace import running
from ratchet.promotion.champion import alias_is_pending, read_champion, was_promoted
from ratchet.promotion.gate_tags import is_gate_of
from ratchet.promotion.plain_words import tell_verdict
from ratchet.promotion.verdict import Verdict, read_verdict
from ratchet.review.store import FILE as REVIEW
from ratchet.services.status import Status, describe, headed, rollout_lines
from ratchet.storage.database import find_database

T = TypeVar("T")
MOST_LINES = 15
NARROWEST = 60  # columns
HEAD = 11  # columns of the word at the beginning of a line
EVERYTHING = "ratchet status --all"
FEDERATION = Path(".ratchet/federation")


class Around(NamedTuple):
    """What the files tell besides `Status`, a line each; `sentence` is the last verdict's."""

    sentence: str
    wrong: list[str]
    waits: list[str]  # for a person
    runs: list[str]
    nodes: list[str]


class Together(NamedTuple):
    """What a federation adds to what is wrong and what waits, and how its nodes are."""

    wrong: list[str]
    waits: list[str]
    nodes: list[str]


class Line(NamedTuple):
    """A line before it is wrapped; it may take `rows` lines of the terminal."""

    head: str
    text: str
    rows: int = 2


def look_around(root: Path, config: Config, status: Status) -> Around:
    """Look at what runs and what waits. A part that cannot be read is among what is wrong."""
    faults: list[str] = []
    nothing: list[str] = []

    def read(look: Callable[[], T], otherwise: T) -> T:
        try:
            return look()
        except (RatchetError, OSError, ValueError) as error:  # msgspec's errors are ValueErrors
            faults.append(str(error).splitlines()[0])
            return otherwise

    shared = not status.fault and find_database(root) is not None
    verdict = read(lambda: _last_verdict(root), None)
    together = read(lambda: _federation(root), Together([], [], []))
    waits = [
        *read(lambda: _waiting_rows(root, shared=shared), nothing),
        *read(lambda: _waiting_candidate(root, config, status, verdict), nothing),
        *_waiting_rollout(status),
        *together.waits,
    ]
    runs = read(lambda: _running(root, shared=shared), nothing)
    sentence = read(lambda: _sentence(root, verdict), "")
    behind = read(lambda: _alias_behind(root), nothing)
    return Around(sentence, [*dict.fromkeys(faults), *behind, *together.wrong], waits, runs, together.nodes)


def describe_all(found: Status, around: Around) -> list[str]:
    """Describe all parts, each as long as it is."""
    parts = [("wrong", around.wrong), ("waits", around.waits), ("runs", around.runs), ("nodes", around.nodes)]
    more = [line for head, lines in parts for line in headed(head, lines)]
    return [*describe(found, around.sentence), *more]


def describe_in_short(found: Status, around: Around, columns: int) -> list[str]:
    """Describe what matters, in at most fifteen lines of a terminal with that many columns."""
    lines = [
        *_answering(found),
        *_first_few("wrong", [*around.wrong, *_wrong(found)]),
        *_first_few("waits", around.waits),
        *_first_few("runs", around.runs),
        *_last_gate(found, around.sentence),
        *_drift(found.drift),
        *_data(found),
        *_first_few("nodes", around.nodes),
        *_services(found),
    ]
    return fit(lines, Line("more", EVERYTHING), max(columns, NARROWEST))


def fit(lines: list[Line], last: Line, columns: int) -> list[str]:
    """Wrap the lines; where they are too many, cut the least important to one line each, then leave them out.

    `last` always stays.
    """
    room = MOST_LINES - 1
    wrapped = [_wrap(line, columns) for line in lines]
    for place in reversed(range(len(wrapped))):
        if sum(map(len, wrapped)) <= room:
            break
        wrapped[place] = _wrap(lines[place]._replace(rows=1), columns)
    return [*[row for rows in wrapped for row in rows][:room], *_wrap(last, columns)]


def _wrap(line: Line, columns: int) -> list[str]:
    plain = "".join(char if char.isprintable() or char.isspace() else "�" for char in line.text)
    wrapped = textwrap.wrap(
        plain, columns - HEAD, max_lines=line.rows, placeholder=" …", break_on_hyphens=False
    )
    return headed(line.head, wrapped or [""])


def _first_few(head: str, texts: list[str], most: int = 3) -> list[Line]:
    """Return a line each; of many, the first and how many more there are."""
    shown = texts if len(texts) <= most else texts[: most - 1]
    left = len(texts) - len(shown)
    more = [Line("", f"… and {left} more")] if left else []
    return [*(Line("" if place else head, text) for place, text in enumerate(shown)), *more]


# --- who answers, what is wrong -----------------------------------------------------------------------------


def _answering(found: Status) -> list[Line]:
    champion = found.champion
    told = (
        f"v{champion.version} since {champion.since}, by {champion.by}: {champion.why}"
        if champion
        else "nobody yet"
    )
    lines = [Line("project", f"{found.project} (promotion: {found.promotion})"), Line("champion", told)]
    return lines + ([Line("rollout", "; ".join(rollout_lines(found.rollout)))] if found.rollout else [])


def _wrong(found: Status) -> list[str]:
    refused = found.serving.refused if found.serving else {}
    services = found.services.items()
    silent = [name for name, one in services if not one.answers and (one.started_here or one.variable)]
    down = [name for name, one in services if not one.answers and name not in silent]
    return [
        *([f"the rollout cannot be read: {found.fault}"] if found.fault else []),
        *(f"the gateway refuses {version}: {why}" for version, why in refused.items()),
        *([f"no answer from {', '.join(silent)}: ratchet doctor"] if silent else []),
        *([f"not running: {', '.join(down)}: ratchet up"] if down else []),
        *([f"{len(found.left)} runs failed and left their files: {EVERYTHING}"] if found.left else []),
    ]


# --- what waits for a person, what runs ---------------------------------------------------------------------


def _waiting_rows(root: Path, *, shared: bool) -> list[str]:
    if not shared and not (root / REVIEW).exists():
        return []
    from ratchet.review.queue import ReviewQueue

    queue = ReviewQueue(root)
    try:
        rows = queue.waiting()
    finally:
        queue.close()
    return [f"{rows:,} row{'s' * (rows > 1)} to review: ratchet review status"] if rows else []


def _waiting_candidate(root: Path, config: Config, status: Status, verdict: Verdict | None) -> list[str]:
    """Say that the last candidate passed and that only a person can promote it."""
    if config.promotion != "manual" or status.rollout or not verdict or verdict.verdict != "promote":
        return []
    rival = status.champion.version if status.champion else None
    if verdict.rival.version != rival or was_promoted(root, verdict.candidate.adapter_sha256, rival):
        return []
    return ["the last candidate passed the gate: ratchet promote N, with its number in MLflow"]


def _waiting_rollout(status: Status) -> list[str]:
    if status.rollout and status.rollout.state == "paused":
        return [f"the rollout of v{status.rollout.version} is paused: ratchet rollout resume"]
    return []


def _running(root: Path, *, shared: bool) -> list[str]:
    """Say what runs here; where machines share a database, also that a retraining runs elsewhere."""
    here = running(root)
    told = [f"{purpose} since {start:%Y-%m-%d %H:%M} UTC" for purpose, start in here]
    elsewhere = shared and all(purpose != "retrain" for purpose, _ in here) and is_under_way(root)
    return [*told, *(["a retraining, on another machine or about to begin"] if elsewhere else [])]


def _alias_behind(root: Path) -> list[str]:
    """Say that MLflow has not been told of the champion, since a run was killed or MLflow was away."""
    if not alias_is_pending(root):
        return []
    return ["MLflow's alias `champion` may be behind champion.json: ratchet rollout look"]


def _federation(root: Path) -> Together:
    if not (root / FEDERATION).exists():
        return Together([], [], [])
    from ratchet.federation.status import see_federation  # imports numpy, which takes a second

    found = see_federation(root)
    link = "the link runs" if found.runs else "the link does not run: ratchet federate up, or join"
    wrong = [f"the link to the federation ended: {found.ended}"] if found.ended else []
    if found.node:
        here = found.delivered if found.delivered and not found.taken else None
        waits = [f"{here.told} is here: ratchet federate take"] if here else []
        return Together(
            wrong, waits, [f"this is {found.node.name}, of the coordinator at {found.node.url}; {link}"]
        )
    if not found.nodes:
        return Together(wrong, [], [])
    goes_on = f"; a run goes on, with {len(found.rounds)} rounds done" if found.run else ""
    connected = f"{sum(found.nodes.values())} of {len(found.nodes)} connected"
    return Together(wrong, [], [f"{connected}; {link}{goes_on}"])


# --- gate, drift, data, services ----------------------------------------------------------------------------


def _last_verdict(root: Path) -> Verdict | None:
    path = root / "reports/gate.json"
    return read_verdict(path) if path.exists() else None


def _sentence(root: Path, verdict: Verdict | None) -> str:
    champion = read_champion(root)
    promoted = bool(champion and verdict and is_gate_of(champion, verdict))
    return tell_verdict(verdict, promoted=promoted) if verdict else ""


def _last_gate(found: Status, sentence: str) -> list[Line]:
    if not found.gate:
        return []
    return [Line("last gate", sentence or f"{found.gate.verdict}: ratchet gate explain", rows=3)]


def _drift(found: Recorded | None) -> list[Line]:
    if not found:
        return []
    told = f"{found.verdict} on {found.rows} requests to v{found.version}"
    if found.verdict != "drift":
        return [Line("drift", told)]
    topics = f", in {'; '.join(topic.name for topic in found.topics)}" if found.topics else ""
    decision = found.decision
    against = f": {decision.against[0]}" if decision.against else ""
    so = "a retraining is worth it" if decision.retrain else f"no retraining{against}"
    return [Line("drift", f"{told}{topics}; so {so}")]


def _data(found: Status) -> list[Line]:
    data = found.data
    if not data.batches:
        return [Line("data", "no batch in this checkout yet: ratchet ingest --path FILE")]
    new = f"{len(data.new)} of them came since the champion: ratchet retrain"
    since = new if data.new else "nothing new since the champion"
    return [Line("data", f"{data.rows:,} rows in {data.batches} batch{'es' * (data.batches > 1)}; {since}")]


def _services(found: Status) -> list[Line]:
    answer = [f"{name} {one.url}" for name, one in found.services.items() if one.answers and one.url]
    return [Line("services", ", ".join(answer))] if answer else []
