"""`ratchet retention`: what each version still knows."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from ratchet.cli.context import Json, find_root, note, read_config, show

if TYPE_CHECKING:
    from pathlib import Path

    from ratchet.config.params import Config
    from ratchet.reporting.retention import Retention


def retention(
    metric: Annotated[str, typer.Option("--metric", help="A score a row; otherwise `gate.metric`.")] = "",
    fill: Annotated[
        bool,
        typer.Option(
            "--fill",
            help="Ask old versions the rows that came after them; takes an evaluation's time for each, once.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what each version still knows: its score on the test rows of every batch and on the golden set.

    Example: ratchet retention --fill
    """
    from ratchet.reporting.terminal import print_retention

    root = find_root()
    config = read_config(root)
    found = read(root, config, metric or config.gate.metric, fill=fill)
    show(found, as_json, lambda: print_retention(found))


def read(root: Path, config: Config, metric: str, *, fill: bool = False) -> Retention:
    """Build the table from git and DVC; MLflow, if it answers, gives the numbers of other versions."""
    from ratchet.errors import UserError
    from ratchet.files import write_json
    from ratchet.reporting.retention import SAVED, build, read_evaluations

    numbers, evaluations = known_numbers(root, config), read_evaluations(root)
    found = build(root, metric, numbers, evaluations)
    if fill and evaluations:
        from tasks.retention import fill as fill_cells

        with redirect_stdout(sys.stderr):  # progress goes to stderr; only the table is the result
            filled = fill_cells(root, found, evaluations[0], config, note)
        note(f"{filled} cells filled")
        found = build(root, metric, numbers, evaluations)
    if evaluations and not found.versions:
        raise UserError(
            f"no evaluation that landed tells of {metric}: {next(iter(found.faults), 'none can be read')}",
            remedy=f"params.yaml asks for {', '.join(config.evaluate.row_scores)}",
        )
    if metric == config.gate.metric:
        write_json(root / SAVED, msgspec.to_builtins(found))  # for the dashboard
    return found


def known_numbers(root: Path, config: Config) -> dict[str, int]:
    from ratchet.reporting.retention import numbers_of, registered_numbers

    numbers = numbers_of(root)
    if _mlflow_answers(root, config):
        from ratchet.errors import ServiceError

        try:
            numbers = {**registered_numbers(config.project.name), **numbers}
        except ServiceError as error:
            note(str(error).splitlines()[0])
    else:
        note("MLflow is not running: versions that were never in charge have no number here")
    return numbers


def _mlflow_answers(root: Path, config: Config) -> bool:
    from ratchet.services.environment import enter
    from ratchet.services.supervisor import list_services

    enter(root, config)
    return any(service.name == "mlflow" and service.answers for service in list_services(root, config))
