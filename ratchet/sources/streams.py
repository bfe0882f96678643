"""Open what a path, a glob, a folder or a URL names, unpack gzip and zstd, and hash the bytes on the way.

A limit of MOST_UNPACKED bytes, counted while the stream is read, protects from a file that unpacks without
end. A limit on the ratio does not work: rows that share one system prompt are packed 70 times and more.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from ratchet.data.forms import MAX_LINE
from ratchet.data.text import strip_url
from ratchet.errors import DataError

MOST_UNPACKED = 2**31  # bytes
HEAD = 2 * MAX_LINE  # bytes by which a format is recognised
IN_MEMORY = 2**26  # bytes; a larger file that is read at random places is copied to disk
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
WEB = ("http", "https")
DATA_FILES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow", ".gz", ".zst")


def shown(path: str) -> str:
    """Return a path for messages, a URL without its login and signature."""
    return strip_url(path) if "://" in path else path


class Stream:
    """A file's unpacked bytes: `head` to recognise the format, and `handle` to read all of them."""

    def __init__(self, handle: BinaryIO, name: str) -> None:
        self.name = name
        self._raw = _Hashed(handle)
        packed = io.BufferedReader(self._raw, HEAD)
        codec = next((codec for magic, codec in PACKED.items() if packed.peek(4).startswith(magic)), "")
        self.codec = codec
        unpacked = io.BufferedReader(_Capped(_decompress(packed, codec), self)) if codec else packed
        self.head = unpacked.read(HEAD)
        self.is_whole = len(self.head) < HEAD
        self.handle = io.BufferedReader(_Joined(self.head, unpacked))

    def sha256(self) -> str:
        """Read the file to its end, and return the hash of its bytes as they were found, packed or not."""
        while self._raw.read(MAX_LINE):
            pass
        return self._raw.hash.hexdigest()

    def read(self) -> bytes:
        """Read all unpacked bytes. Raises DataError over MOST_UNPACKED."""
        content = self.handle.read(MOST_UNPACKED + 1)
        if len(content) > MOST_UNPACKED:
            raise too_large(self.name)
        return content

    def spool(self) -> tempfile.SpooledTemporaryFile[bytes]:
        """Copy the bytes to a temporary file for random access, which URLs and packed files do not offer."""
        copy = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115  (the reader closes it)
        while chunk := self.handle.read(MAX_LINE):
            copy.write(chunk)
        copy.seek(0)
        return copy


def too_large(name: str) -> DataError:
    return DataError(
        f"{name} holds more than {MOST_UNPACKED / 2**30:.0f} GiB",
        remedy="split it into smaller files, and name them with a glob",
    )


class _Hashed(io.RawIOBase):
    """A file that hashes the bytes that are read from it."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle, self.hash = handle, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        got = self._handle.read(len(buffer))
        self.hash.update(got)
        buffer[: len(got)] = got
        return len(got)


class _Joined(io.RawIOBase):
    """A stream of the bytes that were read already, then of the rest."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = memoryview(head), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        got = self._head[: len(buffer)] if self._head else self._rest.read(len(buffer))
        self._head = self._head[len(buffer) :]
        buffer[: len(got)] = got
        return len(got)


class _Capped(io.RawIOBase):
    """The unpacked bytes of a file, up to MOST_UNPACKED."""

    def __init__(self, unpacked: Any, stream: Stream) -> None:
        self._unpacked, self._stream, self._count = unpacked, stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            got = self._unpacked.read(len(buffer))
        except OSError as error:
            raise DataError(
                f"{self._stream.name} is a broken {self._stream.codec} file: {error}", remedy="fetch it again"
            ) from None
        self._count += len(got)
        if self._count > MOST_UNPACKED:
            raise too_large(self._stream.name)
        buffer[: len(got)] = got
        return len(got)


def _decompress(packed: BinaryIO, codec: str) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), codec)


