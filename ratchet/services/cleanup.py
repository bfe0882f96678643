"""Find and remove what a checkout can do without: failed workspaces, downloads, old logs, empty pages.

Nothing else is touched: data, versions, the ledger, the request log and what runs. What cleans itself: the
gateway drops versions that are not served, the request log old rows, Prefect old runs and events.
"""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from ratchet.pipeline.workspace import drop_workspace, failed_workspaces, running
from ratchet.services.supervisor import is_running

DATABASES = {"prefect": Path("prefect/prefect.db"), "mlflow": Path("mlflow/mlflow.db")}
LEAST_BYTES = 2**20  # of empty pages in a database that are worth a rewrite


class Leftover(NamedTuple):
    """What can go; `size` in bytes, `what` for people."""

    path: Path
    what: str
    size: int


def find_leftovers(root: Path) -> list[Leftover]:
    """List what can go, the largest first."""
    state = root / ".ratchet"
    found = [
        *(_leftover(path, "workspace of a run that failed") for path in failed_workspaces(root)),
        *(_leftover(path, "download of a base; `ratchet` fetches it again") for path in _bases(root)),
        *(_leftover(path, "log of an earlier start") for path in (state / "logs").glob("*.log.1")),
        *_empty_pages(root),
    ]
    return sorted(found, key=lambda one: (-one.size, one.path))


def remove(root: Path, leftover: Leftover) -> None:
    """Remove a leftover; of a database, only the empty pages. What has begun to be used meanwhile stays."""
    path = leftover.path
    if path in (root / ".ratchet" / place for place in DATABASES.values()):
        with suppress(sqlite3.OperationalError), closing(sqlite3.connect(path)) as database:
            database.execute("VACUUM")
    elif path.parent.name == "workspaces":
        drop_workspace(path)
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _bases(root: Path) -> list[Path]:
    """List the downloads of bases, none while a run may be reading one."""
    found = [] if running(root) else (root / ".ratchet/bases").glob("*")
    return [path for path in found if not path.name.startswith(".")]


def _empty_pages(root: Path) -> list[Leftover]:
    """List the databases of servers that do not run, with the bytes that deleted rows left in them."""
    found = []
    for name, place in DATABASES.items():
        path = root / ".ratchet" / place
        if not path.exists() or is_running(root, name):
            continue
        with (
            suppress(sqlite3.DatabaseError),
            closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as one,
        ):
            pages, size = (
                one.execute(f"PRAGMA {what}").fetchone()[0] for what in ("freelist_count", "page_size")
            )
            if pages * size >= LEAST_BYTES:
                found.append(Leftover(path, "empty pages in a database", pages * size))
    return found


def _leftover(path: Path, what: str) -> Leftover:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return Leftover(path, what, sum(one.lstat().st_size for one in files))
