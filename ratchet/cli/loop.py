"""`ratchet demo`, `ingest`, `synthesize`, `retrain` and `monitor`: the loop from rows to a gated version."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ratchet.cli.context import (
    Columns,
    Draft,
    Json,
    Like,
    Preview,
    Query,
    Reason,
    find_root,
    name_version,
    note_renamed,
    read_config,
    read_mapping,
    ready_root,
    say,
    show,
)
from ratchet.errors import UserError

if TYPE_CHECKING:
    from flows.retrain import Retrained


def demo(
    base: Annotated[
        str,
        typer.Option(
            help="`demo`, pre-trained here in a minute, `charts`, which reads pictures, or `smollm2`, a real "
            "model of 135M."
        ),
    ] = "demo",
    only: Annotated[str, typer.Option("--until", help="Stop after `v1` or `v2`.")] = "v2",
) -> None:
    """Run the whole loop on the embedded default, in .ratchet/demo; your checkout stays as it is.

    Example: ratchet demo --base smollm2
    """
    if base not in ("demo", "charts", "smollm2"):
        raise UserError(
            f"--base is {base!r}",
            remedy="name `demo`, `charts` or `smollm2`; `ratchet init` takes any other",
        )
    from ratchet.demo.story import run_demo

    run_demo(find_root(), base=base, until=only)


def ingest(
    source: Annotated[
        str | None,
        typer.Option(help="pydoc, jsonl, sql, feedback or review; otherwise what params.yaml says."),
    ] = None,
    path: Annotated[
        str | None,
        typer.Option(
            help="File, glob, folder or URL of rows (JSON, CSV, TSV, Parquet, Arrow); a database's address."
        ),
    ] = None,
    columns: Columns = None,
    query: Query = None,
    packages: Annotated[str | None, typer.Option(help="Import names for pydoc, with commas.")] = None,
    draft: Draft = None,
    golden: Annotated[
        int, typer.Option(min=0, metavar="ROWS", help="Freeze that many rows as the golden set instead.")
    ] = 0,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Every row is a test row, and none is ever learned.")
    ] = False,
    like: Like = None,
    preview: Preview = False,
    as_json: Json = False,
) -> None:
    """Pull rows into one immutable batch and commit it.

    Example: ratchet ingest --path 'exports/*.jsonl'
    """
    mapping = read_mapping(columns)
    if preview:
        _preview(
            find_root(),
            as_json,
            source=source,
            path=path,
            packages=packages.split(",") if packages else None,
            draft=draft,
            columns=mapping,
            query=query,
        )
        return
    root = ready_root()
    from flows.ingest import ingest as flow
    from flows.outage import run_flow

    done = run_flow(
        flow,
        root=str(root),
        source=source,
        path=path,
        packages=packages.split(",") if packages else None,
        golden=golden,
        draft=draft,
        columns=mapping,
        query=query,
        held_out=held_out,
        like=like,
    )
    news = (
        f"{done['rows']} rows in {done['batch']}, commit {done['commit'][:8]}"
        if done["new"]
        else f"nothing new: these rows are batch {done['batch']}"
    )
    show(done, as_json, lambda: say(news))


def _preview(root: Path, as_json: bool, **given: Any) -> None:
    """Print the first rows that would be ingested; commit nothing."""
    config = read_config(root)
    from flows.data_check import BASE, preview_pulled
    from ratchet.sources.preview import as_plain, print_preview
    from tasks.ingest import check_rows, pull

    pulled = pull(config, root=root, **given)
    rows, why = preview_pulled(pulled, config, root / BASE)

    def tell() -> None:
        say(f"{len(pulled.lines)} rows from {pulled.source} ({pulled.label}), form {pulled.form}")
        for line in (*pulled.said, *filter(None, [why])):
            say(line)
        print_preview(rows)
        say("nothing was committed")

    found = {"rows": len(pulled.lines), "form": pulled.form, "said": pulled.said, "preview": as_plain(rows)}
    show(found, as_json, tell)
    check_rows(pulled, config)


def synthesize(
    documents: Annotated[
        list[str] | None,
        typer.Option(
            "--documents", metavar="PLACE", help="File, folder, glob or URL to ask about; may be given again."
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option("--count", min=1, metavar="ROWS", help="Rows to keep; otherwise synthesize.count."),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            "--mode",
            help="documents; seeds: more rows like known ones; paraphrase: other wordings where the model is "
            "weak.",
        ),
    ] = "documents",
    seeds: Annotated[
        str,
        typer.Option(
            "--seeds",
            metavar="FILE",
            help="JSON Lines to show the teacher; otherwise the prepared training rows.",
        ),
    ] = "",
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="DRAFT", help="Continue a draft; nothing is asked twice."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Let a teacher model write rows for people to review.

    `synthesize.teacher` in params.yaml holds its address, the variable RATCHET_TEACHER_KEY its key.

    Example: ratchet synthesize --documents 'docs/*.md' --count 200
    """
    from ratchet.errors import UserError

    if resume and (documents or seeds or mode != "documents"):
        raise UserError(
            "--resume was given with --mode, --documents or --seeds: a resumed draft keeps its own",
            remedy="give --resume with --count alone, or start a new draft without --resume",
        )
    root = ready_root(clean=False)
    from flows.outage import run_flow
    from flows.synthesize import synthesize as flow
    from ratchet.synthesis.draft import summary_lines

    done = run_flow(
        flow, root=str(root), mode=mode, documents=documents, seeds=seeds, count=count, resume=resume
    )

    def tell() -> None:
        say("\n".join(summary_lines(done)))
        if done.stopped:
            say(f"to continue: ratchet synthesize --resume {done.draft}")
        if done.kept:
            say(
                f"next: ratchet review status, or http://127.0.0.1:{read_config(root).gateway.port}/review; "
                f"then ratchet ingest --source review --draft {done.draft}"
            )

    show(done.to_json(), as_json, tell)


