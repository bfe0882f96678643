"""Render what a change of data or settings would do, and what came of it, as the Markdown of one comment.

Names, values and reasons come from data and from people who propose changes. Each is shown as a code span in
which nothing is active (`inert`): no markup, HTML, link, picture, mention or second column can begin there.
No text of a row is shown, because rows may be read by fewer people than the comment.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

import msgspec

from ratchet.data.profile import BatchProfile, Counts, Profile
from ratchet.data.validation import REVIEW
from ratchet.promotion.plain_words import tell_verdict
from ratchet.promotion.verdict import Check, Verdict
from ratchet.reporting.markdown import LABELS, VERDICTS, mark, table_head, table_line

MARKER = "<!-- ratchet changes -->"  # first line; by it the comment is found again
LONGEST, MOST_LINES = 100, 30  # characters of a foreign text; lines of a table
MOST_CHARACTERS = 60_000  # GitHub refuses a comment of more than 65,536


class Side(msgspec.Struct, frozen=True):
    """The data at one commit: what preparation counts, why it would fail, and what it warns of."""

    profile: Profile | None = None
    fault: str = ""
    said: list[str] = []
    places: dict[str, str] = {}  # reason → BATCH:LINE of the first row that is rejected for it in a new batch


class Cost(msgspec.Struct, frozen=True):
    """What the training takes: by the last training's rate, as measured, or why neither is known."""

    last_seconds: float | None = None
    last_rows: int = 0
    rows: int = 0
    measured: list[str] = []
    seconds: float | None = None  # the measured time, else that by the last training's rate
    per_hour: float = 0.0  # gate.worth.cost_per_hour
    why: str = ""


class Changes(msgspec.Struct, frozen=True):
    """What changed between two commits; `fault` says why params.yaml cannot be read."""

    since: str
    head: str
    before: Side
    after: Side
    settings: list[tuple[str, str, str]]  # key, value before, value now
    fault: str
    stages: list[str]
    then: list[str]
    cost: Cost | None  # of the training, if one would follow
    verdict: Verdict | None = None  # if the commits hold a new one
    waiting: int = 0  # rows of the new preparation that people may overrule


def render_changes(found: Changes, image: str = "") -> str:
    """Render the comment; `image` is the address of the forest plot, if it is to be shown."""
    lines = [
        MARKER,
        *_verdict(found, image),
        *_data(found),
        *_settings(found),
        *_training(found),
        "",
        f"From {inert(found.since[:12])} to {inert(found.head[:12])}, by `ratchet changes`.",
    ]
    return cut_to("\n".join(lines) + "\n", MOST_CHARACTERS)


def inert(text: object, longest: int = LONGEST) -> str:
    """Return a foreign text as a code span of one line, in which nothing can become active.

    Control and invisible characters, also those that turn the direction of writing, are written as escapes;
    a backtick, which would end the span, and a bar, which would end a table's cell, become look-alikes.
    """
    words = " ".join(str(text).split())
    short = words if len(words) <= longest else f"{words[: longest - 1]}…"
    shown = "".join(map(_visible, short)).replace("`", "'").replace("|", "¦").strip()
    return f"`{shown}`" if shown else "(empty)"


def _visible(char: str) -> str:
    if char == " " or unicodedata.category(char)[0] not in "CZ":
        return char
    return char.encode("unicode_escape").decode()


def cut_to(text: str, most: int) -> str:
    """Cut after a whole line, and say so."""
    if len(text) <= most:
        return text
    note = "\n… cut here: `ratchet changes --json` has all of it\n"
    return text[: text.rindex("\n", 0, most - len(note))] + "\n" + note


# --- data ---------------------------------------------------------------------------------------------------


def _data(found: Changes) -> list[str]:
    before, after = found.before.profile, found.after.profile
    lines = ["", "### Data", ""]
    if found.after.fault:
        lines += [f"❌ **A retraining would fail:** {inert(found.after.fault, 400)}", ""]
    elif found.before.fault:
        lines += [f"Before this change a retraining failed: {inert(found.before.fault, 400)}", ""]
    if after is None:
        return lines if found.after.fault else [*lines, "There is no batch of rows yet."]
    lines += _table(["rows", "before", "after"], _totals(before, after))
    lines += [f"- ⚠️ {inert(line, 300)}" for line in found.after.said]
    if found.waiting:
        lines += [
            "",
            f"{found.waiting} of the rejected rows may be overruled by people. After the retraining, "
            "`git pull && ratchet review collect` puts them into a review queue.",
        ]
    return [*lines, *_new_batches(before, after), *_reasons(found), *_parts(before, after)]


def _totals(before: Profile | None, after: Profile) -> list[list[str]]:
    def count(profile: Profile | None, group: str, name: str) -> int:
        return getattr(profile.total, group).get(name, 0) if profile else 0

    rows = [["in batches", str(before.total.rows if before else 0), str(after.total.rows)]]
    for group in ("accepted", "rejected", "duplicate"):
        names = sorted(
            {*getattr(after.total, group), *(getattr(before.total, group) if before else ())} - {"rows"}
        )
        pair = [str(count(side, group, "rows")) for side in (before, after)]
        rows.append([f"**{group}**", *pair])
        if group == "accepted":  # its parts are splits; those of rejected rows have a table of their own
            rows += [
                [inert(name), str(count(before, group, name)), str(count(after, group, name))]
                for name in names
            ]
    return [*rows, ["golden", str(before.golden if before else 0), str(after.golden)]]


