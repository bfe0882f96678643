"""Go from the newest commit to a verdict, and to a promotion when the gate agrees: the flow `retrain`.

It orders, retries and decides; tasks compute. There is one Prefect task per stage of dvc.yaml, and one `dvc
status` tells which stages are unchanged. If MLflow is down at the end, the verdict is committed all the same,
and the next run skips every stage and registers it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.console import log_line, say, working
from flows.data_check import REJECTED, read_rejected
from flows.erase import follow_all, list_is_pending
from flows.execution import Execution
from flows.ingest import ingest
from flows.outage import show_artifact
from flows.retries import can_pass
from flows.review_queue import queue_doubtful
from flows.upstream import give_back, take_in
from ratchet.config.monitoring import TopicSource
from ratchet.config.params import Config, load_config
from ratchet.errors import CheckoutError, DataError, RatchetError, UserError
from ratchet.files import write_bytes, write_json
from ratchet.monitoring.retrain_budget import remember
from ratchet.monitoring.topics import FILE as REGION
from ratchet.monitoring.topics import Region, sources_for, write_region
from ratchet.monitoring.verdicts import Topic
from ratchet.pipeline.checkout import check_lock, locked, who
from ratchet.pipeline.dag import KEYS, STAGES, write_keys
from ratchet.pipeline.dvc import Workspace, check_out, downstream, push_data, stale_stages
from ratchet.pipeline.integrity import check_inputs
from ratchet.pipeline.stage import project_root
from ratchet.pipeline.work_branch import TRAVELS
from ratchet.pipeline.workspace import catch_up, land, open_workspace
from ratchet.promotion.champion import Champion, alias_is_pending, last_entry, read_champion
from ratchet.promotion.plain_words import tell_verdict
from ratchet.promotion.verdict import read_verdict
from ratchet.reporting.evaluation_page import gather, keep_page
from ratchet.reporting.forest import FOREST, draw_forest
from ratchet.reporting.markdown import model_card
from ratchet.reporting.retention import SAVED, build, numbers_of, registered_numbers
from ratchet.tracking.mlflow import find_outage
from ratchet.tracking.registry import CHALLENGER, Version, set_alias
from tasks.erase import inherit
from tasks.pin import READERS, TRAINING, needs_pin, pin, pin_looks, pin_privacy
from tasks.promote import check_registry, follow_alias, promote
from tasks.record import (
    Findings,
    close_lost_runs,
    read_findings,
    record,
    record_page,
    register,
)

if TYPE_CHECKING:
    from ratchet.federation.rounds import Link

SETTINGS: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}
RETRIED: dict[str, Any] = {**SETTINGS, "retries": 2, "retry_delay_seconds": 5, "retry_condition_fn": can_pass}
READ_BY_TRAIN = ["data/tokenized", "models/base", "models/incumbent"]
REGISTERED = ["models/candidate", "reports/train", "reports/evaluation", "reports/parity.json"]


class Retrained(NamedTuple):
    """The result of a retraining; versions are given by their numbers."""

    verdict: str
    sentence: str  # the verdict in plain words
    reasons: list[str]
    regions: list[str]  # one line per drifted topic
    stages: dict[str, bool]  # stage → whether it ran
    version: int | None
    champion: int | None


@flow(name="retrain", flow_run_name="retrain: {reason}", persist_result=False)
def retrain(
    root: str | None = None,
    reason: str = "by hand",
    force: bool = False,
    topics: list[dict[str, Any]] | None = None,
    sync: bool = False,
) -> Retrained:
    """Run the stale stages, then promote the candidate, start its rollout, or keep the champion.

    `force` compares with today's champion even when nothing else changed. `topics` are those that drifted
    (`ratchet.monitoring.topics`; `[]` means drift without a topic). Their rows and people's feedback are
    pulled first, and the evaluation reports the topics separately. `sync` first takes in the commits of the
    checkout's git remote, and pushes what the run committed.

    Raises the errors of the checkout, the stages and MLflow.
    """
    home = project_root(root)
    if sync:
        take_in(home, say)
    config = load_config(home / "params.yaml")
    with_nodes = config.retrain.trains_with == "nodes"
    if with_nodes:
        require_nodes(home, config)
    region = Region(msgspec.convert(topics, list[Topic])) if topics else None
    for source in (
        sources_for(region.topics if region else [], config.monitor) if topics is not None else []
    ):  # without a topic, only feedback is pulled
        pull_topic(home, source)
    with retraining(home, config) as workspace:
        config = load_config(workspace.path / "params.yaml")  # with what others pushed, where it lands there
        if region:
            land_region(workspace, region)
        stale = bring_up_to_date(workspace, force)
        do = train_with_nodes if with_nodes else go_round
        done = do(workspace, config, reason, stale)
    if sync and config.landing == "checkout":
        give_back(home, say)
    return done


@contextmanager
def retraining(home: Path, config: Config) -> Iterator[Workspace]:
    """Yield the workspace of a retraining, of which there is one at a time. Raises CheckoutError."""
    with (
        locked(home, "retrain"),
        open_workspace(home, "retrain", say, keep_failed=config.retrain.keep_workspaces) as workspace,
    ):
        check_lock(home)
        yield workspace


def require_nodes(home: Path, config: Config) -> None:
    """Wait until enough nodes are connected to train with, before anything is made for the training.

    Raises ConfigError: their updates could not be aggregated; UserError: too few are invited or connected, or
    this is a node; ServiceError: the link to them does not run.
    """
    from ratchet.federation.link.flower import FOLDER, FlowerLink, check_invited, read_names
    from ratchet.federation.records import NODE
    from ratchet.federation.records import SETTINGS as NODE_SETTINGS
    from ratchet.federation.rounds import wait_for_nodes
    from tasks.federate import check_trainable, is_interrupted  # loads torch

    check_trainable(config)
    names = list(read_names(home / FOLDER).values())
    if not names and (home / NODE / NODE_SETTINGS).exists():
        raise UserError(
            f"{home} is a node of a federation",
            remedy="its coordinator starts the runs: ratchet federate run",
        )
    check_invited(names, config.federate)
    if not is_interrupted(home):  # its nodes may have answered before they went away
        wait_for_nodes(FlowerLink(home), config.federate, say)


def train_with_nodes(workspace: Workspace, config: Config, reason: str, stale: set[str]) -> Retrained:
    """Do what a retraining does, with the rounds of the federation in place of the stage `train`."""
    from ratchet.federation.link.flower import FlowerLink
    from tasks.federate import forget_run, train_together  # loads torch

    home = workspace.root

    def train(inside: Workspace) -> None:
        train_together(inside.path, home, config, FlowerLink(home), say)

    found = go_round(workspace, config, reason, stale | {"train"}, train)
    forget_run(home)
    if found.verdict == "promote":
        give_to_nodes(workspace, FlowerLink(home), config, found.version)
    return found


@task(name="deliver", **SETTINGS)
def give_to_nodes(workspace: Workspace, link: Link, config: Config, version: int | None) -> None:
    """Give the nodes the version. It has landed, so a failure is only reported."""
    from ratchet.federation.delivery import deliver  # loads torch

    models, seconds = workspace.path / "models", config.federate.round_minutes * 60
    try:
        deliver(link, models / "candidate", models / "base", version, seconds, say)
    except (RatchetError, OSError) as error:
        say(f"the nodes have not got the version: {str(error).splitlines()[0]}")


def go_round(
    workspace: Workspace,
    config: Config,
    reason: str,
    stale: set[str],
    train: Callable[[Workspace], None] | None = None,
) -> Retrained:
    """Run the stages from the first stale one to a verdict, land it, register the version, and decide.

    `train` takes the place of the stage of that name: it writes the same outputs, and DVC records them.
    """
    home, execution = workspace.root, Execution(config)
    ran: dict[str, bool] = {}
    began = time.monotonic()
    try:
        for stage in STAGES:
            needed = stage in stale or any(ran.values())
            if stage == "train" and train:
                ran[stage] = train_otherwise(workspace, train)
            else:
                ran[stage] = stage_task.with_options(task_run_name=stage)(
                    workspace, stage, execution, needed=needed
                )
            if stage == "prepare" and ran[stage]:
                ask_people(workspace, config)
            if stage == "train" and ran[stage]:
                pin_privacy(workspace)
    except BaseException:  # drift's budget and cool-down count failed runs too
        remember(home, reason=reason, seconds=time.monotonic() - began, run_key="", verdict="failed")
        raise
    if any(ran.values()):
        commit = land_outputs(workspace, reason)
        execution.forget(workspace)
    else:
        commit = workspace.git("rev-parse", "HEAD").strip()
    found = read_findings(workspace.path)
    if ran["train"]:
        remember(
            home,
            reason=reason,
            seconds=found.figures["seconds"],
            run_key=found.manifest.run_key,
            verdict=found.decision.verdict,
        )
    champion = read_champion(workspace.path)
    if not any(ran.values()) and is_in_charge(home, champion, found):
        say("the champion was made from exactly this: nothing to do")
        version = champion.version if champion else None
    else:
        registered = publish(workspace, found, config, commit, reason)
        version, champion = registered.number, decide(workspace, registered, found, config, reason)
    in_charge, passed = champion.version if champion else None, found.decision.verdict == "promote"
    return Retrained(
        verdict=found.decision.verdict,
        sentence=tell_verdict(found.decision, promoted=passed and in_charge == version),
        reasons=found.decision.reasons,
        regions=[part.reason for part in found.decision.regions],
        stages=ran,
        version=version,
        champion=in_charge,
    )


def is_in_charge(root: Path, champion: Champion | None, found: Findings) -> bool:
    """Return whether the candidate is the champion, with the same verdict, and MLflow is up to date.

    Only files are read: asking MLflow would take longer than everything else when there is nothing to do.
    """
    return (
        champion is not None
        and champion.run_key == found.manifest.run_key
        and champion.gate.verdict == found.decision.verdict
        and not (alias_is_pending(root) or list_is_pending(root))
    )


@task(name="pull topic", **SETTINGS)
def pull_topic(root: Path, source: TopicSource) -> None:
    """Pull one batch of rows for a drifted topic. Raises CheckoutError.

    A source without rows is only reported, because the other sources may be enough.
    """
    try:
        ingest(root=str(root), **source.arguments())
    except CheckoutError:
        raise
    except RatchetError as error:
        say(f"no rows from {source.source}: {error}")


@task(name="region", **RETRIED)
def land_region(workspace: Workspace, region: Region) -> None:
    write_region(workspace.path / REGION, region)
    land(workspace, f"Watch {', '.join(topic.name for topic in region.topics)}"[:72], [str(REGION)])


@task(name="workspace", **RETRIED)
def bring_up_to_date(workspace: Workspace, force: bool) -> set[str]:
    """Check out the inputs and return the names of the stages that have to run.

    If there is something to train, the champion is pinned. Raises DataError when there is no batch yet.
    """
    if not (workspace.path / "data/raw.dvc").exists():
        raise DataError(
            f"{workspace.root} holds no batch of rows yet", remedy="ratchet ingest --path FILE takes rows in"
        )
    check_out(workspace)
    stale = stale_stages(workspace)
    if needs_pin(workspace, stale, force=force) and pin(workspace):
        stale |= READERS
    if stale & TRAINING and pin_looks(workspace):
        stale |= {"gate"}
    after = downstream(workspace.path, stale)
    waiting = [
        ", ".join(stage for stage in STAGES if stage in stale),
        *([f"then what depends on it: {', '.join(after)}"] if after else []),
    ]
    say(f"to run: {'; '.join(waiting) if stale else 'nothing, every stage is unchanged'}")
    if stale:
        tell_outage()
    return stale


def tell_outage() -> None:
    """Say at the start when MLflow is away: the stages run without it, but nothing can be registered."""
    if why := find_outage():
        say(
            "MLflow does not answer: the stages run all the same and their verdict is committed, but no "
            "version is registered or promoted, and the run ends with an error. `ratchet up` starts it, also "
            "while this run goes on; afterwards `ratchet retrain` registers the version and runs no stage "
            f"again. Seen: {why}"
        )


@task(name="stage", **SETTINGS)
def stage_task(workspace: Workspace, stage: str, execution: Execution, *, needed: bool) -> bool:
    """Run the stage if it is needed, and return whether it ran.

    It is not retried, because a stage gives the same result for the same inputs.
    """
    if not needed:
        say(f"{stage}: unchanged")
        return False
    with working(f"{stage} …"):
        # The command prints the gate's verdict and reasons at its end; here they would appear twice.
        return execution.run(workspace, stage, log_line if stage == "gate" else say)


@task(name="train", **SETTINGS)
def train_otherwise(workspace: Workspace, train: Callable[[Workspace], None]) -> bool:
    """Make the outputs of the stage `train` in another way, and let DVC record them as the stage's."""
    check_inputs(workspace.path, READ_BY_TRAIN)
    with working("train …"):
        train(workspace)
    write_keys(workspace.path)
    workspace.dvc("commit", "--quiet", "--force", "train")
    return True


