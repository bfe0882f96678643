"""Train with other settings, one Prefect task per trial, and propose the best ones as a change of
params.yaml: the flow `sweep`.

It works in a workspace whose results are not committed. MLflow gets each trial when it has ended; if MLflow
is down, the trials are delivered at the end or by the next sweep.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

import msgspec
import optuna
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.console import say
from flows.outage import show_artifact
from flows.training_inputs import make_material, open_bench
from ratchet.config.params import Config, load_config
from ratchet.errors import RatchetError, ServiceError, StageError
from ratchet.pipeline.checkout import locked
from ratchet.pipeline.dvc import Workspace
from ratchet.pipeline.stage import project_root
from ratchet.training.launch import Material, refuse_private
from ratchet.training.search_space import Changes, check_space, rows_key
from ratchet.training.trials import close_study, deliver
from tasks.sweep import Search, check_storage, propose

SETTINGS: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}


class Summary(TypedDict):
    """The result of a study; `diff` is the change of params.yaml that the best trial proposes."""

    study: str
    trials: int
    counts: dict[str, int]  # number of trials by state
    best: Any  # the best trial as JSON
    baseline: float | None  # the loss of today's settings, if they were tried
    unit: str
    diff: str
    applied: bool


@flow(name="sweep", flow_run_name="sweep", persist_result=False)
def sweep(root: str | None = None, trials: int | None = None, apply: bool = False) -> Summary:
    """Run the sweep.

    Raises ConfigError, DataError, StageError, ServiceError, and RatchetError when no trial was completed.
    """
    home = project_root(root)
    config = load_config(home / "params.yaml")
    if trials:
        config = config.model_copy(update={"sweep": config.sweep.model_copy(update={"trials": trials})})
    refuse_private(config, "sweep")
    check_space(config)
    check_storage(home, config)
    with locked(home, "sweep", wait=False), open_bench(home, "sweep", say) as workspace:
        material = make_rows.with_options(task_run_name="rows")(workspace, {})
        search = Search(home, config, material, commit=workspace.git("rev-parse", "HEAD").strip(), say=say)
        run_trials(search, workspace, config, material)
    summary = conclude(search, home, config, apply=apply)
    if not summary["best"]:
        raise RatchetError(
            f"none of {summary['trials']} trials was completed",
            remedy=f"their reasons stand in {search.folder.relative_to(home)}; make `sweep.space` narrower",
        )
    return summary


def run_trials(search: Search, workspace: Workspace, config: Config, material: Material) -> None:
    """Run the trials one after the other.

    Base and rows are made anew when a trial's settings require others.
    """
    made: Changes = {}
    while (trial := search.next()) is not None:
        if (wanted := rows_key(trial.user_attrs["changes"])) != made:
            try:
                material, made = (
                    make_rows.with_options(task_run_name=f"rows of trial {trial.number}")(workspace, wanted),
                    wanted,
                )
            except StageError as error:
                search.fail(trial, " ".join(str(error).split())[:500])
                made = {"failed": trial.number}
                continue
            except BaseException:
                search.put_back(trial, "interrupted")
                raise
        train.with_options(task_run_name=f"trial {trial.number}")(search, trial, material)
        tell_mlflow(search, config)


@task(name="rows", **SETTINGS)
def make_rows(workspace: Workspace, changes: Changes) -> Material:
    return make_material(workspace, changes, say)


@task(name="trial", **SETTINGS)
def train(search: Search, trial: optuna.Trial, material: Material) -> None:
    say(
        f"trial {trial.number}: "
        f"{', '.join(f'{key} {value}' for key, value in trial.user_attrs['changes'].items())}"
    )
    record = search.run(trial, material)
    loss = f"{record.value:.4f}" if record.value is not None else record.reason
    say(f"trial {trial.number}: {record.state}, {loss} ({record.ended - record.began:.0f} s)")


def tell_mlflow(search: Search, config: Config) -> None:
    """Deliver the trials to MLflow.

    After one failure it is not tried again in this sweep, because each try costs seconds.
    """
    if search.tracker_away:
        return
    try:
        deliver(search.folder, config)
    except ServiceError:
        search.tracker_away = True
        say(
            "MLflow does not answer: the trials are kept for it, and delivered at the end or by the "
            "next `ratchet sweep`"
        )


@task(name="propose", **SETTINGS)
def conclude(search: Search, home: Path, config: Config, *, apply: bool) -> Summary:
    best, counts = search.best(), search.counts()
    summary: Summary = {
        "study": search.name,
        "trials": sum(counts.values()),
        "counts": counts,
        "best": msgspec.to_builtins(best) if best else None,
        "baseline": search.baseline(),
        "unit": search.unit,
        "diff": propose(home, best, apply=apply) if best else "",
        "applied": apply and best is not None,
    }
    try:
        deliver(search.folder, config)
        close_study(search.name, config, best, trials=summary["trials"])
    except ServiceError:
        say("MLflow has no whole picture of this study: `ratchet up`, then the same command again")
    if best:
        show_artifact(
            config,
            "sweep",
            f"```diff\n{summary['diff']}```\n\n`{best.command}`\n",
            f"{search.unit} {best.value:.4f} (trial {best.number})",
        )
    return summary
