"""JSON Lines from a path, a glob or any URL that fsspec can read; the raw lines, unread.

Lines end at `\\n` alone: `splitlines()` would cut rows at U+2028 and U+0085.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from ratchet.config.data import JsonlSource
from ratchet.data.json_rows import MAX_LINE
from ratchet.data.text import strip_url
from ratchet.errors import DataError

ARCHIVES = {
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"7z\xbc\xaf": "7z",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"Rar!": "rar",
}
GZIP, TAR_AT, TAR = b"\x1f\x8b", 257, b"ustar"
# Bytes that a gzip file may unpack to: at most, in times its own size, and without asking.
MOST_UNPACKED, MOST_RATIO, UNPACKED_ANYWAY = 2**31, 20, 2**20


def read_lines(settings: JsonlSource) -> Iterator[bytes]:
    """Read the lines. Raises DataError: nothing is found, a file is no UTF-8 text at its start."""
    import fsspec

    if not settings.path:
        raise DataError(
            "`ingest.jsonl.path` is empty",
            remedy="name a file, a glob or a URL there, or give `ratchet ingest --path FILE`",
        )
    try:
        found = fsspec.open_files(settings.path, "rb")
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"cannot open {shown(settings.path)!r}: {str(error).replace(settings.path, shown(settings.path))}"
        ) from None
    if not found:
        raise DataError(
            f"{shown(settings.path)!r} matches no file",
            remedy="check `ingest.jsonl.path`; a relative path counts from the checkout's root",
        )
    for opened in found:
        yield from _lines(opened)


def shown(path: str) -> str:
    """Make a path fit for messages: of a URL without login and signature."""
    return strip_url(path) if "://" in path else path


def _lines(opened: object) -> Iterator[bytes]:
    path = shown(getattr(opened, "path", ""))
    try:
        with opened as handle:  # type: ignore[attr-defined]
            handle = _unpacked(handle, path)
            first = True
            while line := handle.readline(MAX_LINE):
                cut = len(line) == MAX_LINE and not line.endswith(b"\n")
                while cut and (rest := handle.readline(MAX_LINE)):
                    if rest.endswith(b"\n"):
                        break
                if first:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                    _check_start(line, path)
                    first = not line.strip()
                if line.strip():
                    yield line.rstrip(b"\n") if cut else line.rstrip(b"\r\n")
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist",
            remedy="check `ingest.jsonl.path`; a relative path counts from the checkout's root",
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {type(error).__name__}") from None


def _unpacked(handle: Any, path: str) -> Any:
    """Return the file, or what a gzip file holds.

    Raises DataError for an archive: its names could lead out of any folder (`..`, links).
    """
    if not hasattr(handle, "peek"):  # not every URL can be wound back
        handle = io.BufferedReader(handle)
    start = handle.peek(TAR_AT + len(TAR))
    kind = next(
        (name for magic, name in ARCHIVES.items() if start.startswith(magic)),
        "tar" if start[TAR_AT : TAR_AT + len(TAR)] == TAR else None,
    )
    if kind:
        raise DataError(
            f"{path} is an archive ({kind}), wanted JSON Lines",
            remedy="unpack it and name the files; gzip of a single file is read as it is",
        )
    if not start.startswith(GZIP):
        return handle
    return cast(BinaryIO, io.BufferedReader(_Capped(handle, path)))


class _Capped(io.RawIOBase):
    """What a gzip file holds, as far as it is no bomb."""

    def __init__(self, handle: BinaryIO, path: str) -> None:
        self._packed, self._handle, self._path, self._count = handle, gzip.GzipFile(fileobj=handle), path, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            got = self._handle.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{self._path} is a broken gzip file: {error}", remedy="fetch it again") from None
        self._count += len(got)
        most = min(MOST_UNPACKED, max(UNPACKED_ANYWAY, MOST_RATIO * self._packed.tell()))
        if self._count > most:
            raise DataError(
                f"{self._path} unpacks to more than {MOST_RATIO} times its size, "
                f"or than {MOST_UNPACKED / 2**30:.0f} GiB",
                remedy="if it is no bomb, unpack it by hand and name the file",
            )
        buffer[: len(got)] = got
        return len(got)


def _check_start(line: bytes, path: str) -> None:
    if line.count(b"}\r{"):
        raise DataError(
            f"{path} ends its lines with a carriage return alone, wanted a line feed",
            remedy=f"convert it: tr '\\r' '\\n' < {path}",
        )
    # With its mark, or `{` as two bytes.
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in line[:4]:
        raise DataError(
            f"{path} is UTF-16, wanted UTF-8", remedy=f"convert it: iconv -f UTF-16 -t UTF-8 {path}"
        )
    if line.lstrip()[:1] == b"[":
        raise DataError(
            f"{path} is a JSON array, wanted one object a line", remedy=f"convert it: jq -c '.[]' {path}"
        )