@task(name="doubts", **SETTINGS)
def ask_people(workspace: Workspace, config: Config) -> int:
    """Queue the rows with a doubt for people, and return how many were added.

    No training waits for people's answers, or fails because the queue cannot be written.
    """
    try:
        added = queue_doubtful(
            workspace.root, workspace.path / "data", read_rejected(workspace.path / REJECTED), config
        )
    except Exception as error:  # noqa: BLE001  (a file of this machine; the rows stay in rejected.jsonl)
        say(f"the rows with doubts did not reach the review queue: {error}")
        return 0
    if added:
        say(f"{added} rows wait for a person's word: /review on the gateway, or `ratchet review next`")
    return added


@task(name="land", **RETRIED)
def land_outputs(workspace: Workspace, reason: str) -> str:
    """Push the data, commit what git tracks, move the checkout, and return the commit's id."""
    push_data(workspace, say)
    workspace.dvc(
        "commit", "--quiet", "--force", KEYS.name
    )  # otherwise a `dvc repro` by hand would change dvc.lock
    draw_verdict(workspace)
    present = [path for path in TRAVELS if (workspace.path / path).exists()]
    return land(workspace, f"Retrain: {reason}"[:72], present)


def draw_verdict(workspace: Workspace) -> None:
    """Draw the verdict's forest plot beside it; a failure is only reported, as the image only repeats it."""
    try:
        image = draw_forest(read_verdict(workspace.path / "reports/gate.json"))
        write_bytes(workspace.path / FOREST, [image])
    except Exception as error:  # noqa: BLE001  (no verdict has to wait for an image)
        say(f"{FOREST} was not drawn: {str(error).partition(chr(10))[0]}")


