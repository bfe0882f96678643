"""The command `ratchet`. It reads arguments and prints; what it does stands in flows, tasks and services.

Heavy modules are imported inside the commands: `ratchet --help` answers at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ratchet.errors import ConfigError, RatchetError, StageError, UserError

if TYPE_CHECKING:
    from ratchet.config import Config

app = typer.Typer(
    name="ratchet",
    help="Keeps a fine-tuned language model fresh: new data in, a gated and traceable model out.\n\nStart with: ratchet demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
rollout_app = typer.Typer(help="The open rollout: look, pause, resume, abort.", no_args_is_help=True, rich_markup_mode=None)
keys_app = typer.Typer(help="The gateway's API keys.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(rollout_app, name="rollout")
app.add_typer(keys_app, name="keys")
INTERRUPTED = 130  # typer's exit code for Ctrl-C
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept in the ledger.")]


class Here:
    """Where the command works, and how it fails."""

    path: Path | None = None
    debug = False


@app.callback()
def _global(
    path: Annotated[Path | None, typer.Option("-C", metavar="PATH", help="Work in the checkout at PATH, as git does.")] = None,
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
    from ratchet.demo import run_demo

    run_demo(_root(), until=only)


@app.command()
def up() -> None:
    """Start MLflow, Prefect, the served deployments and the gateway, on 127.0.0.1.

    Example: ratchet up
    """
    from ratchet.services import start_services

    root = _root()
    for service in start_services(root, _config(root), report=_say):
        _say(f"{service.name:12} {service.url or ''}")


@app.command()
def down() -> None:
    """Stop what `ratchet up` started here.

    Example: ratchet down
    """
    from ratchet.services import stop_services

    if not stop_services(_root(), report=_say):
        _say("nothing of this checkout runs")


@app.command()
def ingest(
    source: Annotated[str | None, typer.Option(help="pydoc, jsonl or feedback; otherwise what params.yaml says.")] = None,
    path: Annotated[str | None, typer.Option(help="File, glob or URL of JSON Lines.")] = None,
    packages: Annotated[str | None, typer.Option(help="Import names for pydoc, with commas.")] = None,
    golden: Annotated[int, typer.Option(min=0, metavar="ROWS", help="Freeze that many rows as the golden set instead.")] = 0,
    as_json: Json = False,
) -> None:
    """Pull rows into one immutable batch and commit it.

    Example: ratchet ingest --path 'exports/*.jsonl'
    """
    root = _ready()
    from flows.ingest import ingest as flow

    done = flow(root=str(root), source=source, path=path, packages=packages.split(",") if packages else None, golden=golden)
    news = f"{done['rows']} rows in {done['batch']}, commit {done['commit'][:8]}" if done["new"] else f"nothing new: these rows are batch {done['batch']}"
    _show(done, as_json, lambda: _say(news))


@app.command()
def retrain(
    reason: Reason = "by hand",
    force: Annotated[bool, typer.Option("--force", help="Compare with today's champion even when nothing else changed.")] = False,
    drift: Annotated[bool, typer.Option("--drift", help="Pull rows of the topics that the last verdict named, first.")] = False,
    as_json: Json = False,
) -> None:
    """Prepare, tokenize, train, evaluate, gate; what the gate lets through is promoted or rolled out.

    What did not change is skipped. Example: ratchet retrain --reason "March's tickets"
    """
    root = _ready()
    from flows.retrain import retrain as flow

    done = flow(root=str(root), reason=reason, force=force, topics=_drifted_topics(root) if drift else None)

    def tell() -> None:
        ran = [stage for stage, did in done["stages"].items() if did]
        _say(f"verdict: {done['verdict']} (v{done['version']}); in charge: {_version(done['champion'])}; ran: {', '.join(ran) or 'nothing, all unchanged'}")
        for line in [*done["reasons"], *done["regions"]]:
            _say(f"  {line}")

    _show(done, as_json, tell)


@app.command()
def status(as_json: Json = False) -> None:
    """Who is in charge, what the gate said last, what is new, what runs.

    Example: ratchet status
    """
    root = _root()
    from ratchet.status import describe, see_status

    found = see_status(root, _config(root))
    _show(found, as_json, lambda: _say("\n".join(describe(found))))


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
        raise UserError("--force without --reason", remedy="the ledger keeps why the gate was overruled: add --reason '…'")
    root = _ready()
    from flows.decide import promote_version

    _tell_champion(promote_version(root, _config(root), version, reason=reason, force=force, say=_note), as_json)


@app.command()
def rollback(reason: Reason = "by hand", as_json: Json = False) -> None:
    """Return to the version before, in one step; works with MLflow down.

    Example: ratchet rollback --reason "wrong answers about refunds"
    """
    root = _ready()
    from flows.decide import roll_back

    _tell_champion(roll_back(root, _config(root), reason=reason, say=_note), as_json)


@app.command()
def serve() -> None:
    """Answer on OpenAI's protocol with the champion, until Ctrl-C. `ratchet up` does it in the background.

    Example: ratchet serve
    """
    from ratchet.gateway.serve import serve as run

    root = _root()
    run(root, _config(root))


@app.command()
def monitor(
    only_look: Annotated[bool, typer.Option("--only-look", help="Start no retraining, whatever is found.")] = False,
    as_json: Json = False,
) -> None:
    """Compare the newest requests with what the champion was made for.

    Example: ratchet monitor
    """
    root = _ready()
    from flows.monitor import monitor as flow

    found = flow(root=str(root), retrain=not only_look)

    def tell() -> None:
        from ratchet.status import verdict_lines

        _say("\n".join(verdict_lines(found)))

    _show(found, as_json, tell)


@rollout_app.command("look")
def rollout_look(as_json: Json = False) -> None:
    """Look at the open rollout now, and act: what happens each minute by itself where `ratchet up` runs.

    Example: ratchet rollout look
    """
    root = _ready(clean=False)
    from flows.rollout import look_once

    _tell_rollout(look_once(root, _config(root), _note), as_json)


@rollout_app.command("status")
def rollout_show(as_json: Json = False) -> None:
    """The open rollout with its figures. Example: ratchet rollout status"""
    root = _root()
    from flows.rollout import rollout_status

    _tell_rollout(rollout_status(root, _config(root)), as_json)


@rollout_app.command("pause")
def rollout_pause(as_json: Json = False) -> None:
    """The champion answers everybody until it is resumed. Example: ratchet rollout pause"""
    root = _ready(clean=False)
    from flows.rollout import pause_rollout

    _tell_rollout(pause_rollout(root, _config(root), _note), as_json)


@rollout_app.command("resume")
def rollout_resume(as_json: Json = False) -> None:
    """Go on with a paused rollout. Example: ratchet rollout resume"""
    root = _ready(clean=False)
    from flows.rollout import resume_rollout

    _tell_rollout(resume_rollout(root, _config(root), _note), as_json)


@rollout_app.command("abort")
def rollout_abort(reason: Reason = "by hand", as_json: Json = False) -> None:
    """End the rollout; the champion stays. Example: ratchet rollout abort --reason "complaints" """
    root = _ready(clean=False)
    from flows.rollout import abort_rollout

    _tell_rollout(abort_rollout(root, _config(root), reason, _note), as_json)


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    scopes: Annotated[str, typer.Option(help="infer, feedback, admin, with commas.")] = "infer,feedback",
) -> None:
    """Make a key and show it, once. Example: ratchet keys add website"""
    from ratchet.gateway.keys import add_key

    _say(add_key(_root(), name, scopes.split(",")))


@keys_app.command("list")
def keys_list() -> None:
    """Names and scopes. Example: ratchet keys list"""
    from ratchet.gateway.keys import list_keys

    for key in list_keys(_root()):
        _say(f"{key.name:20} {','.join(key.scopes)}")


@keys_app.command("revoke")
def keys_revoke(name: Annotated[str, typer.Argument(help="Whose key it is.")]) -> None:
    """Refuse a key from now on. Example: ratchet keys revoke website"""
    from ratchet.gateway.keys import revoke_key

    revoke_key(_root(), name)
    _say(f"the key of {name} is refused from now on")


@app.command()
def report(path: Annotated[Path | None, typer.Option("--out", help="Where to write the page; otherwise .ratchet/report.html.")] = None) -> None:
    """Write one page with the champion, traffic, feedback, drift, rollout and ledger.

    Example: ratchet report --out report.html
    """
    from ratchet.page import write_page

    root = _root()
    _say(str(write_page(root, _config(root), path or root / ".ratchet/report.html")))


@app.command()
def history(as_json: Json = False) -> None:
    """The ledger: when, who, from, to, why, data, gate.

    Example: ratchet history
    """
    root = _root()
    from ratchet.status import ledger_lines, ledger_rows

    rows = ledger_rows(root)
    _show(rows, as_json, lambda: _say("\n".join(ledger_lines(rows))))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check versions, ports, disk, git, DVC and GPU, and say what to do.

    Example: ratchet doctor
    """
    from ratchet.doctor import examine

    try:
        root: Path | None = _root()
    except ConfigError:
        root = None
    findings = examine(root, _config(root) if root else None)
    marks = {True: "ok  ", False: "BAD ", None: "note"}

    def tell() -> None:
        for finding in findings:
            _say(f"{marks[finding.ok]} {finding.name:12} {finding.found}")
            if finding.ok is not True and finding.remedy:
                _say(f"     {'':12} → {finding.remedy}")

    _show([{"name": finding.name, "ok": finding.ok, "found": finding.found, "remedy": finding.remedy} for finding in findings], as_json, tell)
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
        _fail(f"{type(error).__name__}: {error}\n  → not foreseen; --debug before the command shows where: ratchet --debug …", 1)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            typer.secho("interrupted: finished stages are kept; run the command again", fg=typer.colors.RED, err=True)
        raise


