"""Pack files into one archive with the sha256 of each, and unpack an archive only where all of them hold.

The archive is a gzipped tar, so `tar` reads it as well. Its manifest is the last member: an archive without
one was cut off.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import msgspec

from ratchet.errors import DamagedError, DiskSpaceError, UserError
from ratchet.files import to_json

MANIFEST = "manifest.json"
FORMAT = 1
CHUNK = 2**20  # bytes read at a time
LEVEL = 1  # gzip's fastest: weights hardly shrink, rows and databases do
ANOTHER = "take another copy of the archive; nothing was put in place"


class Remote(msgspec.Struct, frozen=True):
    """DVC's default remote; `url` is absolute and without a password."""

    name: str
    url: str


class Manifest(msgspec.Struct, frozen=True):
    """What an archive holds, and what it does not."""

    project: str
    at: str  # UTC
    branch: str
    commit: str
    versions: list[int]  # all that were ever in charge
    champion: int | None
    git_remotes: dict[str, str]  # name → URL without a password
    data_remote: Remote | None
    left_out: list[str]
    missing: list[str]  # data that history names, and that were nowhere to be had
    files: dict[str, str] = {}  # name of a member → its sha256
    format: int = FORMAT


class Packer:
    """Add files to an open archive; `scratch` is a folder for files that are made to be added."""

    def __init__(self, tar: tarfile.TarFile, scratch: Path) -> None:
        self._tar, self.scratch = tar, scratch
        self._hashes: dict[str, str] = {}

    def add(self, path: Path, name: str, *, md5: str = "") -> None:
        """Add a file as it is now; what is appended to it meanwhile stays out.

        Raises DamagedError if its content has another md5 than the one given.
        """
        with path.open("rb") as content:
            status = os.fstat(content.fileno())
            reader = _HashingReader(content, md5)
            self._write(name, status.st_size, status.st_mode & 0o777, reader)
        if md5 and (seen := reader.md5.hexdigest()) != md5:
            raise DamagedError(
                f"{path} has md5 {seen}, wanted {md5}",
                remedy=f"rm -f {path}, then `dvc pull`, or run the backup again without it: it is then "
                "among what is missing",
            )
        self._hashes[name] = reader.sha256.hexdigest()

    def finish(self, manifest: Manifest) -> Manifest:
        """Write the manifest with the hash of every file, and return it."""
        whole = msgspec.structs.replace(manifest, files=self._hashes)
        content = to_json(msgspec.to_builtins(whole))
        (self.scratch / MANIFEST).write_bytes(content)
        with (self.scratch / MANIFEST).open("rb") as reader:
            self._write(MANIFEST, len(content), 0o600, _HashingReader(reader, ""))
        return whole

    def _write(self, name: str, size: int, mode: int, reader: _HashingReader) -> None:
        member = tarfile.TarInfo(name)  # no times, no names of users
        member.size, member.mode = size, mode
        self._tar.addfile(member, reader)


class _HashingReader:
    """Read a file, and hash what is read."""

    def __init__(self, content: IO[bytes], md5: str) -> None:
        self._content, self._with_md5 = content, bool(md5)
        self.sha256, self.md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)

    def read(self, size: int = -1, /) -> bytes:
        chunk = self._content.read(size)
        self.sha256.update(chunk)
        if self._with_md5:
            self.md5.update(chunk)
        return chunk


@contextmanager
def packing(path: Path) -> Iterator[Packer]:
    """Write an archive, readable by its owner alone; the file appears when the block ends without an error.

    Raises UserError: there is a file of that name; DiskSpaceError.
    """
    _require_new(path)
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder", remedy=f"mkdir -p {path.parent}")
    with _scratch_beside(path) as scratch:
        made = scratch / "archive"
        with (
            os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out,
            gzip.GzipFile("", "wb", LEVEL, out, mtime=0) as compressed,
            tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            yield Packer(tar, scratch)
        with made.open("rb") as written:
            os.fsync(written.fileno())
        _require_new(path)
        made.replace(path)


@contextmanager
def _scratch_beside(path: Path) -> Iterator[Path]:
    """Yield a folder of a hidden name, for the owner alone, on the same filesystem; it is removed."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as made:
            yield Path(made)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DiskSpaceError(
            f"cannot write {path}: {error.strerror or error}", remedy="free some room; nothing was changed"
        ) from error


def _require_new(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise UserError(
            f"{path} exists", remedy="give the backup another name, such as one with today's date"
        )


class Unpacked(NamedTuple):
    """An archive's files below `folder`, all with the hashes of the manifest."""

    manifest: Manifest
    folder: Path
    scratch: Path  # beside what is to be made of them; removed at the end


@contextmanager
def unpacking(archive: Path, beside: Path) -> Iterator[Unpacked]:
    """Unpack an archive into a scratch folder next to `beside`, and yield it once every hash is right.

    Raises UserError: no such file, or of a newer release; DamagedError: cut, changed, or with names that
    lead elsewhere; DiskSpaceError.
    """
    if not archive.is_file():
        raise UserError(f"{archive} is no file", remedy="name an archive that `ratchet backup` wrote")
    with _scratch_beside(beside) as scratch:
        folder = scratch / "unpacked"
        folder.mkdir()
        yield Unpacked(_unpack(archive, folder), folder, scratch)


def _unpack(archive: Path, folder: Path) -> Manifest:
    hashes: dict[str, str] = {}
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                if MANIFEST in hashes or member.name in hashes or not member.isreg():
                    raise DamagedError(f"{archive}: {member.name} has no place in it", remedy=ANOTHER)
                safe = tarfile.data_filter(member, str(folder))
                hashes[safe.name] = _take(tar, safe, folder)
            while stream.read(CHUNK):  # up to gzip's own checksum
                pass
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DamagedError(f"{archive} cannot be unpacked: {error}", remedy=ANOTHER) from None
    if MANIFEST not in hashes:
        raise DamagedError(f"{archive} is cut off: it has no {MANIFEST}", remedy=ANOTHER)
    return _check(archive, (folder / MANIFEST).read_bytes(), hashes)


def _take(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> str:
    """Write a member below `folder`, and return its sha256."""
    content, path = tar.extractfile(member), folder / member.name
    if content is None:
        raise tarfile.ReadError(f"{member.name} has no content")
    reader = _HashingReader(content, "")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as out:
        shutil.copyfileobj(reader, out, CHUNK)
    if out_size := path.stat().st_size - member.size:
        raise tarfile.ReadError(f"{member.name} is {-out_size} bytes short")
    path.chmod(member.mode)
    return reader.sha256.hexdigest()


def _check(archive: Path, content: bytes, hashes: dict[str, str]) -> Manifest:
    try:
        format_ = msgspec.json.decode(content)["format"]
        if format_ > FORMAT:
            raise UserError(
                f"{archive} has format {format_}, this release reads up to {FORMAT}",
                remedy="restore it with the release that wrote it, or a newer one",
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise DamagedError(f"{archive}: its {MANIFEST} is none: {error}", remedy=ANOTHER) from None
    seen = {name: digest for name, digest in hashes.items() if name != MANIFEST}
    wrong = sorted(name for name in seen | manifest.files if seen.get(name) != manifest.files.get(name))
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise DamagedError(f"{archive}: {wrong[0]}{more} is not what was packed", remedy=ANOTHER)
    return manifest