@task(name="register", **RETRIED)
def publish(workspace: Workspace, found: Findings, config: Config, commit: str, reason: str) -> Version:
    """Register the candidate as a version, complete its run, and publish the verdict as the flow run's
    artifact.
    """
    check_inputs(workspace.path, REGISTERED)
    if current := read_champion(workspace.path):
        check_registry(current)
    lost = close_lost_runs(config, but=found.manifest.run_key)
    run_id = record(found, config, commit=commit, reason=reason)
    version = register(found, config, run_id=run_id, commit=commit)
    show_retention(workspace, found, config, run_id, version)
    if list_is_pending(workspace.root):
        follow_all(workspace.root, config, say)
    else:
        inherit(version)
    closed = f"; closed {lost} lost runs" if lost else ""
    say(f"{config.project.name} v{version.number} registered{closed}")
    card = model_card(
        found.metrics,
        found.decision,
        {"version": f"{config.project.name} v{version.number}", "git commit": commit, "reason": reason},
    )
    show_artifact(config, "gate", card, f"{config.project.name} v{version.number}: {found.decision.verdict}")
    return version


def show_retention(
    workspace: Workspace, found: Findings, config: Config, run_id: str, version: Version
) -> None:
    """Show what each version still knows, with the evaluation's page.

    A failure is only reported: no version has to wait for a page.
    """
    try:
        retention = build(
            workspace.root,
            config.gate.metric,
            {**registered_numbers(config.project.name), **numbers_of(workspace.root)},
        )
        write_json(workspace.root / SAVED, msgspec.to_builtins(retention))
        page = gather(found.folder, f"v{version.number}", retention)
        keep_page(workspace.root, page)
        record_page(found, page, retention, run_id=run_id)
    except Exception as error:  # noqa: BLE001  (the page only repeats what files hold)
        why = (str(error) or type(error).__name__).splitlines()[0]
        say(
            f"the evaluation's page is not in MLflow: {why}; "
            f"`ratchet gate explain v{version.number} --page FILE` writes it"
        )


