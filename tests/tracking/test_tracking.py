"""The local file is the truth; MLflow gets a copy once, late if need be, never at the training's cost."""

from __future__ import annotations

import json
import threading
import time

import pytest
from patience import scaled, within
from places import KEPT_CONNECTIONS, use_mlflow, use_no_mlflow

from ratchet.errors import ServiceError
from ratchet.tracking import curve
from ratchet.tracking.curve import History, LiveCopy, log_points, read_history
from ratchet.tracking.mlflow import (
    KEY_TAG,
    find_or_create_run,
    find_outage,
    find_run,
    mlflow_client,
    mlflow_errors,
    parameters,
)

pytestmark = pytest.mark.filterwarnings(KEPT_CONNECTIONS)


@pytest.fixture(autouse=True)
def _store(tmp_path, monkeypatch):
    use_mlflow(monkeypatch, tmp_path)


def points(run_id: str, metric: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in mlflow_client().get_metric_history(run_id, metric))


# --- the local file ---


def test_a_curve_is_read_back_as_it_was_written(tmp_path):
    history = History(tmp_path / "reports/history.jsonl")
    history.add(1, {"train_loss": 2.5})
    history.add(2, {"train_loss": 2.25, "validation_loss": 2.75})
    history.close()
    found = read_history(tmp_path / "reports/history.jsonl")
    assert [{key: value for key, value in point.items() if key != "time_ms"} for point in found] == [
        {"step": 1, "train_loss": 2.5},
        {"step": 2, "train_loss": 2.25, "validation_loss": 2.75},
    ]
    assert all(abs(point["time_ms"] - time.time() * 1000) < 60_000 for point in found)


def test_a_point_is_in_the_file_as_soon_as_it_is_added(tmp_path):
    history = History(tmp_path / "history.jsonl")
    history.add(1, {"loss": 1.0})
    assert len(read_history(tmp_path / "history.jsonl")) == 1
    history.close()


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1, "time_ms": 5, "loss": 1.0}\n{"step": 2, "time_')
    assert [point["step"] for point in read_history(path)] == [1]


def test_a_history_that_is_not_there_is_empty(tmp_path):
    assert read_history(tmp_path / "none.jsonl") == []


# --- runs and points ---


def test_a_run_is_found_by_its_key_and_made_once():
    first = find_or_create_run("small", "key1", {"mlflow.runName": "train-key1", "more": "tags"})
    assert find_or_create_run("small", "key1", {}) == first
    assert find_run("small", "key1") == first
    other = find_or_create_run("small", "key2", {})
    assert other != first
    run = mlflow_client().get_run(first)
    assert (run.info.run_name, run.data.tags[KEY_TAG], run.data.tags["more"], run.info.status) == (
        "train-key1",
        "key1",
        "tags",
        "RUNNING",
    )


def test_a_run_of_another_experiment_is_another_run():
    assert find_or_create_run("small", "key1", {}) != find_or_create_run("other", "key1", {})


def test_what_is_not_there_is_not_found():
    assert find_run("nowhere", "key1") is None
    find_or_create_run("small", "key1", {})
    assert find_run("small", "key2") is None


def test_an_experiment_that_somebody_else_made_first_is_taken():
    """Two trainings that start at once on a fresh server."""
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda key=key: found.append(find_or_create_run("small", key, {})))
        for key in ("key1", "key2", "key3")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 3
    assert {mlflow_client().get_run(run_id).info.experiment_id for run_id in found} == {
        mlflow_client().get_experiment_by_name("small").experiment_id
    }


def test_points_that_are_delivered_twice_are_there_once():
    run_id = find_or_create_run("small", "key1", {})
    curve = [{"step": step, "time_ms": 1000 + step, "train_loss": 1 / step} for step in range(1, 6)]
    log_points(run_id, curve[:3])
    log_points(run_id, curve)
    log_points(run_id, curve)
    assert points(run_id, "train_loss") == [(step, 1 / step) for step in range(1, 6)]


def test_a_long_curve_is_delivered_whole():
    run_id = find_or_create_run("small", "key1", {})
    log_points(
        run_id, [{"step": step, "time_ms": step, "a": float(step), "b": -float(step)} for step in range(1300)]
    )
    assert len(points(run_id, "a")) == len(points(run_id, "b")) == 1300


def test_no_points_are_no_call():
    assert log_points("no such run", []) is None  # a call would raise: there is no such run


# --- the live copy ---


