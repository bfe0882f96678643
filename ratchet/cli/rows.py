"""`ratchet data check|rejected|resubmit|show`: which rows preparation accepts or rejects, and why."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from ratchet.cli.context import (
    Columns,
    Json,
    Preview,
    Query,
    add_old_name,
    find_root,
    note,
    read_config,
    say,
    show,
    with_columns,
)
from ratchet.errors import DataError, UserError

if TYPE_CHECKING:
    from ratchet.config.params import Config
    from ratchet.evaluation.metrics import Proposal
    from ratchet.models.lengths import Lengths
    from ratchet.sources.jsonl import Place
    from tasks.prepare import Rejection

SHOWN = 10  # rows that are printed; --json lists all
FAILED = 3  # exit code if the batch would fail; a file that cannot be read exits with 2


def check(
    files: Annotated[
        list[str], typer.Argument(help="Files, globs or URLs of rows; a database's address, with --query.")
    ],
    columns: Columns = None,
    query: Query = None,
    preview: Preview = False,
    as_json: Json = False,
) -> None:
    """Check the rows of a file as a batch, before anything is committed.

    Exit code 3: the batch would fail; 2: a file cannot be read.

    Example: ratchet data check exports/march.csv --columns prompt=text,completion=category --preview
    """
    root = find_root()
    config = with_columns(read_config(root), columns)
    from flows.data_check import BASE, check_file
    from ratchet.sources.preview import as_plain, print_preview

    time = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    verdicts, unread = [], []
    for path in files:
        try:
            verdicts.append(
                check_file(
                    path,
                    root / "data/golden.jsonl",
                    config,
                    time=time,
                    base=root / BASE,
                    query=query,
                    preview=preview,
                )
            )
        except DataError as error:  # the other files still get their verdicts
            unread.append(error)
    found = [
        {
            **{name: value for name, value in verdict._asdict().items() if name != "places"},
            "counts": msgspec.to_builtins(verdict.counts),
            "rejected": [
                {**msgspec.to_builtins(row), **_plain(verdict.places[row.line])} for row in verdict.rejected
            ],
            "tokens": verdict.tokens and verdict.tokens._asdict(),
            "preview": as_plain(verdict.preview),
            "metrics": verdict.metrics and verdict.metrics._asdict(),
        }
        for verdict in verdicts
    ]

    def tell() -> None:
        for verdict in verdicts:
            counts = verdict.counts
            say(
                f"{verdict.path}: {counts.rows} rows = accepted {counts.accepted['rows']}, "
                f"rejected {counts.rejected['rows']}, duplicate {counts.duplicate['rows']}"
            )
            if doubtful := sum(row.review for row in verdict.rejected):
                say(f"  {doubtful} of the rejected rows would go to review: people decide (ratchet review)")
            if lengths := _tell_lengths(verdict.tokens, config) or verdict.unmeasured:
                say(f"  {lengths}")
            if verdict.metrics:
                say(f"  {_tell_metrics(verdict.metrics, config)}")
            alike: dict[tuple[str, str], list[Rejection]] = {}
            for row in verdict.rejected:
                alike.setdefault((row.reason, row.message), []).append(row)
            for (reason, message), rows in list(alike.items())[:SHOWN]:
                more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
                overrule = "  (a person may overrule it)" if rows[0].review else ""
                say(f"  {verdict.places[rows[0].line]}{more}: {reason}: {message}{overrule}")
            if left := sum(map(len, list(alike.values())[SHOWN:])):
                say(f"  … and {left} more; --json lists all")
            for line in verdict.said:
                say(f"  {line}")
            if counts.sanitised:
                found_in = (
                    f"{name.replace('_', ' ')} in {count} texts" for name, count in counts.sanitised.items()
                )
                say("  sanitised: " + ", ".join(found_in))
            print_preview(verdict.preview)

    show(found, as_json, tell)
    for verdict in verdicts:
        if verdict.failure:
            note(f"would fail: {verdict.failure}")
    if unread:
        raise DataError("\n".join(map(str, unread)))
    if any(verdict.failure for verdict in verdicts):
        raise typer.Exit(FAILED)


def _plain(place: Place) -> dict[str, Any]:
    return {"row": place.row, "line": place.line or None, **({"file": place.file} if place.file else {})}


def _tell_metrics(found: Proposal, config: Config) -> str:
    """Say which metrics fit the answers, and what to change if the settings lack them."""
    told = f"metrics: {', '.join(found.metrics)} fit: {found.why}"
    missing = [name for name in found.metrics if name not in ("exact_match", *config.evaluate.metrics)]
    if missing:
        told += f"; add {', '.join(missing)} to `evaluate.metrics`"
    if config.gate.metric not in found.metrics:
        told += f"; `gate.metric` is {config.gate.metric}, which may see no difference"
    return told


def _tell_lengths(found: Lengths | None, config: Config) -> str:
    """Say how long the rows are, and how many exceed the limit."""
    if not found:
        return ""
    chosen = "auto: " if config.tokenize.max_length == "auto" else ""
    return (
        f"tokens: half of the rows have {found.median} or less, 99.5 % {found.covered}, the longest "
        f"{found.longest}; {found.too_long} of {found.rows} ({found.too_long / found.rows:.1%}) are over "
        f"`tokenize.max_length` ({chosen}{found.max_length})"
    )


def rejected(
    reason: Annotated[str, typer.Option(help="Only rows with this reason.")] = "",
    batch: Annotated[str, typer.Option(help="Only rows of batches whose name starts with this.")] = "",
    as_json: Json = False,
) -> None:
    """List the rows that the last preparation did not take, by reason.

    Example: ratchet data rejected --reason control_token
    """
    root = find_root()
    from flows.data_check import REJECTED, read_rejected

    everything = read_rejected(root / REJECTED)
    rows = [row for row in everything if reason in ("", row.reason) and row.batch.startswith(batch)]

    def tell() -> None:
        if not rows:
            known = sorted({row.reason for row in everything})
            say(
                f"none with that reason or batch; reasons: {', '.join(known)}"
                if known
                else "no row was rejected"
            )
        for name, count in Counter(row.reason for row in rows).most_common():
            say(f"{count:7} {name}")
        for row in rows[:SHOWN]:
            say(f"  {row.batch}:{row.line}: {row.message}")
        if len(rows) > SHOWN:
            say(
                f"  … and {len(rows) - SHOWN} more; --json lists all, ratchet data show BATCH:LINE prints one"
            )

    show([msgspec.to_builtins(row) for row in rows], as_json, tell)


def resubmit(as_json: Json = False) -> None:
    """Check the rejected rows again with today's settings. The next retraining takes what passes by itself.

    Example: ratchet data resubmit
    """
    root = find_root()
    from flows.data_check import resubmit as check_again

    found = check_again(root, read_config(root))

    def tell() -> None:
        if not any(found):
            say("no row was rejected")
        for reason in sorted({*found.fit, *found.unfit}):
            say(f"{reason}: {found.fit[reason]} would be taken now, {found.unfit[reason]} would not")
        for reason, count in sorted(found.not_tried.items()):
            say(f"{reason}: {count}, not tried: it depends on other rows")

    show(found._asdict(), as_json, tell)


def show_row(
    place: Annotated[
        str,
        typer.Argument(
            metavar="BATCH:LINE",
            help="As `ratchet data rejected` prints it; the start of the batch's name is enough.",
        ),
    ],
    reveal: Annotated[
        bool, typer.Option("--reveal", help="Print it although it holds a secret or personal data.")
    ] = False,
) -> None:
    """Print one row of a batch, and why it was rejected, if it was.

    Example: ratchet data show 20261125T181500Z-march-1a2b3c4d.jsonl:17
    """
    root = find_root()
    from flows.data_check import raw_row
    from ratchet.data.pii import find_personal, find_secret

    line, why = raw_row(root, place)
    if why:
        say(f"rejected: {why.reason}: {why.message}")
    words = line.decode("utf-8", "replace")
    hidden = (
        "canary" if why and why.reason == "canary" else find_secret(words) or ", ".join(find_personal(words))
    )
    if hidden and not reveal:
        raise UserError(f"the row holds sensitive data: {hidden}", remedy="--reveal prints it")
    try:
        text: Any = json.dumps(json.loads(line), indent=2, ensure_ascii=True)
    except (ValueError, RecursionError):
        text = repr(line)
    say(text)


def add_to(app: typer.Typer) -> None:
    """Add this module's commands to `ratchet data`."""
    for name, command in (
        ("check", check),
        ("rejected", rejected),
        ("resubmit", resubmit),
        ("show", show_row),
    ):
        app.command(name)(command)
    add_old_name(app, "data replay", "data resubmit", resubmit)
