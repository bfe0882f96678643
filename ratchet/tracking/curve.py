"""Write a training's loss curve to a file, and copy it to MLflow while the training runs."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from ratchet.errors import ServiceError
from ratchet.tracking.mlflow import find_or_create_run, mlflow_client, mlflow_errors

Point = dict[str, float]  # `step`, `time_ms` (milliseconds since 1970), and the values measured there
RETRY_SECONDS = 15.0  # pause after a failed delivery: an outage of MLflow rarely ends within a second
FLUSH_SECONDS = 2.0  # pause between two deliveries, and so the lag of the live curve


class History:
    """The file of a curve: one JSON line per point, flushed at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._out = path.open("w", encoding="utf-8")

    def add(self, step: int, values: dict[str, float]) -> None:
        self._out.write(json.dumps({"step": step, "time_ms": int(time.time() * 1000), **values}) + "\n")
        self._out.flush()

    def restore(self, points: list[Point]) -> None:
        """Write the points of a resumed training again, with their original times."""
        self._out.write("".join(json.dumps(point) + "\n" for point in points))
        self._out.flush()

    def close(self) -> None:
        self._out.close()


def read_history(path: Path) -> list[Point]:
    """Read the complete lines: the last one may be partial while the training runs."""
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        if path.exists()
        else []
    )


class LiveCopy:
    """Delivers a growing history to MLflow in a thread, so that an outage does not stop the training."""

    def __init__(self, history: Path, experiment: str, run_key: str, tags: dict[str, str]) -> None:
        self._history, self._experiment, self._run_key, self._tags = history, experiment, run_key, tags
        self._done = threading.Event()
        self._delivered = 0
        self.complete = False
        self._thread = threading.Thread(target=self._deliver_until_done, name="mlflow-copy", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self, seconds: float = 10.0) -> bool:
        """Stop the thread, wait up to `seconds`, and return whether all points were delivered.

        The flow delivers the remaining ones.
        """
        self._done.set()
        self._thread.join(timeout=seconds)
        return self.complete

    def _deliver_until_done(self) -> None:
        run_id = ""
        while not self.complete:
            last = self._done.is_set()
            try:
                run_id = run_id or find_or_create_run(self._experiment, self._run_key, self._tags)
                self._deliver(run_id)
                self.complete = last
                self._done.wait(FLUSH_SECONDS)
            except ServiceError:
                if last:
                    return
                self._done.wait(RETRY_SECONDS)

    def _deliver(self, run_id: str) -> None:
        points = read_history(self._history)[self._delivered :]
        log_points(run_id, points)
        self._delivered += len(points)


def log_points(run_id: str, points: list[Point]) -> None:
    """Send points to a run.

    Sending them again is harmless: MLflow identifies a point by name, time, step and value.
    """
    from mlflow.entities import Metric

    metrics = [
        Metric(name, float(value), int(point["time_ms"]), int(point["step"]))
        for point in points
        for name, value in point.items()
        if name not in ("step", "time_ms")
    ]
    client = mlflow_client()
    with mlflow_errors():
        for start in range(0, len(metrics), 500):
            client.log_batch(run_id, metrics=metrics[start : start + 500])
