"""Check the search space `sweep.space` before anything runs, let Optuna draw from it, apply the drawn values.

A key is one of `train` or `adapter`, or `base.model`, whose choices are bases, each followed by `@revision`
where it has one. Not covered: settings that depend on each other; a combination that params.yaml would refuse
makes that trial fail, with the reason.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ratchet.config.docs import yaml_value
from ratchet.config.params import Config, parse_config
from ratchet.config.training import AdapterConfig, SweepRange, TrainConfig
from ratchet.errors import ConfigError

if TYPE_CHECKING:
    from optuna.trial import Trial

BASE = "base.model"
PINNED = re.compile(r"(.*?)(?:@([0-9a-f]{40}|[0-9a-f]{64}))?")  # a URL may hold an @ as well
SECTIONS: dict[str, type[BaseModel]] = {"train": TrainConfig, "adapter": AdapterConfig}
# What the tokenized rows depend on besides the base (dvc.yaml, stage `tokenize`).
ROWS = ("train.rows", "train.replay", "train.max_feedback_share", "train.start_from")
# Each value of these is another loss, so that its trials could not be compared.
LOSS_KEYS = frozenset(
    f"train.{name}" for name in ("objective", "preference_beta", "chosen_weight", "undesirable_weight")
)
DIGITS = 4  # significant ones of a drawn number, which nobody wants as 0.0013862943611198906

Value = Any  # of a key of params.yaml: a number, a text, a list of names, or None
Changes = dict[str, Value]  # key of params.yaml → value; plain JSON


def check_space(config: Config) -> None:
    """Raise ConfigError for an empty space, and for all unknown keys and refused values at once."""
    if not config.sweep.space:
        raise ConfigError(
            "`sweep.space` is empty",
            remedy="name keys there, such as `train.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}`",
        )
    faults = [
        f"  {key}: {fault}"
        for key, values in config.sweep.space.items()
        for fault in _faults(config, key, values)
    ]
    if faults:
        raise ConfigError(
            f"`sweep.space` has {len(faults)} fault(s):\n" + "\n".join(faults),
            remedy="docs/params.md lists what each key takes",
        )


def _faults(config: Config, key: str, values: SweepRange | list[Value]) -> Iterator[str]:
    section, _, name = key.partition(".")
    if key != BASE and not (section in SECTIONS and name in SECTIONS[section].model_fields):
        known = ", ".join(
            f"{section}.{name}" for section, model in SECTIONS.items() for name in model.model_fields
        )
        yield f"no key that can be searched; known: {BASE}, {known}"
        return
    if key in LOSS_KEYS:
        yield "changes what the loss measures, so trials could not be compared by it"
        return
    if isinstance(values, SweepRange):
        current = None if key == BASE else getattr(getattr(config, section), name)
        if isinstance(current, bool) or not isinstance(current, int | float):
            yield "takes no range; wanted a list of choices"
            return
        if isinstance(current, int) and (
            found := [bound for bound in (values.low, values.high, values.step) if isinstance(bound, float)]
        ):
            yield f"takes whole numbers, got {found[0]}"
            return
    for value in [values.low, values.high] if isinstance(values, SweepRange) else values:
        try:
            with_changes(config, changes_of({key: value}))
        except ConfigError as error:
            yield " ".join(str(error).partition("\n  →")[0].split("\n", 1)[-1].split())


def with_changes(config: Config, changes: Changes) -> Config:
    """Return `config` with the changes. Raises ConfigError, as for a params.yaml that held them."""
    raw = config.model_dump()
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = raw
        for section in sections:
            place = place[section]
        place[last] = value
    return parse_config(raw, Path("params.yaml"))


def changes_of(drawn: Changes) -> Changes:
    """Turn drawn values into keys of params.yaml; a base brings its revision along."""
    changes = {key: value for key, value in drawn.items() if key != BASE}
    if BASE in drawn:
        model, revision = PINNED.fullmatch(str(drawn[BASE])).groups()  # type: ignore[union-attr]
        changes |= {"base.model": model, "base.revision": revision}
    return changes


def draw(trial: Trial, config: Config) -> Changes:
    """Draw a value for each key; a trial that was drawn before gets the same values again."""
    return {key: _draw(trial, key, values, config) for key, values in config.sweep.space.items()}


def _draw(trial: Trial, key: str, values: SweepRange | list[Value], config: Config) -> Value:
    if not isinstance(values, SweepRange):
        # Optuna keeps plain values only, so a list of names is stored as its JSON.
        named = {value if not isinstance(value, list) else json.dumps(value): value for value in values}
        return named[trial.suggest_categorical(key, list(named))]
    section, _, name = key.partition(".")
    if isinstance(getattr(getattr(config, section), name), int):
        return trial.suggest_int(
            key, int(values.low), int(values.high), step=int(values.step or 1), log=values.log
        )
    value = trial.suggest_float(
        key,
        float(values.low),
        float(values.high),
        step=None if values.step is None else float(values.step),
        log=values.log,
    )
    return min(max(float(f"{value:.{DIGITS}g}"), float(values.low)), float(values.high))


def current(config: Config) -> Changes | None:
    """Return the settings of params.yaml as a draw, to be tried too; None if one lies outside the space."""
    drawn = {}
    for key, values in config.sweep.space.items():
        value = getattr(getattr(config, key.partition(".")[0]), key.partition(".")[2])
        if key == BASE and config.base.revision:
            value = f"{value}@{config.base.revision}"
        inside = (
            values.low <= value <= values.high and not values.step
            if isinstance(values, SweepRange)
            else value in values
        )
        if not inside:
            return None
        drawn[key] = json.dumps(value) if isinstance(value, list) else value
    return drawn


def rows_key(changes: Changes) -> Changes:
    """Return the changes for which the base or the rows have to be made anew."""
    return {key: value for key, value in changes.items() if key.startswith("base.") or key in ROWS}


def dvc_command(changes: Changes) -> str:
    """Return the command that runs a trial as a DVC experiment: values in Hydra's form, shell-quoted.

    `++` sets a key that params.yaml holds, and adds one that it does not.
    """
    settings = [f"--set-param {shlex.quote(f'++{key}={_hydra(value)}')}" for key, value in changes.items()]
    return " ".join(["dvc exp run", *settings, "train"])


def _hydra(value: Value) -> str:
    if isinstance(value, list):
        return f"[{','.join(_hydra(part) for part in value)}]"
    if isinstance(value, str):  # a revision of digits alone would be read as a number
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return yaml_value(value)
