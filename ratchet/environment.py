"""The variables under which flows run in this process; they have to stand before Prefect or MLflow is imported."""

from __future__ import annotations

import os
from pathlib import Path

from ratchet.config import Config
from ratchet.services import service_environment

# People read the console, Prefect keeps the whole record: time and message are enough there.
CONSOLE = {
    "PREFECT_LOGGING_FORMATTERS_STANDARD_FLOW_RUN_FMT": "%(asctime)s  %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT": "%(asctime)s    %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_DATEFMT": "%H:%M:%S",
}


def enter(root: Path, config: Config) -> None:
    """Set them. A variable of the user's that names another server wins."""
    for name, value in CONSOLE.items():
        os.environ.setdefault(name, value)
    os.environ.update(service_environment(root, config), RATCHET_ROOT=str(root))
