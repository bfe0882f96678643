"""The command `ratchet`. It reads arguments and prints; the work is done in flows, tasks and services.

Heavy modules are imported inside the commands, so that `ratchet --help` answers at once.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from ratchet.cli import data, federation, gate, loop, promotion, review, services, training
from ratchet.cli.context import Here, add_old_name
from ratchet.cli.export import export
from ratchet.cli.retention import retention
from ratchet.errors import RatchetError, StageError, UserError
from ratchet.exhaustion import explain

app = typer.Typer(
    name="ratchet",
    help="Keeps a fine-tuned language model fresh: new data in, a gated and traceable model out."
    "\n\nStart with: ratchet demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
INTERRUPTED = 130  # typer's exit code for Ctrl-C


@app.callback()
def _global(
    path: Annotated[
        Path | None, typer.Option("-C", metavar="PATH", help="Work in the checkout at PATH, as git does.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    Here.path, Here.debug = path, debug


for command in (
    *(services.init, services.params),
    *(loop.demo, services.up, services.down, loop.ingest, loop.synthesize, loop.retrain, loop.monitor),
    *(training.base, training.plan, training.changes, training.sweep, training.compare, training.privacy),
    *(retention, export),
    *(promotion.promote, promotion.rollback, promotion.history),
    *(services.serve, services.worker, services.status, services.verify),
    *(services.clean, services.report, services.doctor),
    *(services.backup, services.restore),
):
    app.command()(command)
add_old_name(app, "ledger", "retention", retention)
app.add_typer(promotion.rollout, name="rollout")
app.add_typer(services.keys, name="keys")
app.add_typer(services.storage, name="storage")
app.add_typer(gate.app, name="gate")
app.add_typer(review.app, name="review")
app.add_typer(data.app, name="data")
app.add_typer(federation.app, name="federate")


def main() -> None:
    """Run the command; print an error as one message, and exit with its code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except RatchetError as error:
        if Here.debug:
            raise
        told = explain(error) or error
        _fail(f"{_kind(told)}: {told}", told.exit_code)
    except Exception as error:  # the last resort: a bug, ours or a library's, also ends in one message
        if Here.debug:
            raise
        if known := explain(error):
            _fail(f"{_kind(known)}: {known}", known.exit_code)
        remedy = "not foreseen; --debug before the command shows where: ratchet --debug …"
        _fail(f"{type(error).__name__}: {error}\n  → {remedy}", 1)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            typer.secho(
                "interrupted: finished stages are kept; run the command again", fg=typer.colors.RED, err=True
            )
        raise


def _interrupt(*_: object) -> None:
    """End as on Ctrl-C; a plain SIGTERM would leave a running stage and Prefect's temporary server behind."""
    raise KeyboardInterrupt


def _kind(error: RatchetError) -> str:
    return "error" if isinstance(error, UserError | StageError) else type(error).__name__


def _fail(message: str, code: int) -> None:
    typer.secho(message, fg=typer.colors.RED, err=True)
    sys.exit(code)
