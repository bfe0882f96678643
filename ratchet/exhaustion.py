"""Tell when a disk or the memory is full, whichever library says so, and what to do about it.

pyarrow, sqlite, safetensors, tokenizers and DVC raise errors of their own for a full disk; torch raises a
RuntimeError such as `could not create a primitive` for a memory limit.
"""

from __future__ import annotations

import errno
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ratchet.errors import CommandError, DiskSpaceError, MemoryLimitError, RatchetError
from ratchet.files import ROOM, describe_room

FULL = (errno.ENOSPC, errno.EDQUOT)
SAYS_FULL = re.compile(
    r"no space left on device|disk quota exceeded|database or disk is full|\bos error (?:28|122)\b"
    r"|\berrno (?:28|122)\b",
    re.IGNORECASE,
)
SAYS_NO_MEMORY = re.compile(
    r"could not create a primitive|bad_alloc|cannot allocate memory|can't allocate memory|out of memory"
    r"|unable to allocate [\d.]+ [KMGT]iB|\b(?:errno|os error) 12\b",
    re.IGNORECASE,
)
PATH = re.compile(r"'(/[^'\n]+)'")
LESS_MEMORY = (
    "give it more memory, or make it need less: train.batch_windows lower and train.accumulate higher, "
    "train.checkpoint_activations: true, evaluate.batch_size or gateway.max_batch lower; `ratchet plan` "
    "estimates a training's memory"
)


def explain(error: BaseException) -> RatchetError | None:
    """Return the error to report in place of `error` when a disk or the memory is full; else None.

    Errors of ours say it already, except where they quote another program.
    """
    for one in _chain(error):
        if isinstance(one, RatchetError) and not isinstance(one, CommandError):
            return None
        if (isinstance(one, OSError) and one.errno in FULL) or SAYS_FULL.search(str(one)):
            return DiskSpaceError(f"the disk is full: {_first_line(one)}; {_tell_room(one)}", remedy=ROOM)
        if isinstance(one, MemoryError) or lacks_memory(str(one)):
            return MemoryLimitError(f"memory ran out: {_first_line(one)}", remedy=LESS_MEMORY)
    return None


def lacks_memory(said: str) -> bool:
    """Return whether a program's words say that memory ran out."""
    return SAYS_NO_MEMORY.search(said) is not None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _tell_room(error: BaseException) -> str:
    """Tell how much is free where it was written, or where things are written, if the error names no path."""
    named = error.filename if isinstance(error, OSError) and error.filename else None
    found = PATH.search(str(error))
    places = [Path(str(named or (found and found[1])))] if named or found else []
    return "; ".join(describe_room(place) for place in places or [Path.cwd(), Path(tempfile.gettempdir())])


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
