"""What a second try can mend: the network and the services, never the user's rows or knobs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ratchet.errors import CommandError, ServiceError

T = TypeVar("T")
TRIES = 3  # another data commit may land first; ours then starts over on top of it


def can_pass(task: Any, run: Any, state: Any) -> bool:
    """Return whether a failure may pass by itself, as Prefect's `retry_condition_fn`."""
    try:
        state.result()
    except (CommandError, ServiceError, ConnectionError, TimeoutError):
        return True
    except BaseException:  # noqa: BLE001  (any other failure is not ours to judge: no retry)
        return False
    return False


def on_top(work: Callable[[], T], say: Callable[[str], object]) -> T:
    """Return what `work` returns, trying TRIES times: it lands a commit, and somebody else's may come first.

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
