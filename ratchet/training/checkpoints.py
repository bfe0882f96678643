"""Write checkpoints of a training atomically, check them before use, remove them after a success.

`.ratchet/checkpoints/<run key>/step-00000012/` holds tensors.safetensors (weights, the best ones, the
optimizer's state, random generators), state.json and trainer_state.json (everything that is no tensor), and
manifest.json with their sha256, written last. The Trainer's own checkpoints are not used: they are partly
pickles, are not written atomically, and are loaded even with parts missing.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ratchet.errors import ConfigError, RatchetError
from ratchet.files import read_json, sha256_file, whole_folder, write_json
from ratchet.pipeline.checkpoint_files import FOLDER, MANIFEST, STEP
from ratchet.pipeline.stage import say
from ratchet.privacy.noise import keep_key
from ratchet.training.distributed import any_of, connect, rank, send_folder
from ratchet.training.schedule import Points

if TYPE_CHECKING:
    from ratchet.training.state import TrainingState

TENSORS, STATE, TRAINER_STATE = "tensors.safetensors", "state.json", "trainer_state.json"
MOST_TOLD = 6  # differing facts that a message names, at most
KEPT = 2  # the newest, and the one before it in case the newest is broken


class Saved(NamedTuple):
    """A checkpoint that was read and checked; `state` is what `write` was given."""

    folder: Path
    step: int
    state: TrainingState


class Checkpoints:
    """The checkpoints of one training.

    A training resumes only from a checkpoint with equal `facts`, such as params and package versions.
    `minutes` is the time between checkpoints; `curve` returns the points reported so far.
    """

    def __init__(
        self,
        home: Path,
        run_key: str,
        facts: dict[str, object],
        *,
        minutes: float,
        curve: Callable[[], Points],
    ) -> None:
        self._all = home / FOLDER
        self._folder = self._all / run_key
        self._facts, self._seconds, self._curve = facts, minutes * 60, curve
        self._last = time.monotonic()
        self.stop_asked = False

    @property
    def due(self) -> bool:
        return self.stop_asked or time.monotonic() - self._last >= self._seconds

    def write(self, step: int, state: TrainingState, save_trainer_state: Callable[[str], None]) -> None:
        """Write a checkpoint, and keep only the `KEPT` newest.

        If it cannot be written, the training continues after a warning.
        """
        self._last = time.monotonic()
        try:
            self._write(step, state, save_trainer_state)
        except (OSError, RatchetError, SafetensorError) as error:
            say(
                f"train: no checkpoint at step {step}: {str(error).splitlines()[0]}; the training goes on",
                error=True,
            )
            return
        for _, old in self._steps()[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)

    def _write(self, step: int, state: TrainingState, save_trainer_state: Callable[[str], None]) -> None:
        tensors: dict[str, torch.Tensor] = {}
        rest = split(state, tensors)
        with whole_folder(self._folder / f"step-{step:08d}") as folder:
            save_file(tensors, folder / TENSORS)
            save_trainer_state(str(folder / TRAINER_STATE))
            write_json(folder / STATE, {"state": rest, "curve": self._curve()})
            for name in (TENSORS, TRAINER_STATE):
                _sync(folder / name)
            write_json(
                folder / MANIFEST,
                {
                    "step": step,
                    "facts": self._facts,
                    "files": {name: sha256_file(folder / name) for name in (TENSORS, STATE, TRAINER_STATE)},
                },
            )
            _sync(folder)
        _sync(self._folder)

    def newest(self, restore_curve: Callable[[Points], None]) -> Saved | None:
        """Return the newest valid checkpoint of the same training, or None; print which ones are skipped."""
        for half in self._folder.glob(".step-*.tmp"):  # left by a process that was killed while writing
            shutil.rmtree(half, ignore_errors=True)
        for step, folder in self._steps():
            if saved := self.read(step, folder, restore_curve):
                return saved
        if others := [path.name for path in self._all.glob("*") if path.name != self._folder.name]:
            say(
                f"train: from the start: {len(others)} checkpointed trainings were of other data, params or"
                f" code ({', '.join(self._differing())})"
            )
        return None

    def newest_on_all_nodes(self, restore_curve: Callable[[Points], None]) -> Saved | None:
        """Return what `newest` finds in the first process, which the others get from it.

        All processes call this together. Raises ConfigError if a node computes with other versions.
        """
        connect()
        saved = None if rank() else self.newest(restore_curve)
        folder = send_folder(saved.folder if saved else None, self._folder)
        if rank() and folder:
            saved = self.read(int(folder.name.removeprefix("step-")), folder, restore_curve)
        if any_of([folder is not None and saved is None])[0]:
            raise ConfigError(
                "a node cannot go on from the checkpoint of node 0",
                remedy="install the same lock on each node",
            )
        return saved

    def read(self, step: int, folder: Path, restore_curve: Callable[[Points], None]) -> Saved | None:
        """Read a checkpoint; print why it is passed over, and return None, if it is not valid."""
        try:
            if fault := self._fault(folder, step):
                say(f"train: the checkpoint of step {step} is passed over: {fault}", error=True)
                return None
            kept = read_json(folder / STATE)
            state = join(kept["state"], load_file(folder / TENSORS))
        except (OSError, RatchetError, SafetensorError, KeyError, TypeError, AttributeError) as error:
            why = str(error).splitlines()[0]
            say(f"train: the checkpoint of step {step} is passed over: {why}", error=True)
            return None
        restore_curve(kept["curve"])
        return Saved(folder, step, state)

    def _fault(self, folder: Path, step: int) -> str:
        if not (folder / MANIFEST).exists():
            return "it has no manifest"
        manifest = read_json(folder / MANIFEST)
        if manifest["step"] != step:
            return f"its manifest is of step {manifest['step']}"
        if odd := [
            name
            for name in (TENSORS, STATE, TRAINER_STATE)
            if not (folder / name).exists() or sha256_file(folder / name) != manifest["files"][name]
        ]:
            return f"{odd[0]} is not what its manifest says"
        if odd := sorted(key for key, value in self._facts.items() if manifest["facts"].get(key) != value):
            return f"{odd[0]} was {manifest['facts'].get(odd[0])}, is {self._facts[odd[0]]}"
        return ""

    def _differing(self) -> list[str]:
        """Name the facts that differ from those of other checkpoints, with both values if they are short."""
        found: dict[str, str] = {}
        for path in self._all.glob(f"*/step-*/{MANIFEST}"):
            try:
                theirs = read_json(path)["facts"]
                found |= {
                    key: _change(key, theirs.get(key), value)
                    for key, value in self._facts.items()
                    if theirs.get(key) != value and " " not in found.get(key, "")
                }
            except (RatchetError, KeyError, TypeError, AttributeError):
                continue
        return sorted(found.values())[:MOST_TOLD] or ["none of them is whole"]

    def _steps(self) -> list[tuple[int, Path]]:
        """List by step, the highest first; file times mislead if the clock was set back."""
        return sorted(
            (
                (int(named[1]), path)
                for path in self._folder.glob("step-*")
                if (named := STEP.fullmatch(path.name))
            ),
            reverse=True,
        )

    def keep_key(self) -> bytes:
        """Return the secret key of a private training, the same until the training has ended."""
        return keep_key(self._folder)

    def forget(self) -> None:
        """Remove all checkpoints of this checkout after a success: the others are of older data or params."""
        shutil.rmtree(self._all, ignore_errors=True)

    @contextmanager
    def asked_by_sigterm(self) -> Iterator[None]:
        """Let SIGTERM ask for a checkpoint and then for the end of the training.

        Outside the main thread it changes nothing, since Python sets signal handlers only there.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(*_: Any) -> None:
            self.stop_asked = True

        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def _change(key: str, before: Any, now: Any) -> str:
    short = before is not None and all(len(str(value)) < 30 for value in (before, now))
    return f"{key} {before} → {now}" if short else key


def split(value: Any, tensors: dict[str, torch.Tensor], path: str = "") -> Any:
    """Return `value` in a form for JSON, and put its tensors into `tensors` under their path.

    A dict becomes a list of pairs, because torch's state dicts have integer keys, which JSON would turn into
    strings.
    """
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        return {"items": [[key, split(part, tensors, f"{path}/{key}")] for key, part in value.items()]}
    if isinstance(value, list | tuple):
        return [split(part, tensors, f"{path}/{place}") for place, part in enumerate(value)]
    return value


def join(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Undo `split`; tuples come back as lists."""
    if isinstance(value, dict) and "tensor" in value:
        return tensors[value["tensor"]]
    if isinstance(value, dict):
        return {key: join(part, tensors) for key, part in value["items"]}
    return [join(part, tensors) for part in value] if isinstance(value, list) else value


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