def _new_batches(before: Profile | None, after: Profile) -> list[str]:
    known = before.batches if before else {}
    rows = [
        [
            inert(name),
            *map(str, _counts_of(batch)),
            "" if batch.label_shift is None else f"{batch.label_shift:.2f}",
            _languages(batch),
        ]
        for name, batch in after.batches.items()
        if name not in known
    ]
    gone = [inert(name) for name in known if name not in after.batches]
    head = ["new batch", "rows", "accepted", "rejected", "duplicate", "shift of answers", "languages"]
    lines = ["", *_table(head, rows)] if rows else []
    return [*lines, *(["", f"Taken back: {', '.join(gone[:MOST_LINES])}"] if gone else [])]


def _languages(batch: BatchProfile) -> str:
    found = list(batch.languages_of_the_first.items())[:4]
    return ", ".join(f"{inert(code)} {count}" for code, count in found)


def _counts_of(found: Counts) -> tuple[int, int, int, int]:
    return found.rows, found.accepted["rows"], found.rejected["rows"], found.duplicate["rows"]


def _reasons(found: Changes) -> list[str]:
    """Return rejected rows by reason, the most frequent first."""
    assert found.after.profile
    after = found.after.profile.total.rejected
    before = found.before.profile.total.rejected if found.before.profile else {}
    names = sorted({*after, *before} - {"rows"}, key=lambda name: (-after.get(name, 0), name))
    rows = [
        [
            inert(name) + (" (people may overrule)" if name in REVIEW else ""),
            str(before.get(name, 0)),
            str(after.get(name, 0)),
            inert(found.after.places[name]) if name in found.after.places else "",
        ]
        for name in names
    ]
    head = ["rejected because of", "before", "after", "first new one: `ratchet data show`"]
    return ["", *_table(head, rows)] if rows else []


def _parts(before: Profile | None, after: Profile) -> list[str]:
    """Return rows by source and by kind, folded."""
    lines: list[str] = []
    for what, theirs, ours in (
        ("source", before.sources if before else {}, after.sources),
        ("kind", _kinds(before), _kinds(after)),
    ):
        names = sorted({*theirs, *ours}, key=lambda name: (-ours.get(name, 0), name))
        rows = [[inert(name), str(theirs.get(name, 0)), str(ours.get(name, 0))] for name in names]
        lines += ["", *_table([f"accepted, by {what}", "before", "after"], rows)] if len(rows) > 1 else []
    return ["", "<details><summary>More of the profile</summary>", *lines, "", "</details>"] if lines else []


def _kinds(profile: Profile | None) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in profile.kinds.values() if profile else ():
        for kind, count in part.items():
            found[kind] = found.get(kind, 0) + count
    return found


# --- settings, training -------------------------------------------------------------------------------------


def _settings(found: Changes) -> list[str]:
    if found.fault:
        return ["", "### Settings", "", f"❌ **params.yaml cannot be read:** {inert(found.fault, 400)}"]
    if not found.settings:
        return []
    rows = [[inert(key), inert(old), inert(new)] for key, old, new in found.settings]
    return ["", "### Settings", "", *_table(["key", "before", "after"], rows)]


def _training(found: Changes) -> list[str]:
    lines = ["", "### What would run", ""]
    if found.fault:
        return [*lines, "Nothing, before params.yaml is valid."]
    if not found.stages:
        return [*lines, "Nothing: no input of a stage differs from those of the last retraining."]
    then = f", then what depends on it: {', '.join(map(inert, found.then))}" if found.then else ""
    lines.append(f"{', '.join(map(inert, found.stages))}{then}.")
    return [*lines, *(_cost(found.cost) if found.cost else ["", "Nothing is trained."])]


def _cost(cost: Cost) -> list[str]:
    from ratchet.training.estimate import duration

    lines = [""]
    if cost.last_seconds is not None:
        expected = duration(cost.last_seconds * cost.rows / max(1, cost.last_rows))
        lines.append(
            f"- the last training took {duration(cost.last_seconds)} for {cost.last_rows} rows; "
            f"at that rate, {cost.rows} rows take about {expected}"
        )
    lines += [f"- {inert(line, 200)}" for line in cost.measured]
    if cost.why:
        lines.append(f"- not measured: {inert(cost.why, 200)}")
    if cost.seconds is not None and cost.per_hour:
        lines.append(
            f"- cost: {cost.seconds / 3600 * cost.per_hour:,.2f}, at {cost.per_hour:g} an hour "
            "(`gate.worth.cost_per_hour`)"
        )
    elif cost.seconds is not None:
        lines.append("- cost: set `gate.worth.cost_per_hour` to see it")
    return lines if len(lines) > 1 else [*lines, "- how long is not known: nothing was trained before"]


# --- verdict ------------------------------------------------------------------------------------------------


def _verdict(found: Changes, image: str) -> list[str]:
    if not (verdict := found.verdict):
        return ["## What this change does"]
    rival, checks = verdict.rival.told, [*verdict.checks, *verdict.regions]
    lines = [
        tell_verdict(verdict, quote=inert),
        "",
        f"## {VERDICTS[verdict.verdict]}",
        "",
        f"The candidate against {rival}, on the same rows.",
        "",
    ]
    lines += [f"- {inert(reason, 300)}" for reason in verdict.reasons[:MOST_LINES]]
    lines += ["", f"![Forest plot of the gain in each check]({image})"] if image else []
    lines += ["", *_table(["", "check", "metric", "rows", "gain"], [_check(one) for one in checks])]
    return lines


def _check(check: Check) -> list[str]:
    metric = LABELS.get(check.metric) or inert(check.metric)
    return [mark(check.result), inert(check.name), metric, str(check.rows), check.gain_text]


def _table(head: Sequence[str], rows: Sequence[Iterable[str]]) -> list[str]:
    more = [[f"… and {len(rows) - MOST_LINES} more", *[""] * (len(head) - 1)]] if rows[MOST_LINES:] else []
    return [*table_head(head), *map(table_line, [*rows[:MOST_LINES], *more])]