def _interrupt(*_: object) -> None:
    """A plain SIGTERM would leave a running stage, and Prefect's server of one's own, behind."""
    raise KeyboardInterrupt


def _kind(error: RatchetError) -> str:
    return "error" if isinstance(error, UserError | StageError) else type(error).__name__


def _fail(message: str, code: int) -> None:
    typer.secho(message, fg=typer.colors.RED, err=True)
    sys.exit(code)


def _root() -> Path:
    """The checkout: -C, or the nearest folder upwards with a params.yaml. Raises ConfigError."""
    start = (Here.path or Path.cwd()).resolve()
    if not start.is_dir():
        raise ConfigError(f"{start} is no folder", remedy="name a checkout with -C PATH")
    for folder in [start] if Here.path else [start, *start.parents]:
        if (folder / "params.yaml").exists():
            return folder
    raise ConfigError(f"no params.yaml in {start}{'' if Here.path else ' or above'}", remedy="run the command in a clone of the project, or name one with -C PATH")


def _config(root: Path) -> Config:
    from ratchet.config import load_config

    return load_config(root / "params.yaml")


def _ready(*, clean: bool = True) -> Path:
    """The root, checked (`clean`: for what commits to it), and the environment that flows need: it has to stand before Prefect is imported."""
    from ratchet.environment import enter
    from ratchet.workspace import check_checkout

    root = _root()
    config = _config(root)
    if clean:
        check_checkout(root)
    enter(root, config)
    return root


