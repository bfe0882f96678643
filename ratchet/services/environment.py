"""The variables under which flows run in this process; they have to stand before Prefect or MLflow is imported."""

from __future__ import annotations

import os
from pathlib import Path

from ratchet.config.params import Config
from ratchet.services.supervisor import service_environment

# Flows print their own lines (flows/console.py); of Prefect's console log people get what is wrong, and MLflow's stays out of stdout.
CONSOLE = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "RATCHET_CONSOLE": "1",
}


def enter(root: Path, config: Config) -> None:
    """Set them. A variable of the user's that names another server wins."""
    for name, value in CONSOLE.items():
        os.environ.setdefault(name, value)
    os.environ.update(service_environment(root, config), RATCHET_ROOT=str(root))
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)  # Prefect makes the last folder only
