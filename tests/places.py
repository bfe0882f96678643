"""Make the places where tests work: a small repository with git and DVC, and an MLflow store in SQLite.

Both are real, made once a process and copied for each test.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest

from ratchet.pipeline.checkout import dvc, git

# MLflow keeps its SQLite connections until the process ends; from Python 3.13 on sqlite3 warns of that.
KEPT_CONNECTIONS = "ignore:unclosed database:ResourceWarning"


def make_repository(path: Path, files: dict[str, str] | None = None) -> Path:
    """A checkout on `main`, clean, with DVC, a params.yaml and `files`, all in one or two commits by Ana."""
    shutil.copytree(_repository(), path)
    if files:
        write_files(path, files)
        commit(path, "Add files")
    return path


def write_files(path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text, encoding="utf-8")


def commit(path: Path, message: str) -> str:
    git(path, "add", "--all")
    git(path, "commit", "--quiet", "--message", message)
    return git(path, "rev-parse", "HEAD").strip()


def flip(path: Path, *, at: int = 3) -> None:
    """Flip a bit as a disk would: time, size and mode stay."""
    path = path.resolve()
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def subjects(path: Path) -> list[str]:
    """Of the checkout's commits, the newest first."""
    return git(path, "log", "--format=%s").splitlines()


def use_git_without_a_user(patch: pytest.MonkeyPatch) -> None:
    """Whatever the machine's own configuration says; the small repository brings its user along."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        patch.delenv(name)
    patch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    patch.setenv("GIT_CONFIG_SYSTEM", os.devnull)


def use_mlflow(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """A fresh store in `folder`, and this as the working directory: MLflow puts its artifacts there."""
    shutil.copy(_store(), folder / "mlflow.db")
    patch.chdir(folder)
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def use_no_mlflow(patch: pytest.MonkeyPatch) -> None:
    """A port on which nothing listens, and no second try."""
    patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@cache
def _repository() -> Path:
    path = _folder() / "repository"
    path.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        use_git_without_a_user(patch)
        git(path, "init", "--quiet", "--initial-branch", "main")
        git(path, "config", "user.name", "Ana")
        git(path, "config", "user.email", "ana@example.org")
        dvc(path, "init", "--quiet")
        write_files(path, {".gitignore": ".ratchet/\n", "params.yaml": "project:\n  name: small\n"})
        commit(path, "Start")
    return path


@cache
def _store() -> Path:
    """Its tables take seconds to make."""
    path = _folder() / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def _folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="ratchet-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path
