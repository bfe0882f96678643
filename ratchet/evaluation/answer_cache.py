"""Cache answers and likelihoods by model, so that an unchanged model on unchanged rows is not asked again.

`.ratchet/cache/answers/<model>.db` is one SQLite file per model. Its name is the hash of everything except
the rows that an answer depends on: weights, adapter settings, tokenizer, precision, library versions,
processor, threads, and the code that computes it. An entry is a whole forward batch under the hash of its
token ids and settings, because the other rows of a batch may change the last bits of a likelihood. So an
evaluation gives the same bytes with and without the cache. Each entry carries its own sha256.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ratchet.files import sha256_file, sha256_json
from ratchet.models.adapters import base_settings
from ratchet.models.loading import device, is_full, precision, weights_file
from ratchet.pipeline.dag import code_key
from ratchet.pipeline.stage import say

FOLDER = Path(".ratchet/cache/answers")
PACKAGES = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes")
CODE = (
    "ratchet/evaluation/answer_cache.py",
    "ratchet/evaluation/scoring.py",
)  # with all that they import, they compute an answer


class Answers:
    """Hold the known answers of one model.

    Without a `path`, nothing is known and nothing is kept. `patience`: seconds to wait for another process
    that writes.
    """

    def __init__(self, path: Path | None, *, patience: float = 5.0) -> None:
        self._path, self._patience = path, patience
        self._known = self._open(path) if path else None

    def _open(self, path: Path) -> sqlite3.Connection | None:
        """Open the database; replace a file that is no database."""
        for last_try in (False, True):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                return _connect(path, self._patience)
            except (sqlite3.Error, OSError) as error:
                _pass_over(path, error)
                if last_try or isinstance(error, sqlite3.OperationalError | OSError):
                    return None
                path.unlink(missing_ok=True)
        return None

    def get(self, key: str, rows: int) -> list[Any] | None:
        """Return what is stored under `key`, one entry per row; None when it is missing or damaged."""
        if not self._known:
            return None
        try:
            found = self._known.execute("select value, sha256 from answers where key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            self._give_up(error)
            return None
        if found is None:
            return None
        value, sum_ = found
        if not isinstance(value, str) or sum_ != _sum(key, value) or len(kept := json.loads(value)) != rows:
            say("evaluate: a cached answer is not what was written: it is computed again", error=True)
            return None
        return list(kept)

    def put(self, key: str, entries: list[Any]) -> None:
        """Store the entries. A failure prints a message and does not stop the evaluation."""
        if not self._known:
            return
        value = json.dumps(entries, allow_nan=False)
        try:
            with self._known:
                self._known.execute(
                    "insert or replace into answers values (?, ?, ?)", (key, value, _sum(key, value))
                )
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: sqlite3.Error) -> None:
        assert self._path
        _pass_over(self._path, error)
        self.close()
        if not isinstance(
            error, sqlite3.OperationalError
        ):  # a lock or a full disk passes, a broken file does not
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._known:
            self._known.close()
        self._known = None


@contextmanager
def open_answers(folder: Path | None, model: str) -> Iterator[Answers]:
    answers = Answers(folder / f"{model}.db" if folder else None)
    try:
        yield answers
    finally:
        answers.close()
        if folder and (path := folder / f"{model}.db").exists():
            os.utime(path)  # `forget_oldest` deletes the file that was used longest ago


def forget_oldest(folder: Path, most_mib: int) -> None:
    """Delete the files of the models that were asked longest ago, until the others fit into `most_mib`."""
    room = most_mib * 2**20
    for path in sorted(folder.glob("*.db"), key=lambda path: path.stat().st_mtime, reverse=True):
        room -= path.stat().st_size
        if room < 0:
            path.unlink(missing_ok=True)


def identity(base: Path, trained: Path | None, like: Path) -> str:
    """Hash a model that is to answer.

    It is `base` with what was trained in the folder `trained`; without that, the untouched base, loaded as
    `like` requires.
    """
    settings = base_settings(trained or like)
    parts = {
        "base": {
            path.name: sha256_file(path)
            for path in sorted(base.iterdir())
            if path.is_file() and path.name != "seen.txt"
        },
        "trained": _trained(trained) if trained else None,
        "settings": [*settings, precision(settings.method)[0]],
        "machine": _machine(),
        "code": code_key(CODE, Path(__file__).parents[2]),
    }
    return sha256_json(parts)[:32]


def _trained(folder: Path) -> dict[str, str]:
    """Hash the files that define the trained model, without its manifest.

    The champion's manifest names its version, and the same weights had a manifest without one when they were
    the candidate.
    """
    settings = ("config.json", "generation_config.json") if is_full(folder) else ("adapter_config.json",)
    return {
        path.name: sha256_file(path)
        for path in (weights_file(folder), *(folder / name for name in settings))
        if path.exists()
    }


def _machine() -> dict[str, Any]:
    import torch

    where = (
        torch.cuda.get_device_name()
        if device() == "cuda"
        else f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )
    return {"device": where, **{package: _version(package) for package in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _connect(path: Path, patience: float) -> sqlite3.Connection:
    known = sqlite3.connect(path, timeout=patience)
    try:
        # Without fsync a write takes 1.2 ms instead of 17. A power cut may damage the file; a damaged file
        # is replaced by a new one.
        known.execute("pragma synchronous = off")
        known.execute(
            "create table if not exists answers (key text primary key, value text, sha256 text) without rowid"
        )
    except sqlite3.Error:
        known.close()
        raise
    return known


def _sum(key: str, value: str) -> str:
    return hashlib.sha256(f"{key}\n{value}".encode()).hexdigest()


def _pass_over(path: Path, error: Exception) -> None:
    say(f"evaluate: the cached answers in {path.name} are passed over: {error}", error=True)
