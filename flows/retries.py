"""Retry what a second try can repair: the network and the services, never faults of rows or settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ratchet.errors import CommandError, ServiceError

T = TypeVar("T")
TRIES = 3  # when another commit is pushed first, the work starts over on top of it


def can_pass(task: Any, run: Any, state: Any) -> bool:
    """Return whether a failure may be temporary, as Prefect's `retry_condition_fn`."""
    try:
        state.result()
    except (CommandError, ServiceError, ConnectionError, TimeoutError):
        return True
    except BaseException:  # noqa: BLE001  (any other failure is not retried, whatever it is)
        return False
    return False


def on_top(work: Callable[[], T], say: Callable[[str], object]) -> T:
    """Run `work`, up to TRIES times, and return its result: it pushes a commit, and another one may be pushed
    first.

    Raises the last CommandError.
    """
    for tries_left in reversed(range(TRIES)):
        try:
            return work()
        except CommandError as error:
            if not tries_left:
                raise
            reason = " ".join(str(error).split())[:200]
            say(f"starting over on top of what has landed meanwhile: {reason}")
    raise AssertionError("unreachable: the loop returns or raises")