@task(name="decide", **RETRIED)
def decide(
    workspace: Workspace, version: Version, found: Findings, config: Config, reason: str
) -> Champion | None:
    """Promote the version, or leave that to a person or a rollout; return the champion afterwards."""
    with locked(workspace.root, "promote"):
        catch_up(workspace)  # a person may have moved the champion while the stages ran
        return _decide(workspace, version, found, config, reason)


def _decide(
    workspace: Workspace, version: Version, found: Findings, config: Config, reason: str
) -> Champion | None:
    current = read_champion(workspace.path)
    # Only a pending alias is moved: one that a person moved is a decision, for the flow `rollout`.
    if current and alias_is_pending(workspace.root):
        follow_alias(workspace.root, current, say)
    if found.decision.verdict != "promote" or (current and current.version == version.number):
        return current
    if last_entry(workspace.path, version.number):
        say(
            f"v{version.number} was in charge before and was rolled back; "
            f"`ratchet promote {version.number}` would put it back"
        )
        return current
    if found.decision.rival.version != (current.version if current else None):
        say(
            f"v{version.number} was compared with another champion than today's; "
            "`ratchet retrain --force` compares again"
        )
        return current
    set_alias(config.project.name, CHALLENGER, version.number)
    if config.promotion == "manual":
        say(
            f"v{version.number} waits for a person: `ratchet promote {version.number}`, "
            "or the tag `decision` = `approve` on the version in MLflow"
        )
        return current
    if config.promotion == "rollout" and current and config.rollout.steps[0] < 1:
        say(
            f"v{version.number} is the challenger: its rollout starts at the next look "
            "(`ratchet rollout look`, or by itself where `ratchet up` runs)"
        )
        return current
    return promote(workspace, version, by=f"gate ({who(workspace.root)})", why=reason, force=False, say=say)
