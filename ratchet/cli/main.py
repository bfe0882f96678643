"""The command `ratchet`. It reads arguments and prints; what it does stands in flows, tasks and services.

Heavy modules are imported inside the commands: `ratchet --help` answers at once.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ratchet.cli import data, gate, keys, review, rollout, training
from ratchet.cli.context import Here, Json, Reason, find_root, note, read_config, ready_root, say, show
from ratchet.cli.export import export
from ratchet.cli.ledger import ledger
from ratchet.cli.synthesize import synthesize
from ratchet.errors import ConfigError, RatchetError, StageError, UserError

app = typer.Typer(
    name="ratchet",
    help="Keeps a fine-tuned language model fresh: new data in, a gated and traceable model out.\n\nStart with: ratchet demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(rollout.app, name="rollout")
app.add_typer(keys.app, name="keys")
app.add_typer(gate.app, name="gate")
app.add_typer(review.app, name="review")
app.add_typer(data.app, name="data")
INTERRUPTED = 130  # typer's exit code for Ctrl-C


@app.callback()
def _global(
    path: Annotated[
        Path | None, typer.Option("-C", metavar="PATH", help="Work in the checkout at PATH, as git does.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    Here.path, Here.debug = path, debug


@app.command()
def demo(
    only: Annotated[str, typer.Option("--until", help="Stop after `v1` or `v2`.")] = "v2",
) -> None:
    """Run the whole loop on the embedded default, in .ratchet/demo; your checkout stays as it is.

    Example: ratchet demo
    """
    from ratchet.demo.story import run_demo

    run_demo(find_root(), until=only)


@app.command()
def up() -> None:
    """Start MLflow, Prefect, the served deployments and the gateway, on 127.0.0.1.

    Example: ratchet up
    """
    from ratchet.services.supervisor import start_services

    root = find_root()
    for service in start_services(root, read_config(root), report=say):
        say(f"{service.name:12} {service.url or ''}")


@app.command()
def down() -> None:
    """Stop what `ratchet up` started here.

    Example: ratchet down
    """
    from ratchet.services.supervisor import stop_services

    if not stop_services(find_root(), report=say):
        say("nothing of this checkout runs")


@app.command()
def ingest(
    source: Annotated[
        str | None, typer.Option(help="pydoc, jsonl, feedback or review; otherwise what params.yaml says.")
    ] = None,
    path: Annotated[str | None, typer.Option(help="File, glob or URL of JSON Lines.")] = None,
    packages: Annotated[str | None, typer.Option(help="Import names for pydoc, with commas.")] = None,
    draft: Annotated[
        str | None, typer.Option(metavar="NAME", help="The reviewed draft; without it, all that are ready.")
    ] = None,
    golden: Annotated[
        int, typer.Option(min=0, metavar="ROWS", help="Freeze that many rows as the golden set instead.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Pull rows into one immutable batch and commit it.

    Example: ratchet ingest --path 'exports/*.jsonl'
    """
    root = ready_root()
    from flows.ingest import ingest as flow

    done = flow(
        root=str(root),
        source=source,
        path=path,
        packages=packages.split(",") if packages else None,
        golden=golden,
        draft=draft,
    )
    news = (
        f"{done['rows']} rows in {done['batch']}, commit {done['commit'][:8]}"
        if done["new"]
        else f"nothing new: these rows are batch {done['batch']}"
    )
    show(done, as_json, lambda: say(news))


app.command()(synthesize)
app.command()(export)
app.command()(ledger)
for command in (training.plan, training.sweep, training.compare):
    app.command()(command)


