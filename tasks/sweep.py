"""Search settings: each trial is a training of its own (`python -m tasks.train`), judged by its validation
loss.

A flow's task, not a stage. A bad trial is ended early. The study is in a database (Optuna's), so that it
outlives a killed sweep and several machines can share it; what belongs to one machine, such as records for
MLflow, is in `.ratchet/sweeps/<study>/`. A study is of one base, one set of rows and one space: others make
another study, since their losses are not comparable.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import make_url
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from ratchet.config.edit import diff_params, edit_params
from ratchet.config.params import Config
from ratchet.errors import ConfigError, DataError, RatchetError, ServiceError
from ratchet.files import read_json, sha256_json, write_text
from ratchet.models.adapters import SHAPE
from ratchet.models.loading import MANIFEST, adapter_sha256
from ratchet.tracking.curve import read_history
from ratchet.tracking.mlflow import PASSWORD
from ratchet.training.launch import CANDIDATE, REPORTS, Ended, Material, read_figures, run_training
from ratchet.training.schedule import Points
from ratchet.training.search_space import BASE, changes_of, current, draw, dvc_command, with_changes
from ratchet.training.trials import Best, TrialRecord

FOLDER, DATABASE = Path(".ratchet/sweeps"), Path(".ratchet/sweep.db")
STORAGE_VARIABLE = "RATCHET_SWEEP_STORAGE"
TODAY = "today"  # marks the trial of today's settings
CONNECT_SECONDS = 10
OPENING = (ImportError, RuntimeError)  # no driver; tables of another Optuna
# How often a trial gives a sign of life, and after how long without one another machine's trial is lost.
ALIVE_SECONDS, LOST_SECONDS = 15.0, 3600.0
DRAWS = 1000  # without new settings, after which all are taken to be tried

Say = Callable[[str], None]


class Search:
    """One study as one machine works on it.

    It is used under a lock: so a running trial of this machine that another process began has lost that
    process.
    """

    def __init__(self, home: Path, config: Config, material: Material, *, commit: str, say: Say) -> None:
        """Open the study or create it.

        Raises ConfigError, DataError: there is nothing to search by; ServiceError: the storage does not
        answer.
        """
        check_start_allows(config, material.incumbent)
        if not read_json(material.tokens / "profile.json")["validation"]["windows"]:
            raise DataError(
                "there are no validation rows to compare trials by", remedy="raise `prepare.validation_share`"
            )
        self._home, self._config, self._commit, self._say = home, config, commit, say
        self.tracker_away = False
        self.unit = "nats a row" if BASE in config.sweep.space else "nats a learned token"
        self._worker = (
            f"{socket.gethostname()}-{hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:8]}"
        )
        self.name = f"{config.project.name}-{sha256_json(_facts(config, material))[:12]}"
        self.folder = home / FOLDER / self.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._study = _open(home, config, self.name)
        self._give_up_lost()
        if not self._trials() and (now := current(config)):
            # What a better trial has to beat.
            self._study.enqueue_trial(now, user_attrs={TODAY: True}, skip_if_exists=True)
        say(f"sweep: study {self.name}, {self.finished} of {config.sweep.trials} trials are done")

    @property
    def finished(self) -> int:
        return sum(_counts(trial) and trial.state.is_finished() for trial in self._trials())

    def next(self) -> optuna.Trial | None:
        """Return the next trial with its settings drawn; None when there are enough, running ones included.

        Raises ServiceError: the storage does not answer.
        """
        with storage_errors():
            return self._next()

    def _next(self) -> optuna.Trial | None:
        self._give_up_lost()
        trials = self._trials()
        if sum(map(_counts, trials)) >= self._config.sweep.trials:
            return None
        # A sampler with one seed would draw the same settings again after an interruption, or on two
        # machines.
        elsewhere = zlib.crc32(self._worker.encode()) if _url(self._home, self._config)[1] else 0
        self._study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=self._config.sweep.startup_trials,
            seed=(self._config.sweep.seed + 1000 * len(trials) + elsewhere) % 2**32,
        )
        trial = self._study.ask()
        if trial.user_attrs.get(TODAY) and any(
            other.user_attrs.get(TODAY) for other in self._trials() if other.number < trial.number
        ):
            self._fail(trial, "machines that began at once have each queued today's settings", counts=False)
            return self._next()
        trial.set_user_attr("worker", self._worker)
        trial.set_user_attr("alive", time.time())
        drawn = draw(trial, self._config)
        changes = changes_of(drawn)
        trial.set_user_attr("changes", changes)
        trial.set_user_attr("command", dvc_command(changes))
        trial.set_user_attr("commit", self._commit)
        before = [other for other in self._trials() if other.number < trial.number and _counts(other)]
        if twin := next((other for other in before if other.user_attrs.get("changes") == changes), None):
            self._fail(trial, f"the settings of trial {twin.number}, drawn again", counts=False)
            return self._next() if self._queue_untried(len(trials)) else None
        if len(before) >= self._config.sweep.trials:
            self._fail(trial, "not needed: others were faster", counts=False)
            return None
        return trial

    def _queue_untried(self, seed: int) -> bool:
        """Queue settings that no trial has; False when none are found, so that a small space ends the sweep.

        The same settings give the same loss, so a second training of them would tell nothing.
        """
        tried = [trial.user_attrs.get("changes") for trial in self._trials() if _counts(trial)]
        dice = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        for _ in range(DRAWS):
            trial = dice.ask()
            if changes_of(draw(trial, self._config)) not in tried:
                self._study.enqueue_trial(trial.params)
                return True
        self._say(f"sweep: all settings of the space are tried, {len(tried)} in number")
        return False

    def run(self, trial: optuna.Trial, material: Material) -> TrialRecord:
        """Train by the trial's settings and return its record, also for a training that fails.

        An interruption puts the settings back into the queue and is raised again.
        """
        changes, began = trial.user_attrs["changes"], time.time()
        # By its settings, not its number: after an interruption it goes on from its checkpoint.
        folder = self.folder / sha256_json(changes)[:16]
        follower = _Follower(trial, unit(material, self._config))
        try:
            folder.mkdir(exist_ok=True)
            ended = run_training(folder, material, with_changes(self._config, changes), follower)
            state, value, reason = follower.conclude(ended, folder)
        except RatchetError as error:
            state, value, reason, ended = (
                TrialState.FAIL,
                None,
                " ".join(str(error).partition("\n  →")[0].split())[:500],
                None,
            )
        except BaseException:
            self.put_back(trial, "interrupted")
            raise
        with storage_errors():
            try:
                trial.set_user_attr("reason", reason)
                self._study.tell(trial, value, state=state)
            except UpdateFinishedTrialError:
                state, value, reason = (
                    TrialState.FAIL,
                    None,
                    "another machine took it for lost and tries its settings again",
                )
        complete = state == TrialState.COMPLETE
        record = TrialRecord(
            number=trial.number,
            study=self.name,
            state=state.name.lower(),
            value=value,
            reason=reason,
            changes=changes,
            command=trial.user_attrs["command"],
            commit=self._commit,
            began=began,
            ended=time.time(),
            points=follower.points,
            figures=dict(read_figures(folder)) if complete else {},
            manifest=read_json(folder / CANDIDATE / MANIFEST) if complete else {},
            said=ended.said if ended else [],
        )
        record.write(self.folder)
        shutil.rmtree(folder, ignore_errors=True)
        return record

    def put_back(self, trial: optuna.Trial, reason: str) -> None:
        """Queue the trial's settings for the next worker."""
        self._study.enqueue_trial(trial.params)
        self._fail(trial, reason, counts=False)

    def fail(self, trial: optuna.Trial, reason: str) -> None:
        self._fail(trial, reason, counts=True)

    def best(self) -> Best | None:
        done = [
            trial
            for trial in self._trials()
            if trial.state == TrialState.COMPLETE and trial.value is not None
        ]
        if not done:
            return None
        first = min(done, key=lambda trial: (trial.value, trial.number))
        return Best(
            first.number, first.value or 0.0, first.user_attrs["changes"], first.user_attrs["command"]
        )

    def baseline(self) -> float | None:
        """Return the loss of today's settings, if they were tried."""
        now = current(self._config)
        wanted = changes_of(now) if now else None
        return next(
            (
                trial.value
                for trial in self._trials()
                if trial.state == TrialState.COMPLETE and trial.user_attrs["changes"] == wanted
            ),
            None,
        )

    def counts(self) -> dict[str, int]:
        trials = [trial for trial in self._trials() if _counts(trial)]
        return {
            state.name.lower(): sum(trial.state == state for trial in trials)
            for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING)
        }

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _fail(self, trial: optuna.Trial, reason: str, *, counts: bool) -> None:
        trial.set_user_attr("reason", reason)
        trial.set_user_attr("counts", counts)
        self._study.tell(trial, state=TrialState.FAIL)

    def _give_up_lost(self) -> None:
        """Queue the settings of trials whose process was killed."""
        for trial in self._trials():
            attributes = trial.user_attrs
            silent = time.time() - attributes.get(
                "alive", trial.datetime_start.timestamp() if trial.datetime_start else 0
            )
            if trial.state == TrialState.RUNNING and (
                attributes.get("worker") == self._worker or silent > LOST_SECONDS
            ):
                self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                if "changes" in attributes:
                    self._study.enqueue_trial(trial.params)
                self._say(
                    f"sweep: trial {trial.number} was lost with its process; its settings are tried again"
                )