def wait_for(condition) -> bool:
    deadline = time.monotonic() + scaled(20)
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_a_copy_grows_with_the_curve(tmp_path, monkeypatch):
    monkeypatch.setattr(curve, "FLUSH_SECONDS", 0.1)
    history = History(tmp_path / "history.jsonl")
    copy = LiveCopy(history.path, "small", "key1", {"mlflow.runName": "train"})
    copy.start()
    history.add(1, {"loss": 3.0})
    assert wait_for(lambda: (run_id := find_run("small", "key1")) and points(run_id, "loss") == [(1, 3.0)])
    for step in range(2, 40):
        history.add(step, {"loss": 3.0 / step})
    history.close()
    assert copy.finish() is True
    assert points(find_run("small", "key1"), "loss") == [(step, 3.0 / step) for step in range(1, 40)]


def test_without_a_server_the_training_goes_on_and_ends_in_time(tmp_path, monkeypatch):
    use_no_mlflow(monkeypatch)
    history = History(tmp_path / "history.jsonl")
    copy = LiveCopy(history.path, "small", "key1", {})
    with within(2):
        copy.start()
        for step in range(100):
            history.add(step, {"loss": 1.0})
    history.close()
    with within(6):
        assert copy.finish(seconds=5) is False
    assert len(read_history(tmp_path / "history.jsonl")) == 100


def test_what_an_outage_kept_back_is_delivered_when_the_server_is_there_again(tmp_path, monkeypatch):
    store = mlflow_client().tracking_uri
    monkeypatch.setattr(curve, "RETRY_SECONDS", 0.1)
    use_no_mlflow(monkeypatch)
    history = History(tmp_path / "history.jsonl")
    copy = LiveCopy(history.path, "small", "key1", {})
    copy.start()
    history.add(1, {"loss": 2.0})
    time.sleep(0.3)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    history.add(2, {"loss": 1.0})
    history.close()
    assert wait_for(lambda: find_run("small", "key1"))
    assert copy.finish() is True
    assert points(find_run("small", "key1"), "loss") == [(1, 2.0), (2, 1.0)]


def test_a_copy_that_was_cut_off_is_completed_from_the_file(tmp_path):
    """The process was killed after two points; the flow delivers the file once more."""
    path = tmp_path / "history.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step, "time_ms": step, "loss": float(step)}) + "\n" for step in range(5))
    )
    run_id = find_or_create_run("small", "key1", {})
    log_points(run_id, read_history(path)[:2])
    copy = LiveCopy(path, "small", "key1", {})
    copy.start()
    assert copy.finish() is True
    assert points(run_id, "loss") == [(step, float(step)) for step in range(5)]


# --- faults ---

CALLS = {
    "find_or_create_run": lambda: find_or_create_run("small", "key1", {}),
    "find_run": lambda: find_run("small", "key1"),
    "log_points": lambda: log_points("0" * 32, [{"step": 0, "time_ms": 0, "loss": 1.0}]),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_server_that_is_away_is_an_error_of_the_service(call, monkeypatch):
    use_no_mlflow(monkeypatch)
    with pytest.raises(ServiceError, match=r"(?s)MLflow at http://127\.0\.0\.1:1: .*ratchet up"):
        CALLS[call]()


def test_an_outage_is_found_before_anything_is_sent(monkeypatch):
    assert find_outage() == ""
    use_no_mlflow(monkeypatch)
    assert find_outage().startswith("MLflow at http://127.0.0.1:1: ")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert find_outage() == "MLFLOW_TRACKING_URI is not set"


def test_a_run_that_the_server_does_not_know_is_an_error_of_the_service():
    with pytest.raises(ServiceError, match="not found"):
        CALLS["log_points"]()


def test_without_an_address_nothing_is_written_anywhere(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ServiceError, match="MLFLOW_TRACKING_URI is not set"):
        find_or_create_run("small", "key1", {})
    assert not (tmp_path / "mlruns").exists()


def test_a_fault_of_ours_is_not_taken_for_one_of_the_service():
    with pytest.raises(KeyError), mlflow_errors():
        raise KeyError("ours")


def test_a_password_in_the_address_is_not_told(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ana:secret@127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ServiceError) as caught:
        find_run("small", "key1")
    assert "secret" not in str(caught.value)


# --- keys ---


def test_parameters_are_flat_with_dotted_keys():
    assert dict(
        parameters({"train": {"seed": 1, "deep": {"er": None}}, "promotion": "auto", "list": [1, 2]})
    ) == {
        "train.seed": "1",
        "train.deep.er": "None",
        "promotion": "auto",
        "list": "[1, 2]",
    }
