"""One tree of errors; every message names the value seen, the value wanted and what to change.

RatchetError               exit code 1: our fault, or the machine's
├── UserError              exit code 2: something the user can change
│   ├── ConfigError        params.yaml
│   ├── DataError          a source, a batch, a row
│   ├── BaseModelError     the base model, its tokenizer or template
│   │   └── MediaError     a picture or recording that the base cannot take
│   └── CheckoutError      git, DVC, the working tree
│       └── DamagedError   bytes that are not those that were stored
├── ServiceError           MLflow, Prefect, the request log or an upstream does not start or does not answer
├── BusyError              a full queue or another open rollout: the caller may try again later
├── LeaseError             another process took over a lock while this one was away
├── StageError             a DVC stage failed; carries the stage's own exit code
├── CommandError           git or DVC failed, and no check foresaw the reason
├── SupersededError        another attempt at a stage on another machine has begun; this one is over
├── StoppedError           exit code 143: SIGTERM ended the training; its checkpoint is kept
├── DivergenceError        a loss, a gradient or a weight is not finite
├── DiskSpaceError         exit code 2: too little free space for what is to be written, or the write failed
└── MemoryLimitError       exit code 2: memory ran out

RowError is apart: it rejects one row, which is counted, and stops nothing.
"""

from __future__ import annotations


class RatchetError(Exception):
    """Base of all errors that are reported in one sentence instead of a traceback."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message if not remedy else f"{message}\n  → {remedy}")
        self.remedy = remedy


class UserError(RatchetError):
    exit_code = 2


class ConfigError(UserError):
    pass


class DataError(UserError):
    pass


class BaseModelError(UserError):
    pass


class MediaError(BaseModelError):
    """A row's picture or recording that the base cannot take; other rows may go on.

    `medium` is its number among those of the row, from 0.
    """

    def __init__(self, message: str, *, remedy: str = "", medium: int = 0) -> None:
        super().__init__(message, remedy=remedy)
        self.medium = medium


class CheckoutError(UserError):
    pass


class DamagedError(CheckoutError):
    pass


class ServiceError(RatchetError):
    pass


class LeaseError(RatchetError):
    pass


class StageError(RatchetError):
    """A stage's process ended with `exit_code`, or was `killed`; `message` holds its last lines."""

    def __init__(self, message: str, *, exit_code: int, remedy: str = "", killed: bool = False) -> None:
        super().__init__(message, remedy=remedy)
        self.exit_code = exit_code
        self.killed = killed


class CommandError(RatchetError):
    pass


class SupersededError(RatchetError):
    pass


class DivergenceError(RatchetError):
    pass


class StoppedError(RatchetError):
    exit_code = 143  # 128 + 15 (SIGTERM), as shells report it


class DiskSpaceError(RatchetError):
    exit_code = 2


class MemoryLimitError(RatchetError):
    exit_code = 2


class BusyError(RatchetError):
    """The queue is full, or another rollout is open; the caller may try again later."""


class RowError(ValueError):
    """A row that cannot become an Example; `reason` is a code to count by, the message is for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
