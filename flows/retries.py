"""What a second try can mend: the network and the services, never the user's rows or knobs."""

from __future__ import annotations

from typing import Any

from ratchet.errors import CommandError, ServiceError


def can_pass(task: Any, run: Any, state: Any) -> bool:
    """Prefect's `retry_condition_fn`."""
    try:
        state.result()
    except (CommandError, ServiceError, ConnectionError, TimeoutError):
        return True
    except BaseException:  # noqa: BLE001  (any other failure is not ours to judge: no retry)
        return False
    return False
