"""Immutable batches of raw rows under data/raw, each one file and one line of the manifest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import xxhash

from ratchet.errors import DataError
from ratchet.files import sha256_file, write_bytes
from ratchet.media.names import is_sound

if TYPE_CHECKING:
    from ratchet.media.store import MediaStore

MANIFEST = "manifest.jsonl"
REVERTED = Path("data/reverted.jsonl")  # in git, so that a version's commit shows which reverts came later
REFERENCE = re.compile(rb'"media:([0-9a-f]{64}\.(?:png|jpg|flac))"')
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
    `columns`: key of the rows → column of the files; `query`: the SQL that a database was asked. `media`:
    sha256 of the tar of pictures and recordings beside the rows, empty where no row has any; `pictures` and
    `sounds`: their numbers. `held_out`: every row is a test row and none is ever learned; `like`: the batch
    whose test rows they count among, empty where they stand for themselves.
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
    media: str = ""
    pictures: int = 0
    sounds: int = 0
    held_out: bool = False
    like: str = ""

    @property
    def shard(self) -> str:
        """Return the name of the tar with the rows' pictures and recordings."""
        return f"{self.name.removesuffix('.jsonl')}.tar"


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
    """Return the batch's file if its hash, and that of its media, are those in the manifest.

    DVC does not check them on checkout. Raises DataError.
    """
    _check_file(raw / batch.name, batch.sha256, f"{batch.rows} rows")
    if batch.media:
        _check_file(
            raw / batch.shard, batch.media, f"{batch.pictures} pictures and {batch.sounds} recordings"
        )
    return raw / batch.name


def _check_file(path: Path, sha256: str, what: str) -> None:
    if not path.exists():
        raise DataError(
            f"{path} is missing; the manifest lists it with {what}",
            remedy="dvc pull, or dvc checkout data/raw.dvc",
        )
    seen = sha256_file(path)
    if seen != sha256:
        raise DataError(
            f"{path} has sha256 {seen[:12]}…, the manifest says {sha256[:12]}…: a batch is immutable",
            remedy="restore it: rm the file, then dvc pull or dvc checkout data/raw.dvc",
        )


def batch_media(raw: Path, batch: Batch) -> MediaStore:
    """Return the pictures and recordings of a batch. Raises DataError for a tar that is none."""
    from ratchet.media.store import MediaStore  # with Pillow: what only reads the manifest goes without

    return MediaStore([raw / batch.shard] if batch.media else [])


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
    media: Mapping[str, bytes] | None = None,
    held_out: bool = False,
    like: str = "",
) -> Batch:
    """Write the batch's files, then its manifest line, so that every listed batch has its files.

    `label` becomes part of the files' names, so that people recognise the batch. Of the pictures in `media`,
    those are written to which the rows refer.
    """
    content = content_hash(lines)
    stamp = re.sub(r"[^0-9TZ]", "", time)
    name = f"{stamp}-{UNSAFE.sub('-', label.lower()).strip('-')[:40] or source}-{content[:8]}.jsonl"
    write_bytes(raw / name, (line + b"\n" for line in lines))
    hashed = sha256_file(raw / name)
    batch = Batch(
        *(name, len(lines), hashed, content, source, time, licence, who, form, files, columns or {}, query),
        held_out=held_out,
        like=like,
    )
    if shown := {picture for line in lines for picture in pictures_in(line) if picture in (media or {})}:
        from ratchet.media.store import write_shard

        write_shard(raw / batch.shard, media or {}, shown)
        sounds = sum(map(is_sound, shown))
        batch = msgspec.structs.replace(
            batch, media=sha256_file(raw / batch.shard), pictures=len(shown) - sounds, sounds=sounds
        )
    earlier = [msgspec.json.encode(entry) + b"\n" for entry in read_manifest(raw)]
    write_bytes(raw / MANIFEST, [*earlier, msgspec.json.encode(batch) + b"\n"])
    return batch


def take_back(raw: Path, batch: Batch) -> None:
    """Remove a batch's manifest line, then its files; other batches stay unchanged."""
    kept = [msgspec.json.encode(entry) + b"\n" for entry in read_manifest(raw) if entry.name != batch.name]
    write_bytes(raw / MANIFEST, kept)
    (raw / batch.name).unlink(missing_ok=True)
    (raw / batch.shard).unlink(missing_ok=True)


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


def pictures_in(line: bytes) -> list[str]:
    """Return the names of the pictures and recordings to which a stored row refers."""
    return [name.decode() for name in REFERENCE.findall(line)]


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line without its end) of a batch's file."""
    with path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            yield number, line.rstrip(b"\n")