@contextmanager
def open_stream(opened: Any) -> Iterator[Stream]:
    """Open a file that `find_files` found. Raises DataError, for errors of later reads as well."""
    name = shown(opened.path)
    with _told(name), opened as handle:
        yield Stream(cast(BinaryIO, handle), name)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn errors of files and of the network into DataError, without a URL's login and signature."""
    try:
        yield
    except FileNotFoundError as error:
        if (status := _http_status(error)) not in (None, 404):
            raise DataError(f"cannot read {name}: HTTP status {status}") from None
        raise DataError(
            f"{name} does not exist",
            remedy="check `ingest.jsonl.path`; a relative path counts from the checkout's root",
        ) from None
    except _unreadable() as error:
        raise DataError(f"cannot read {name}: {type(error).__name__}") from None


def _http_status(error: BaseException | None) -> int | None:
    """Return the status behind an error: fsspec calls every refusal over HTTP a missing file."""
    while error is not None:
        if isinstance(status := getattr(error, "status", None), int):
            return status
        error = error.__cause__
    return None


def _unreadable(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """Return the errors of filesystems: those of the web and of the hub raise some that are no OSError."""
    import aiohttp
    import httpx2  # the HTTP client of huggingface_hub

    return OSError, aiohttp.ClientError, httpx2.HTTPError, *more


def find_files(path: str) -> list[Any]:
    """Return the files that `path` names, as fsspec's. Raises DataError for none, or for a plain folder."""
    import fsspec

    if not path:
        raise DataError(
            "`ingest.jsonl.path` is empty",
            remedy="name a file, a glob or a URL there, or give `ratchet ingest --path FILE`",
        )
    try:
        found = fsspec.open_files(path, "rb")
    except _unreadable(ValueError, ImportError) as error:
        raise DataError(f"cannot open {shown(path)!r}: {str(error).replace(path, shown(path))}") from None
    if not found:
        raise DataError(
            f"{shown(path)!r} matches no file",
            remedy="check `ingest.jsonl.path`; a relative path counts from the checkout's root",
        )
    if len(found) == 1 and (path.partition("://")[0] not in WEB or "://" not in path):
        (only,) = found
        with _told(shown(path)):
            if only.fs.isdir(only.path):
                return _files_in(path.rstrip("/"), only.fs, only.path.rstrip("/"))
    return list(found)


def _files_in(path: str, fs: Any, folder: str) -> list[Any]:
    """Open the files of a folder that `datasets.save_to_disk` wrote. Raises DataError for another folder."""
    import fsspec

    names = {PurePosixPath(found).name for found in fs.ls(folder, detail=False)}
    if "dataset_dict.json" in names:
        splits = _read_json(fs, f"{folder}/dataset_dict.json").get("splits", [])
        raise DataError(
            f"{shown(path)} holds the splits {', '.join(map(str, splits))}, wanted one",
            remedy=f"name one: --path {shown(path)}/{splits[0] if splits else 'SPLIT'}",
        )
    if "state.json" in names:
        parts = [str(part["filename"]) for part in _read_json(fs, f"{folder}/state.json")["_data_files"]]
        if all(PurePosixPath(part).name == part for part in parts):
            return [fsspec.core.OpenFile(fs, f"{folder}/{part}", "rb") for part in parts]
    held = sorted(name for name in fs.find(folder, maxdepth=2) if name.endswith(DATA_FILES))
    inside = [name.removeprefix(folder.lstrip("/") if "://" in path else folder).lstrip("/") for name in held]
    raise DataError(
        f"{shown(path)} is a folder, wanted files"
        + (f"; it holds {', '.join(inside[:6])}{' …' if len(inside) > 6 else ''}" if inside else ""),
        remedy=f"name files with a glob: --path '{shown(path)}/{_glob(inside)}'",
    )


def _glob(inside: list[str]) -> str:
    if not inside:
        return "*.jsonl"
    first = PurePosixPath(inside[0])
    return str(first.with_name("*" + "".join(first.suffixes)))


def _read_json(fs: Any, path: str) -> dict[str, Any]:
    try:
        return dict(json.loads(fs.cat_file(path)))
    except (ValueError, TypeError) as error:
        raise DataError(f"{shown(path)} is no valid JSON: {error}") from None


def base_name(path: str) -> str:
    """Return only the file's name: a folder may be named after a person, a URL may hold a signature."""
    return PurePosixPath(urlsplit(path).path if "://" in path else path).name