def _show(found: Any, as_json: bool, tell: Callable[[], object]) -> None:
    if as_json:
        typer.echo(json.dumps(found, indent=2, default=str))
    else:
        tell()


def _drifted_topics(root: Path) -> list[dict[str, Any]]:
    """Raises UserError when the last verdict was not drift."""
    from ratchet.status import last_verdict

    found = last_verdict(root)
    if not found or found["verdict"] != "drift":
        raise UserError("the last verdict of the monitor is not drift", remedy="ratchet monitor looks at the newest requests; `ratchet retrain` needs no drift")
    return [{key: topic[key] for key in ("name", "terms", "share", "reference_share", "examples") if key in topic} for topic in found["topics"]]


def _tell_rollout(found: dict[str, Any], as_json: bool) -> None:
    from ratchet.status import rollout_lines

    _show(found, as_json, lambda: _say("\n".join(rollout_lines(found))))


def _tell_champion(champion: Any, as_json: bool) -> None:
    import msgspec

    _show(msgspec.to_builtins(champion), as_json, lambda: _say(f"in charge: v{champion.version} (before: {_version(champion.replaced)})"))


def _version(number: int | None) -> str:
    return f"v{number}" if number is not None else "nobody"


def _say(line: str) -> None:
    typer.echo(line)


def _note(line: str) -> None:
    """Progress, apart from results."""
    typer.secho(line, fg=typer.colors.BRIGHT_BLACK, err=True)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