def retrain(
    reason: Reason = "by hand",
    force: Annotated[
        bool, typer.Option("--force", help="Compare with today's champion even when nothing else changed.")
    ] = False,
    drift: Annotated[
        bool,
        typer.Option("--drift", help="First pull rows of the topics that the monitor's last verdict named."),
    ] = False,
    deployment: Annotated[
        bool,
        typer.Option(
            "--deployment",
            help="Compute nothing here: ask the deployment that PREFECT_API_URL serves. It takes in the "
            "commits of its checkout's git remote first, and pushes at the end.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Prepare, tokenize, train, evaluate, gate; what the gate lets through is promoted or rolled out.

    Stages whose inputs did not change are skipped. Example: ratchet retrain --reason "March's tickets"
    """
    if deployment:
        _hand_over(reason, as_json, refused={"--force": force, "--drift": drift})
        return
    root = ready_root()
    from flows.outage import run_flow
    from flows.retrain import retrain as flow

    done = run_flow(
        flow, root=str(root), reason=reason, force=force, topics=_drifted_topics(root) if drift else None
    )
    show(done._asdict(), as_json, lambda: tell_retrained(done))


def _hand_over(reason: str, as_json: bool, refused: dict[str, bool]) -> None:
    """Ask the served deployment for a retraining; print where to follow it."""
    import os

    if given := [name for name, value in refused.items() if value]:
        raise UserError(
            f"--deployment was given with {' and '.join(given)}", remedy="give --deployment alone"
        )
    if not os.environ.get("PREFECT_API_URL"):
        raise UserError(
            "PREFECT_API_URL is not set: it says which Prefect serves the retraining",
            remedy="export PREFECT_API_URL=http://HOST:4200/api (and PREFECT_API_AUTH_STRING)",
        )
    config = read_config(find_root())
    from flows.deployments import request_retraining

    run = request_retraining(config, reason)
    show({"run": run}, as_json, lambda: say(f"requested: {run}"))


def tell_retrained(done: Retrained) -> None:
    say(done.sentence)
    ran = ", ".join(stage for stage, did in done.stages.items() if did) or "nothing, all unchanged"
    version = f"v{done.version}" if done.version else "no version"
    say(f"verdict: {done.verdict} ({version}); in charge: {name_version(done.champion)}; ran: {ran}")
    for line in [*done.reasons, *done.regions]:
        say(f"  {line}")


def _drifted_topics(root: Path) -> list[dict[str, Any]]:
    """Return the topics of the monitor's last verdict. Raises UserError if it was not drift."""
    import msgspec

    from ratchet.monitoring.verdicts import last_verdict

    found = last_verdict(root)
    if not found or found.verdict != "drift":
        raise UserError(
            "the last verdict of the monitor is not drift",
            remedy="ratchet monitor looks at the newest requests; `ratchet retrain` needs no drift",
        )
    return [msgspec.to_builtins(topic) for topic in found.topics]


def monitor(
    no_retrain: Annotated[
        bool, typer.Option("--no-retrain", help="Start no retraining, whatever is found.")
    ] = False,
    only_look: Annotated[bool, typer.Option("--only-look", hidden=True)] = False,
    as_json: Json = False,
) -> None:
    """Compare the newest requests with the data that the champion was made for.

    Example: ratchet monitor
    """
    if only_look:
        note_renamed("--only-look", "--no-retrain")
    root = ready_root()
    import msgspec

    from flows.monitor import NO_CHAMPION
    from flows.monitor import monitor as flow
    from flows.outage import run_flow

    found = run_flow(flow, root=str(root), retrain=not (no_retrain or only_look))

    def tell() -> None:
        from ratchet.services.status import verdict_lines

        say("\n".join(verdict_lines(found) if found else [NO_CHAMPION]))

    show(msgspec.to_builtins(found) if found else {"verdict": "no champion"}, as_json, tell)
