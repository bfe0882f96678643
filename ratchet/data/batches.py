"""Immutable batches of raw rows under data/raw, each one file and one line of the manifest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import xxhash

from ratchet.errors import DataError
from ratchet.files import sha256_file, write_bytes

MANIFEST = "manifest.jsonl"
REVERTED = Path("data/reverted.jsonl")  # in git, so that a version's commit shows which reverts came later
UNSAFE = re.compile(r"[^a-z0-9]+")


class Original(msgspec.Struct, frozen=True):
    """An input file, as it was found; of the batch's rows, in file order, `rows` came from it."""

    name: str  # without folders
    format: str
    sha256: str
    rows: int


class Batch(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the manifest.

    `time` is UTC, ISO 8601; `content` is the hash of the rows, by which a repeated ingest is recognised.
    `columns`: key of the rows → column of the files; `query`: the SQL that a database was asked.
    """

    name: str
    rows: int
    sha256: str
    content: str
    source: str
    time: str
    licence: str
    who: str
    form: str = "auto"
    files: tuple[Original, ...] = ()
    columns: dict[str, str] = {}
    query: str = ""


class Reverted(msgspec.Struct, frozen=True):
    """One batch that was taken back. `came` is the commit that added it, empty if git cannot tell.

    `at` is UTC, ISO 8601.
    """

    batch: str
    rows: int
    came: str
    reason: str
    by: str
    at: str


def read_manifest(raw: Path) -> list[Batch]:
    """Read the batches in the order of their arrival. Raises DataError for a line that is no entry."""
    path = raw / MANIFEST
    if not path.exists():
        return []
    try:
        return [msgspec.json.decode(line, type=Batch) for line in path.read_bytes().split(b"\n") if line]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} holds a line that is no manifest entry: {error}",
            remedy="restore it: git checkout data/raw.dvc && dvc checkout data/raw.dvc",
        ) from None


def check_batch(raw: Path, batch: Batch) -> Path:
    """Return the batch's file if its hash is that in the manifest; DVC does not check it on checkout.

    Raises DataError.
    """
    path = raw / batch.name
    if not path.exists():
        raise DataError(
            f"{path} is missing; the manifest lists it with {batch.rows} rows",
            remedy="dvc pull, or dvc checkout data/raw.dvc",
        )
    seen = sha256_file(path)
    if seen != batch.sha256:
        raise DataError(
            f"{path} has sha256 {seen[:12]}…, the manifest says {batch.sha256[:12]}…: a batch is immutable",
            remedy="restore it: rm the file, then dvc pull or dvc checkout data/raw.dvc",
        )
    return path


def content_hash(lines: Iterable[bytes]) -> str:
    hasher = xxhash.xxh3_128()
    for line in lines:
        hasher.update(line + b"\n")
    return hasher.hexdigest()


def write_batch(
    raw: Path,
    lines: list[bytes],
    *,
    source: str,
    label: str,
    time: str,
    licence: str,
    who: str,
    form: str,
    files: tuple[Original, ...] = (),
    columns: dict[str, str] | None = None,
    query: str = "",
) -> Batch:
    """Write the batch's file, then its manifest line, so that every listed batch has its file.

    `label` becomes part of the file's name, so that people recognise the batch.
    """
    content = content_hash(lines)
    stamp = re.sub(r"[^0-9TZ]", "", time)
    name = f"{stamp}-{UNSAFE.sub('-', label.lower()).strip('-')[:40] or source}-{content[:8]}.jsonl"
    write_bytes(raw / name, (line + b"\n" for line in lines))
    hashed = sha256_file(raw / name)
    batch = Batch(
        *(name, len(lines), hashed, content, source, time, licence, who, form, files, columns or {}, query)
    )
    earlier = [msgspec.json.encode(entry) + b"\n" for entry in read_manifest(raw)]
    write_bytes(raw / MANIFEST, [*earlier, msgspec.json.encode(batch) + b"\n"])
    return batch


def take_back(raw: Path, batch: Batch) -> None:
    """Remove a batch's manifest line, then its file; other batches stay unchanged."""
    kept = [msgspec.json.encode(entry) + b"\n" for entry in read_manifest(raw) if entry.name != batch.name]
    write_bytes(raw / MANIFEST, kept)
    (raw / batch.name).unlink(missing_ok=True)


def decode_reverted(raw: bytes) -> list[Reverted]:
    """Read the list of batches that were taken back. Raises DataError for a line that is no entry."""
    try:
        return [msgspec.json.decode(line, type=Reverted) for line in raw.split(b"\n") if line.strip()]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{REVERTED} holds a line that is no entry: {error}",
            remedy=f"restore it: git checkout {REVERTED}",
        ) from None


def read_reverted(root: Path) -> list[Reverted]:
    path = root / REVERTED
    return decode_reverted(path.read_bytes()) if path.exists() else []


def write_reverted(root: Path, entries: Iterable[Reverted]) -> None:
    write_bytes(root / REVERTED, (msgspec.json.encode(entry) + b"\n" for entry in entries))


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line without its end) of a batch's file."""
    with path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            yield number, line.rstrip(b"\n")
