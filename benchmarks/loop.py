"""Measure what the loop costs in addition to the work itself, on the checkout of a finished demo.

    make demo && python -m benchmarks.loop            # prints a table; --json for a script

Three cases, each a whole process, medians of --runs:
- `dvc repro` with nothing to do, in a fresh clone that shares the cache, including the checkout of outputs
- `ratchet retrain` with nothing to do; its own share is the difference
- `ratchet retrain` after a change of `gate:` alone, with the stages that ran
Not covered: training speed, serving.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ratchet.config.edit import edit_params
from ratchet.pipeline.checkout import child_environment

HOME = Path(".ratchet/demo")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not (HOME / "champion.json").exists():
        sys.exit(f"{HOME} holds no finished demo: run `make demo` first")
    found = measure(HOME.resolve(), arguments.runs)
    print(
        json.dumps(found)
        if arguments.json
        else "\n".join(f"{name:32} {value}" for name, value in found.items())
    )


def measure(home: Path, runs: int) -> dict[str, Any]:
    """Return medians over `runs`, in seconds; both cases take turns, so that a slow minute affects both."""
    _retrain(home)  # the first one after a promotion may still have an alias to deliver
    repro, nothing = [], []
    for _ in range(runs):
        repro.append(_repro(home))
        nothing.append(_timed(lambda: _retrain(home)))
    ran = _change_gate(home)
    return {
        "dvc_repro_seconds": round(statistics.median(repro), 2),
        "retrain_nothing_seconds": round(statistics.median(nothing), 2),
        "own_share_seconds": round(statistics.median(nothing) - statistics.median(repro), 2),
        "ran_after_gate_change": ran,
    }


def _repro(home: Path) -> float:
    """Time what one would type without Ratchet: clone, share the cache, check out, reproduce."""
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "clone"

        def work() -> None:
            _run(["git", "clone", "--quiet", str(home), str(clone)], home)
            with (clone / ".dvc/config.local").open("w") as config:
                config.write(
                    f'\n[cache]\n    dir = "{home}/.dvc/cache"\n    type = "reflink,symlink,hardlink,copy"\n'
                )
            _run([sys.executable, "-m", "dvc", "checkout", "--quiet", "--allow-missing"], clone)
            _run([sys.executable, "-m", "dvc", "repro", "--quiet"], clone)

        return _timed(work)


def _retrain(home: Path) -> dict[str, Any]:
    done = _run(
        [
            sys.executable,
            "-m",
            "ratchet.cli",
            "-C",
            str(home),
            "retrain",
            "--json",
            "--reason",
            "benchmark",
        ],
        home,
    )
    return dict(json.loads(done))


def _change_gate(home: Path) -> list[str]:
    """Return the stages that a change of gate.resamples reruns; the change is committed, then reverted."""
    params = home / "params.yaml"
    text = params.read_text(encoding="utf-8")
    params.write_text(edit_params(text, {"gate.resamples": 4001}), encoding="utf-8")
    _commit(home, "Benchmark: touch the gate")
    ran = [stage for stage, did in _retrain(home)["stages"].items() if did]
    params.write_text(text, encoding="utf-8")
    _commit(home, "Benchmark: take it back")
    _retrain(home)
    return ran


def _commit(home: Path, message: str) -> None:
    _run(
        [
            "git",
            "-c",
            "user.name=Ratchet",
            "-c",
            "user.email=ratchet@localhost",
            "commit",
            "--quiet",
            "--all",
            "--message",
            message,
        ],
        home,
    )


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, env=child_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
