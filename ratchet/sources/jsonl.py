"""JSON Lines from a path, a glob or any URL that fsspec can read; the raw lines, unread.

Lines end at `\\n` alone: `splitlines()` would cut rows at U+2028 and U+0085.
"""

from __future__ import annotations

from collections.abc import Iterator

from ratchet.config import JsonlSource
from ratchet.errors import DataError

MAX_LINE = 2**20  # bytes; a longer line is kept cut, so that preparation rejects and counts it


def read_lines(settings: JsonlSource) -> Iterator[bytes]:
    """Raises DataError when nothing is found, or when the file is no UTF-8 text at its start."""
    import fsspec

    if not settings.path:
        raise DataError("`ingest.jsonl.path` is empty", remedy="name a file, a glob or a URL there, or give `ratchet ingest --path FILE`")
    try:
        found = fsspec.open_files(settings.path, "rb")
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"cannot open {settings.path!r}: {error}") from None
    if not found:
        raise DataError(f"{settings.path!r} matches no file", remedy="check `ingest.jsonl.path`; a relative path counts from the checkout's root")
    for opened in found:
        yield from _lines(opened)


def _lines(opened: object) -> Iterator[bytes]:
    path = getattr(opened, "path", "")
    try:
        with opened as handle:  # type: ignore[attr-defined]
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
                    yield line.rstrip(b"\r\n")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist", remedy="check `ingest.jsonl.path`; a relative path counts from the checkout's root") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from None


def _check_start(line: bytes, path: str) -> None:
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in line[:4]:  # with its mark, or `{` as two bytes
        raise DataError(f"{path} is UTF-16, wanted UTF-8", remedy=f"convert it: iconv -f UTF-16 -t UTF-8 {path}")
    if line.lstrip()[:1] == b"[":
        raise DataError(f"{path} is a JSON array, wanted one object a line", remedy=f"convert it: jq -c '.[]' {path}")