class _Follower:
    """Report each new validation loss to the study, and say when to end the training."""

    def __init__(self, trial: optuna.Trial, unit: float) -> None:
        self._trial, self._unit = trial, unit
        self._reported, self._alive = 0, time.monotonic()
        self.points: Points = []

    def __call__(self, points: Points) -> bool:
        self.points = points or self.points
        try:
            if time.monotonic() - self._alive > ALIVE_SECONDS:
                self._alive = time.monotonic()
                self._trial.set_user_attr("alive", time.time())
            return self._report() and self._trial.should_prune()
        except StorageInternalError:  # away for a while: the training goes on, and is asked about again
            return False
        except UpdateFinishedTrialError:  # taken for lost elsewhere
            return True

    def _report(self) -> bool:
        """Report new losses and tell whether there were any.

        They are numbered, not given by optimizer step: trials of other batch sizes measure at other steps,
        but at the same shares of the training.
        """
        measured = [
            point["validation_loss"] * self._unit for point in self.points if "validation_loss" in point
        ]
        new = measured[self._reported :]
        for loss in new:
            self._trial.report(loss, self._reported)
            self._reported += 1
        return bool(new)

    def conclude(self, ended: Ended, folder: Path) -> tuple[TrialState, float | None, str]:
        if ended.stopped:
            return (
                TrialState.PRUNED,
                None,
                f"ended after {self._reported} measurements: worse than the median of the others",
            )
        if ended.code:
            return TrialState.FAIL, None, ended.reason
        self.points = read_history(folder / f"{REPORTS}/history.jsonl")
        self._report()
        loss = read_figures(folder)["best_validation_loss"]
        assert loss is not None  # a study needs validation rows, and is refused without them
        return TrialState.COMPLETE, loss * self._unit, ""


