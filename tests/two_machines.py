"""A small project on two machines: two checkouts, a bare git remote, a folder as DVC remote; no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from places import make_repository

from ratchet.pipeline.checkout import git

# The stage `train` counts to six, keeps what it has in a checkpoint a step, and goes on from the newest; a
# file `wait` in the checkout lets it stop after three until the file is gone.
LEARN = """
import json, os, shutil, sys, time
from pathlib import Path
root = Path(os.environ["RATCHET_ROOT"])
folder = root / ".ratchet/checkpoints/key"
done = sorted(folder.glob("step-*/manifest.json"))
numbers = json.loads(done[-1].read_text()) if done else []
print("from", len(numbers), flush=True)
while len(numbers) < 6:
    numbers.append(len(numbers) ** 2)
    half = folder / ".half"
    half.mkdir(parents=True)
    (half / "manifest.json").write_text(json.dumps(numbers))
    half.rename(folder / f"step-{len(numbers):08d}")
    while len(numbers) == 3 and (root / "wait").exists():
        time.sleep(0.05)
out = Path("models/learned")
out.mkdir(parents=True)
(out / "weights").write_text(json.dumps(numbers) + Path("data/made").read_text())
(out / "words").write_text("two files")
shutil.rmtree(folder)
"""
DAG = f"""
stages:
  code:
    cmd: mkdir -p data/code
    outs: [data/code]
  make:
    cmd: {sys.executable} -c "open('data/made', 'w').write('made')"
    outs: [data/made]
  train:
    cmd: {sys.executable} learn.py
    deps: [learn.py, data/made]
    outs: [models/learned]
  after:
    cmd: wc -c < models/learned/weights > reports/after
    deps: [models/learned]
    outs: [reports/after]
  wrong:
    cmd: {sys.executable} -c "import sys; print('the rate is wrong'); sys.exit(2)"
    deps: [data/made]
"""


class Machines(NamedTuple):
    hub: Path
    other: Path
    store: Path


def make_machines(tmp_path: Path, params: str = "project:\n  name: small\n") -> Machines:
    store = tmp_path / "a store"
    hub = make_repository(
        tmp_path / "hub",
        {
            "params.yaml": params,
            "dvc.yaml": DAG,
            "learn.py": LEARN,
            ".dvc/config": f"[core]\n    remote = store\n['remote \"store\"']\n    url = {store}\n",
            "data/.gitignore": "/made\n/code\n",
            "models/.gitignore": "/learned\n",
            "reports/.gitignore": "/after\n",
        },
    )
    git(tmp_path, "clone", "--quiet", "--bare", str(hub), "origin.git")
    git(hub, "remote", "add", "origin", str(tmp_path / "origin.git"))
    git(tmp_path, "clone", "--quiet", "origin.git", "other")
    return Machines(hub, tmp_path / "other", store)
