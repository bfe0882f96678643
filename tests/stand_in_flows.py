"""Write flows that only sleep into a folder, with the project's own deployments of them."""

from __future__ import annotations

import shutil
from pathlib import Path

RETRAIN = """
import subprocess
from prefect import flow

@flow(name="retrain", flow_run_name="{reason}")
def retrain(
    root: str | None = None, reason: str = "by hand", force: bool = False, topics: list | None = None
) -> dict:
    subprocess.run(["sleep", "300"], check=True)
    return {}
"""
INGEST = """
from prefect import flow

@flow(name="ingest")
def ingest(
    root: str | None = None,
    source: str | None = None,
    path: str | None = None,
    packages: list[str] | None = None,
) -> dict:
    return {}
"""
LOOK = """
from prefect import flow

@flow(name="{name}")
def {name}(root: str | None = None) -> dict:
    return {{}}
"""


def write_flows(root: Path) -> None:
    (root / "flows").mkdir(parents=True)
    stand_ins = {
        "__init__": "",
        "retrain": RETRAIN,
        "ingest": INGEST,
        "monitor": LOOK.format(name="monitor"),
        "rollout": LOOK.format(name="rollout"),
        "synthesize": LOOK.format(name="synthesize"),
    }
    for name, text in stand_ins.items():
        (root / "flows" / f"{name}.py").write_text(text)
    for name in ("deployments", "events", "rollout_watcher"):
        shutil.copy(Path(__file__).parents[1] / "flows" / f"{name}.py", root / "flows")