def unit(material: Material, config: Config) -> float:
    """Return what a loss is multiplied by: 1, or learned tokens a row where bases are searched.

    Tokens of different bases differ in length, so losses are compared in nats a row instead of nats a token.
    """
    if BASE not in config.sweep.space:
        return 1.0
    validation = read_json(material.tokens / "profile.json")["validation"]
    return float(validation["learned_tokens"] / validation["rows"])


def check_start_allows(config: Config, incumbent: Path) -> None:
    """Raise ConfigError when trainings would start from a champion of another shape or base."""
    if config.train.start_from == "base" or read_json(incumbent / MANIFEST)["version"] is None:
        return
    shapes = {f"adapter.{key}" for keys in SHAPE.values() for key in keys} | {"adapter.method", BASE}
    if found := sorted(shapes & config.sweep.space.keys()):
        raise ConfigError(
            f"`sweep.space` holds {', '.join(found)}, and `train.start_from` is champion:"
            " its adapter has one shape and one base",
            remedy="set `train.start_from: base`, or take them out",
        )


def _facts(config: Config, material: Material) -> dict[str, object]:
    """Return what losses depend on beside what is searched."""
    manifest = read_json(material.incumbent / MANIFEST)
    champion = (
        "champion" in (config.train.start_from, config.train.teacher) and manifest["version"] is not None
    )
    params = {section: getattr(config, section).model_dump(mode="json") for section in ("train", "adapter")}
    return {
        "tokens": read_json(material.tokens / "profile.json")["sha256"],
        "base": {
            key: read_json(material.base / MANIFEST).get(key)
            for key in ("model", "revision", "files", "weights")
        },
        "start": adapter_sha256(material.incumbent) if champion else "base",
        "params": {
            f"{section}.{key}": value
            for section, values in params.items()
            for key, value in values.items()
            if f"{section}.{key}" not in config.sweep.space
        },
        "space": config.sweep.model_dump(mode="json")["space"],
    }


