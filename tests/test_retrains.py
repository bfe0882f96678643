"""What drift's budget is counted from."""

from __future__ import annotations

import time

from ratchet.retrains import read_retrains, remember


def test_trainings_are_remembered_in_order_and_counted_since_a_time(tmp_path):
    assert read_retrains(tmp_path) == []
    for name in ("first", "second"):
        remember(tmp_path, reason=name, seconds=12.5, run_key=name, verdict="promote")
    found = read_retrains(tmp_path)
    assert [(entry.reason, entry.seconds) for entry in found] == [("first", 12.5), ("second", 12.5)]
    assert read_retrains(tmp_path, since=time.time() + 1) == []
