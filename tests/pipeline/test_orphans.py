"""A stage ends when the run that started it is killed, although sessions, DVC and a shell stand between."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from patience import scaled
from places import commit, make_repository, use_git_without_a_user, write_files

from ratchet.pipeline.processes import STARTER, find_named, find_process, name_process, write_name

ROOT = Path(__file__).parents[2]
PIPELINE = f"""
stages:
  train:
    cmd: PYTHONPATH={ROOT} python use.py --tokens tokens --out out && true
    deps: [tokens]
    outs: [out]
"""
# As a training, it keeps its newest step when it is asked to stop.
USE = """
import os, signal, sys, time
from pathlib import Path
from ratchet.pipeline.stage import run_stage

def use(config, arguments):
    def stop(*_):
        Path(os.environ["RATCHET_ROOT"], "checkpoint").write_text("step 7")
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    print("process", os.getpid(), flush=True)
    while True:
        time.sleep(0.1)

run_stage("", ["tokens", "out"], use)
"""
PROGRAM = """
import sys
from pathlib import Path
from ratchet.pipeline.workspace import open_workspace; from ratchet.pipeline.dvc import run_stage
with open_workspace(Path(sys.argv[1]), "test", print) as workspace:
    run_stage(workspace, "train", lambda line: print(line, flush=True))
"""


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_killed_runs_stage_keeps_its_checkpoint_and_ends_with_all_between(tmp_path, monkeypatch):
    use_git_without_a_user(monkeypatch)
    root = make_repository(tmp_path / "checkout")
    write_files(root, {"dvc.yaml": PIPELINE, "use.py": USE, "tokens": "1", ".gitignore": "/out\n.ratchet\n"})
    commit(root, "Add a stage")
    command = [sys.executable, "-c", PROGRAM, str(root)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        stage = int(next(line for line in run.stdout if line.startswith("process ")).split()[1])
        family = psutil.Process(run.pid).children(recursive=True)
        assert stage in [process.pid for process in family] and len(family) >= 2
        assert os.getsid(stage) != os.getsid(run.pid), "a signal to the run's session would not reach it"
        run.kill()
    until = time.monotonic() + scaled(20)
    while not all(map(is_gone, family)) and time.monotonic() < until:
        time.sleep(0.1)
    assert [process.pid for process in family if not is_gone(process)] == []
    assert (root / "checkpoint").read_text() == "step 7"


def test_a_process_that_cannot_stop_is_ended_after_the_grace(tmp_path):
    code = (
        "import signal, time; from ratchet.pipeline import processes as ours; ours.GRACE_SECONDS = 0.5;"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); ours.end_with_starter(); time.sleep(300)"
    )
    environment = {**os.environ, STARTER: "1 1.00"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, timeout=60, check=False)
    assert done.returncode == 1


def test_without_a_starter_nothing_is_watched():
    code = (
        "import threading; from ratchet.pipeline.processes import end_with_starter;"
        "end_with_starter(); print(threading.active_count())"
    )
    environment = {name: value for name, value in os.environ.items() if name != STARTER}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "1"


def test_a_process_is_not_taken_for_another_one_with_its_id(tmp_path):
    pid, created = name_process().split()
    assert find_named(f"{pid} {created}") == psutil.Process()
    assert find_named(f"{pid} {float(created) - 60}") is None
    assert find_process(int(pid), float(created) + 60) is None
    write_name(tmp_path / "name", os.getpid())
    assert find_named((tmp_path / "name").read_text()) == psutil.Process()


@pytest.mark.parametrize("name", ["", "4711", "4711 soon", "process 1.0", "-1 1.0"])
def test_what_names_no_process_finds_none(name):
    assert find_named(name) is None