def _url(home: Path, config: Config) -> tuple[str, bool]:
    """Return the database's URL, and whether other machines may share it."""
    url = os.environ.get(STORAGE_VARIABLE) or config.sweep.storage
    return (url, True) if url else (f"sqlite:///{(home / DATABASE).absolute()}", False)


def _open(home: Path, config: Config, name: str) -> optuna.Study:
    url, _ = _url(home, config)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Losses measured at other shares of the way are not comparable.
    comparable = "train.evaluations" not in config.sweep.space
    pruner = (
        optuna.pruners.MedianPruner(n_startup_trials=config.sweep.startup_trials)
        if comparable
        else optuna.pruners.NopPruner()
    )
    with storage_errors(*OPENING):
        return optuna.create_study(
            study_name=name, storage=_storage(url), direction="minimize", pruner=pruner, load_if_exists=True
        )


def check_storage(home: Path, config: Config) -> None:
    """Try a storage for several machines before minutes are spent on rows.

    Raises ConfigError, ServiceError.
    """
    url, shared = _url(home, config)
    if shared:
        with storage_errors(*OPENING):
            storage = _storage(url)
            storage.remove_session()
            storage.engine.dispose()


def _storage(url: str) -> RDBStorage:
    """Open the storage; try again where creating its tables fails, as it does for all but one of the machines
    that begin at once."""
    _check_url(url)
    settings: dict[str, Any] = (
        {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    )
    if url.startswith("postgresql"):
        settings["connect_args"] = {"connect_timeout": CONNECT_SECONDS}
    for pause in (0.2, 1.0):
        try:
            return RDBStorage(url, engine_kwargs=dict(settings))
        except (IntegrityError, ProgrammingError):
            time.sleep(pause)
    return RDBStorage(url, engine_kwargs=settings)


def _check_url(url: str) -> None:
    """Raise ConfigError for what is no URL, and show nothing of it.

    A driver would show what follows an @ in a password as the name of a host.
    """
    try:
        known = "@" not in (make_url(url).host or "")
    except (SQLAlchemyError, ValueError):
        known = False
    if not known:
        raise ConfigError(
            f"{STORAGE_VARIABLE}, or else `sweep.storage`, is no database URL",
            remedy="write postgresql+psycopg://USER:PASSWORD@HOST:5432/DATABASE;"
            " within a password @ is %40, / is %2F, % is %25",
        )


@contextmanager
def storage_errors(*also: type[Exception]) -> Iterator[None]:
    kinds: tuple[type[Exception], ...] = (SQLAlchemyError, StorageInternalError, *also)
    try:
        yield
    except kinds as error:
        first = PASSWORD.sub("//", (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0])
        remedy = (
            f"`sweep.storage` and {STORAGE_VARIABLE} name it; PostgreSQL is postgresql+psycopg://…"
            " with the extra `store`. The same command goes on with the study"
        )
        raise ServiceError(f"the study's storage does not answer: {first}", remedy=remedy) from None


def _counts(trial: FrozenTrial) -> bool:
    """Tell whether a trial counts towards `sweep.trials`: not if it waits, was lost, or was put back."""
    if trial.state == TrialState.FAIL:
        return bool(trial.user_attrs.get("reason")) and bool(trial.user_attrs.get("counts", True))
    return trial.state != TrialState.WAITING


def propose(home: Path, best: Best, *, apply: bool) -> str:
    """Return the best settings as a unified diff of params.yaml, and write them if `apply`.

    The diff is empty where params.yaml has them already.
    """
    path = home / "params.yaml"
    before = path.read_text(encoding="utf-8")
    after = edit_params(before, best.changes)
    if apply and after != before:
        write_text(path, after)
    return diff_params(before, after)
