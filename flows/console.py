"""Write progress into Prefect's log, and to the console when a person started the flow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from prefect import get_run_logger
from rich.console import Console
from rich.markup import escape

console = Console(stderr=True, highlight=False, soft_wrap=True)  # results go to stdout, progress does not


def log_line(line: str) -> None:
    """Write only into Prefect's log: lines that a command prints as its result must not appear twice."""
    get_run_logger().info(line)


def say(line: str) -> None:
    log_line(line)
    if "RATCHET_CONSOLE" in os.environ:
        console.print(f"[dim]{datetime.now():%H:%M:%S}[/dim]  {escape(line)}")


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner under the lines while a long step runs, only on a terminal."""
    if "RATCHET_CONSOLE" in os.environ and console.is_terminal:
        with console.status(what):
            yield
    else:
        yield
