"""What drift's budget is counted from."""

from __future__ import annotations

import os
import time

from ratchet.monitoring.retrain_budget import is_under_way, last_start, note_asked, read_retrains, remember
from ratchet.pipeline.checkout import locked


def test_trainings_are_remembered_in_order_and_counted_since_a_time(tmp_path):
    assert read_retrains(tmp_path) == []
    for name in ("first", "second"):
        remember(tmp_path, reason=name, seconds=12.5, run_key=name, verdict="promote")
    found = read_retrains(tmp_path)
    assert [(entry.reason, entry.seconds) for entry in found] == [("first", 12.5), ("second", 12.5)]
    assert read_retrains(tmp_path, since=time.time() + 1) == []


def test_a_cool_down_begins_when_drift_asks_whether_or_not_it_trains(tmp_path):
    assert last_start(tmp_path) is None
    began = time.time()
    remember(tmp_path, reason="first", seconds=1.0, run_key="a", verdict="promote")
    trained = last_start(tmp_path)
    note_asked(tmp_path)
    asked = last_start(tmp_path)
    assert trained is not None and asked is not None and began - 1 < trained <= asked <= time.time() + 1


def test_a_retraining_that_runs_or_was_just_asked_for_is_under_way(tmp_path):
    assert not is_under_way(tmp_path)
    with locked(tmp_path, "retrain"):
        assert is_under_way(tmp_path)
    note_asked(tmp_path)
    assert is_under_way(tmp_path)
    os.utime(tmp_path / ".ratchet/drift-asked", (time.time() - 60,) * 2)
    remember(tmp_path, reason="drift", seconds=1.0, run_key="a", verdict="promote")
    assert not is_under_way(tmp_path)
