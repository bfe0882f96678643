"""One line of progress: into Prefect's log, and to the console where a person started the flow."""

from __future__ import annotations

import os
import sys
from datetime import datetime

from prefect import get_run_logger


def say(line: str) -> None:
    get_run_logger().info(line)
    if "RATCHET_CONSOLE" in os.environ:
        print(f"{datetime.now():%H:%M:%S}  {line}", file=sys.stderr, flush=True)  # noqa: T201  (results go to stdout, progress does not)
