"""Find what of `.ratchet` a backup needs, and copy its databases while services write to them."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote

from ratchet.backup.archive import Packer
from ratchet.errors import DamagedError

HOME = Path(".ratchet")
STATE = "state"  # its folder in an archive
SQLITE = b"SQLite format 3\0"
WAIT_SECONDS = 30.0  # for a database that another process has locked
# What is left out, as patterns below .ratchet: it is made anew, or belongs to this machine.
DERIVED = (
    *("workspaces", "serving", "monitor/reference-*", "evaluations", "report.html"),
    *("cache/answers", "checkpoints", "bases", "prepare", "personal", "compare", "demo"),
    *("locks", "run", "logs", "prefect", "arriving", "landing"),
)
SECRET = ("gateway.key", "federation")
PASSING = ("*.lock", ".*.tmp", "*.db-wal", "*.db-shm", "*.db-journal")  # names of files, anywhere


def pack_state(root: Path, packer: Packer) -> None:
    """Pack the state under `STATE`. Raises DamagedError for a database that cannot be read."""
    for path in state_files(root):
        name = f"{STATE}/{path.relative_to(root / HOME).as_posix()}"
        with suppress(FileNotFoundError):  # a service has just removed it
            if _is_database(path):
                copy = _copy_database(path, packer.scratch / "database")
                packer.add(copy, name)
                copy.unlink()
            else:
                packer.add(path, name)


def secrets_of(root: Path) -> list[str]:
    """List the secrets that there are; they stay out of a backup."""
    return [f"{HOME}/{name}" for name in SECRET if (root / HOME / name).exists()]


def state_files(root: Path) -> Iterator[Path]:
    """Yield the files of `.ratchet` that no run makes anew, by name. Links to folders are followed."""
    home, seen = root / HOME, set[str]()
    for folder, inner, names in os.walk(home, followlinks=True):
        here = Path(folder)
        if os.path.realpath(here) in seen:
            inner.clear()
            continue
        seen.add(os.path.realpath(here))
        inner[:] = sorted(name for name in inner if not _stays_out(home, here / name))
        for name in sorted(names):
            if not _stays_out(home, here / name) and (here / name).is_file():
                yield here / name


def _stays_out(home: Path, path: Path) -> bool:
    inside = path.relative_to(home).as_posix()
    return any(fnmatch(inside, pattern) for pattern in (*DERIVED, *SECRET)) or any(
        fnmatch(path.name, pattern) for pattern in PASSING
    )


def _is_database(path: Path) -> bool:
    with path.open("rb") as content:
        return content.read(len(SQLITE)) == SQLITE


def _copy_database(path: Path, copy: Path) -> Path:
    """Copy a SQLite database as it is at one moment; its writers go on. Raises DamagedError."""
    try:
        with (
            closing(sqlite3.connect(f"file:{quote(str(path))}?mode=rw", WAIT_SECONDS, uri=True)) as source,
            closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
            (found,) = target.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        found = str(error)
    if found != "ok":
        raise DamagedError(
            f"the database {path} cannot be copied: {found}",
            remedy=f"sqlite3 {path} .recover, or move it away: the services make an empty one",
        )
    return copy