@app.command()
def retrain(
    reason: Reason = "by hand",
    force: Annotated[
        bool, typer.Option("--force", help="Compare with today's champion even when nothing else changed.")
    ] = False,
    drift: Annotated[
        bool, typer.Option("--drift", help="Pull rows of the topics that the last verdict named, first.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Prepare, tokenize, train, evaluate, gate; what the gate lets through is promoted or rolled out.

    What did not change is skipped. Example: ratchet retrain --reason "March's tickets"
    """
    root = ready_root()
    from flows.retrain import retrain as flow

    done = flow(root=str(root), reason=reason, force=force, topics=_drifted_topics(root) if drift else None)

    def tell() -> None:
        ran = ", ".join(stage for stage, did in done.stages.items() if did) or "nothing, all unchanged"
        version = f"v{done.version}" if done.version else "no version"
        say(f"verdict: {done.verdict} ({version}); in charge: {_version(done.champion)}; ran: {ran}")
        for line in [*done.reasons, *done.regions]:
            say(f"  {line}")

    show(done._asdict(), as_json, tell)


@app.command()
def status(as_json: Json = False) -> None:
    """Who is in charge, what the gate said last, what is new, what runs.

    Example: ratchet status
    """
    root = find_root()
    from ratchet.services.status import describe, see_status

    found = see_status(root, read_config(root))
    show(found, as_json, lambda: say("\n".join(describe(found))))


@app.command()
def promote(
    version: Annotated[int, typer.Argument(min=1, help="Number of the version in MLflow's registry.")],
    reason: Reason = "by hand",
    force: Annotated[bool, typer.Option("--force", help="Overrule the gate; needs --reason.")] = False,
    as_json: Json = False,
) -> None:
    """Put a gated version in charge: commit, tag, alias.

    Example: ratchet promote 3 --reason "read the table with Ana"
    """
    if force and reason == "by hand":
        raise UserError(
            "--force without --reason", remedy="the ledger keeps why the gate was overruled: add --reason '…'"
        )
    root = ready_root()
    from flows.promotion import promote_version

    _tell_champion(
        promote_version(root, read_config(root), version, reason=reason, force=force, say=note), as_json
    )


@app.command()
def rollback(reason: Reason = "by hand", as_json: Json = False) -> None:
    """Return to the version before, in one step; works with MLflow down.

    Example: ratchet rollback --reason "wrong answers about refunds"
    """
    root = ready_root()
    from flows.promotion import roll_back

    _tell_champion(roll_back(root, read_config(root), reason=reason, say=note), as_json)


@app.command()
def serve() -> None:
    """Answer on OpenAI's protocol with the champion, until Ctrl-C. `ratchet up` does it in the background.

    Example: ratchet serve
    """
    from ratchet.gateway.server import serve as run

    root = find_root()
    run(root, read_config(root))


@app.command()
def monitor(
    only_look: Annotated[
        bool, typer.Option("--only-look", help="Start no retraining, whatever is found.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare the newest requests with what the champion was made for.

    Example: ratchet monitor
    """
    root = ready_root()
    import msgspec

    from flows.monitor import NO_CHAMPION
    from flows.monitor import monitor as flow

    found = flow(root=str(root), retrain=not only_look)

    def tell() -> None:
        from ratchet.services.status import verdict_lines

        say("\n".join(verdict_lines(found) if found else [NO_CHAMPION]))

    show(msgspec.to_builtins(found) if found else {"verdict": "no champion"}, as_json, tell)


@app.command()
def report(
    path: Annotated[
        Path | None, typer.Option("--out", help="Where to write the page; otherwise .ratchet/report.html.")
    ] = None,
) -> None:
    """Write one page with the champion, traffic, feedback, drift, rollout and ledger.

    Example: ratchet report --out report.html
    """
    from ratchet.reporting.dashboard import write_page

    root = find_root()
    say(str(write_page(root, read_config(root), path or root / ".ratchet/report.html")))


@app.command()
def history(as_json: Json = False) -> None:
    """The ledger: when, who, from, to, why, data, gate.

    Example: ratchet history
    """
    root = find_root()
    from ratchet.services.status import ledger_lines, ledger_rows

    rows = ledger_rows(root)
    show(rows, as_json, lambda: say("\n".join(ledger_lines(rows))))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check versions, ports, disk, git, DVC and GPU, and say what to do.

    Example: ratchet doctor
    """
    from ratchet.services.doctor import examine

    try:
        root: Path | None = find_root()
    except ConfigError:
        root = None
    findings = examine(root, read_config(root) if root else None)
    marks = {True: "ok  ", False: "BAD ", None: "note"}

    def tell() -> None:
        for finding in findings:
            say(f"{marks[finding.ok]} {finding.name:12} {finding.found}")
            if finding.ok is not True and finding.remedy:
                say(f"     {'':12} → {finding.remedy}")

    show(
        [
            {"name": finding.name, "ok": finding.ok, "found": finding.found, "remedy": finding.remedy}
            for finding in findings
        ],
        as_json,
        tell,
    )
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(2)


def main() -> None:
    """Entry point: every RatchetError is one message and its exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except RatchetError as error:
        if Here.debug:
            raise
        _fail(f"{_kind(error)}: {error}", error.exit_code)
    except Exception as error:  # the last resort: a bug of ours or of a library ends in one message as well
        if Here.debug:
            raise
        _fail(
            f"{type(error).__name__}: {error}\n  → not foreseen; --debug before the command shows where: ratchet --debug …",
            1,
        )
    except SystemExit as end:
        if end.code == INTERRUPTED:
            typer.secho(
                "interrupted: finished stages are kept; run the command again", fg=typer.colors.RED, err=True
            )
        raise


def _interrupt(*_: object) -> None:
    """A plain SIGTERM would leave a running stage, and Prefect's server of one's own, behind."""
    raise KeyboardInterrupt


def _kind(error: RatchetError) -> str:
    return "error" if isinstance(error, UserError | StageError) else type(error).__name__


def _fail(message: str, code: int) -> None:
    typer.secho(message, fg=typer.colors.RED, err=True)
    sys.exit(code)


def _drifted_topics(root: Path) -> list[dict[str, Any]]:
    """Raises UserError when the last verdict was not drift."""
    import msgspec

    from ratchet.monitoring.verdicts import last_verdict

    found = last_verdict(root)
    if not found or found.verdict != "drift":
        raise UserError(
            "the last verdict of the monitor is not drift",
            remedy="ratchet monitor looks at the newest requests; `ratchet retrain` needs no drift",
        )
    return [msgspec.to_builtins(topic) for topic in found.topics]


def _tell_champion(champion: Any, as_json: bool) -> None:
    import msgspec

    show(
        msgspec.to_builtins(champion),
        as_json,
        lambda: say(f"in charge: v{champion.version} (before: {_version(champion.replaced)})"),
    )


def _version(number: int | None) -> str:
    return f"v{number}" if number is not None else "nobody"
