"""Nothing that was killed left anything behind: no process, workspace, run or half-written file."""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

from ratchet.config.params import Config
from ratchet.errors import ServiceError
from ratchet.pipeline.checkout import dvc, git
from ratchet.pipeline.workspace import LANDING, WORKSPACES, failed_workspaces, purpose_of, running
from ratchet.services.environment import mlflow_answers
from ratchet.tracking.mlflow import running_runs
from ratchet.verification.finding import Finding, judge

KEPT = ("retrain", "ingest")  # purposes whose failed workspaces are kept for inspection
YOUNG_SECONDS = 60.0  # a file that is being written has such a name as well
HALF = (".*.tmp", "data/.*.tmp", "models/.*.tmp", "reports/.*.tmp", ".ratchet/**/.*.tmp")


def find_processes(root: Path, config: Config) -> Finding:
    """Check that no process works on in a workspace whose run is gone."""
    left = {path.resolve() for path in failed_workspaces(root)}
    faults = []
    for process in psutil.process_iter(["pid", "name", "cwd"]):
        with suppress(TypeError, OSError):  # no folder: another user's, or ended
            folder = Path(process.info["cwd"]).resolve()
            if left & {folder, *folder.parents}:
                faults.append(f"process {process.info['pid']} ({process.info['name']}) in {folder.name}")
    return judge("processes", "none is left", faults, "none", "it ends within a minute; else kill it")


def find_workspaces(root: Path, config: Config) -> Finding:
    """Check that no workspaces are left but those that are kept for inspection."""
    found = failed_workspaces(root)
    counts = Counter(purpose_of(path) for path in found)
    allowed = dict.fromkeys(KEPT, config.retrain.keep_workspaces)
    faults = [
        f"{count} of {purpose or 'unknown'}"
        for purpose, count in counts.items()
        if count > allowed.get(purpose, 0)
    ]
    wanted = f"at most {config.retrain.keep_workspaces} each of {' and '.join(KEPT)}"
    names = " ".join(str(path.relative_to(root)) for path in found if purpose_of(path) not in KEPT)
    remedy = f"rm -rf {names}" if names else "the next run of that kind removes the oldest"
    return judge("workspaces", f"{len(found)} are kept for inspection", faults, wanted, remedy)


def find_runs(root: Path, config: Config) -> Finding:
    """Check that no run is RUNNING in MLflow unless a retraining is under way."""
    if any(purpose == "retrain" for purpose, _ in running(root)):
        return Finding("runs", "unknown", "a retraining is under way")
    away = not mlflow_answers()
    try:
        left = [] if away else running_runs(config.project.name)
    except ServiceError:
        away = True
    if away:
        return Finding("runs", "unknown", "MLflow does not answer")
    faults = [f"run {run.info.run_id} is RUNNING" for run in left]
    return judge("runs", "none is RUNNING", faults, "none", "the next ratchet retrain closes them as KILLED")


def find_half_written(root: Path, config: Config) -> Finding:
    """Check that no half-written file, cut landing or lock of git is left."""
    paths = {path for pattern in HALF for path in root.glob(pattern) if WORKSPACES.name not in path.parts}
    paths |= {root / ".git/index.lock"}
    old = sorted(path for path in paths if _age(path) > YOUNG_SECONDS)
    faults = [str(path.relative_to(root)) for path in old]
    remedies = [f"rm -r {' '.join(faults[:3])}"] if faults else []
    if _age(root / LANDING) > YOUNG_SECONDS:
        faults.append("a landing that was cut")
        remedies.append("any other command brings its data")
    return judge("half-written", "nothing", faults, "nothing", "; ".join(remedies))


def find_checkout(root: Path, config: Config) -> Finding:
    """Check that git and DVC see no change of what is committed."""
    faults = git(root, "status", "--porcelain", "--untracked-files=no").splitlines()
    for name, changes in json.loads(dvc(root, "status", "--json")).items():
        for change in changes if name.endswith(".dvc") or name != "code" else []:
            outs = change.get("changed outs", {}) if isinstance(change, dict) else {}
            faults += [f"{path} is {how}" for path, how in outs.items() if how != "deleted"]
    return judge("checkout", "clean", faults, "clean", "git status; dvc status; then commit, or dvc checkout")


def _age(path: Path) -> float:
    """Return how old it is in seconds, 0 if it is not there."""
    try:
        return time.time() - path.lstat().st_mtime
    except OSError:
        return 0.0
