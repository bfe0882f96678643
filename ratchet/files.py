"""Write files and folders completely or not at all, read JSON, hash files, and check the free disk space."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ratchet.errors import DiskSpaceError, RatchetError

ROOM = (
    "free some room: `ratchet clean` shows and removes what a project can do without, "
    "`dvc gc --workspace --all-commits` data that no commit names"
)


def write_bytes(path: Path, chunks: Iterable[bytes]) -> None:
    """Write to a temporary name beside `path`, sync, rename: a reader sees the old file or the new one.

    Raises DiskSpaceError for any failure to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as out:
            for chunk in chunks:
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DiskSpaceError(
            f"cannot write {path}: {error.strerror or error}; {describe_room(path)}",
            remedy=f"{ROOM}; nothing was changed",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_private(path: Path, data: bytes) -> None:
    """Write the file completely or not at all, readable by its owner only; it outlasts a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, [text.encode("utf-8")])


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, so that equal values give equal bytes. Raises ValueError for NaN."""
    write_bytes(path, [to_json(value)])


def to_json(value: Any) -> bytes:
    """Return JSON with sorted keys and a final newline, in UTF-8. Raises ValueError for NaN."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    return f"{text}\n".encode()


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RatchetError(
            f"{path} does not exist", remedy="the stage that writes it has not run; `ratchet retrain` runs it"
        ) from None
    except ValueError as error:
        raise RatchetError(f"{path} is no valid JSON: {error}") from None


def sha256_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; it replaces `path` if the block succeeds, and is removed if it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    filling = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    filling.mkdir()
    try:
        yield filling
        shutil.rmtree(path, ignore_errors=True)
        filling.replace(path)
    finally:
        shutil.rmtree(filling, ignore_errors=True)


def describe_room(path: Path) -> str:
    """Say how much is free at `path`, or at the nearest folder above it that exists."""
    folder = next((one for one in (path, *path.parents) if one.is_dir()), Path("/"))
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free at {folder}"
    except OSError as error:
        return f"how much is free at {folder} is unknown: {error.strerror or error}"


def own_files(folder: Path) -> None:
    """Make every file below `folder` its own: a link that leads to a file becomes a hard link to its bytes,
    or a copy where that file is on another filesystem.

    A file keeps its name throughout, so a reader never misses it. A link that leads nowhere stays. Raises
    DiskSpaceError.
    """
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink() or not path.is_file():
            continue
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            _link_or_copy(path.resolve(), temporary)
            temporary.replace(path)
        except OSError as error:
            raise DiskSpaceError(
                f"cannot write {path}: {error.strerror or error}",
                remedy="free some room; nothing was changed",
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another filesystem, or one without hard links
        shutil.copy2(source, target)


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise DiskSpaceError before anything is written, when `folder` has less than `needed_bytes` free."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DiskSpaceError(
            f"{what} needs about {needed_bytes / 2**20:,.0f} MiB at {folder}, {free / 2**20:,.0f} MiB are "
            "free",
            remedy=f"{ROOM}, then run again; finished stages are kept",
        )
