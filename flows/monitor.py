"""Test whether the traffic still fits the champion, and whether a retraining is worth it: the flow `monitor`.

It reads the request log, lets tasks measure and decide, and tells Prefect. The event `ratchet.drift.detected`
starts `retrain`. MLflow gets a copy of the report; the verdict does not depend on it.
"""

from __future__ import annotations

import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from prefect import flow, task
from prefect.artifacts import create_link_artifact
from prefect.cache_policies import NO_CACHE

from flows.console import log_line, say, working
from flows.events import DRIFTED, artifact_key, tell
from flows.outage import keep_going, show_artifact
from ratchet.config.params import Config, load_config
from ratchet.data.batches import read_manifest
from ratchet.errors import RatchetError, ServiceError
from ratchet.monitoring.request_log import open_log
from ratchet.monitoring.retrain_budget import is_under_way, last_start, note_asked, read_retrains
from ratchet.monitoring.topics import sources_for
from ratchet.monitoring.verdicts import REPORTS, Decision, Quality, Recorded, Verdict
from ratchet.pipeline.stage import project_root
from ratchet.promotion.champion import Champion, read_champion
from ratchet.promotion.rollout import read_rollout
from ratchet.reporting.markdown import drift_card
from ratchet.tracking.mlflow import log_report
from tasks import monitor as tasks
from tasks.ingest import count_new, pull
from tasks.quality import watch_quality

SETTINGS: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}
KEPT_REPORTS = 50  # 4 MB each; MLflow keeps all of them
WEEK = 7 * 86_400.0
NO_CHAMPION = "nobody is in charge yet: there is nothing to compare the traffic with"


@flow(name="monitor", persist_result=False)
def monitor(root: str | None = None, retrain: bool = True) -> Recorded | None:
    """Judge the newest requests; return None while no version is in charge.

    With `retrain`, a decision to retrain is sent as an event. The command that started the flow prints the
    verdict, so lines go only to Prefect's log.

    Raises the errors of the log and of DVC.
    """
    home = project_root(root)
    config = load_config(home / "params.yaml")
    champion = read_champion(home)
    if champion is None:
        log_line(NO_CHAMPION)
        return None
    verdict, folder = look_at(home, config, champion)
    verdict = tasks.with_quality(verdict, look_at_quality(home, config, champion))
    decision = weigh(home, config, champion, verdict)
    found = tasks.append_verdict(home, champion, verdict, decision, folder)
    show(home, config, champion, found, folder)
    if decision.retrain and retrain:
        note_asked(home)
        tell(
            DRIFTED,
            config,
            {"reason": reason_of(found), "topics": [msgspec.to_builtins(topic) for topic in verdict.topics]},
        )
    return found


@task(name="measure", **SETTINGS)
def look_at(home: Path, config: Config, champion: Champion) -> tuple[Verdict, Path | None]:
    """Return the verdict on the newest window and the folder of its report.

    A window that is too small gets no report.
    """
    reference = tasks.read_reference(home, config, champion)
    log = open_log(home, config)
    try:
        since = time.time() - config.monitor.max_age_hours * 3600
        window = log.window(limit=config.monitor.window, since=since, version=champion.version)
        earlier = (
            log.window(limit=10 * config.monitor.window, until=window[0].at, version=champion.version)
            if window
            else []
        )
        feedback = log.feedback_of([request.id for request in [*earlier, *window]])
    finally:
        log.close()
    with working("measuring …"):
        verdict = tasks.measure(window, feedback, earlier, reference, config)
        log_line(
            f"{verdict.verdict} on {verdict.rows} requests"
            + (f", p = {verdict.p:.4f}" if verdict.p is not None else f"; wanted {verdict.needed}")
        )
        folder = (
            tasks.write_report(
                verdict, reference, window, home / REPORTS / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
            )
            if verdict.p is not None
            else None
        )
    for old in sorted((home / REPORTS).glob("*"))[:-KEPT_REPORTS]:
        shutil.rmtree(old, ignore_errors=True)
    return verdict, folder


@task(name="measure quality", **SETTINGS)
def look_at_quality(home: Path, config: Config, champion: Champion) -> Quality | None:
    """Return the share of right answers, as far as it is watched.

    A judge or a queue that is away must not keep the verdict on drift from being given.
    """
    try:
        found = watch_quality(home, config, champion.version, time.time())
    except RatchetError as error:
        say(f"the quality is not measured this time: {error}")
        return None
    if found:
        log_line(found.describe())
    return found


@task(name="decide", **SETTINGS)
def weigh(home: Path, config: Config, champion: Champion, verdict: Verdict) -> Decision:
    """Decide whether to retrain, from drift, rows to learn from, budget and cool-down."""
    now = time.time()
    week = read_retrains(home, since=now - WEEK)
    last, current = last_start(home), read_rollout(home)
    facts = tasks.Facts(
        new_rows=count_labelled(home, config, champion, verdict) if verdict.verdict == "drift" else None,
        retrains_week=len(week),
        gpu_hours_week=sum(entry.seconds for entry in week) / 3600,
        hours_since_retrain=None if last is None else (now - last) / 3600,
        rollout_of=current.version if current else None,
        under_way=is_under_way(home),
        known_rows=sum(
            batch.rows for batch in read_manifest(home / "data/raw") if batch.name in set(champion.batches)
        ),
    )
    decision = tasks.decide(verdict, facts, config)
    for line in decision.for_:
        log_line(f"for a retraining: {line}")
    for line in decision.against:
        log_line(f"against it: {line}")
    return decision


def count_labelled(home: Path, config: Config, champion: Champion, verdict: Verdict) -> int:
    """Count the labelled rows that the champion has not seen.

    They are in batches that came since, and in the sources of the drifted topics. Those sources are only read
    here; their rows are not taken in yet.
    """
    pulled = []
    for source in sources_for(verdict.topics, config.monitor):
        try:
            pulled.append(pull(config, root=home, **source.arguments()))
        except RatchetError as error:
            say(f"no rows from {source.source}: {str(error).splitlines()[0]}")
    return count_new(home, set(champion.batches), pulled)


def reason_of(found: Recorded) -> str:
    if found.quality and found.quality.alarm:
        return found.quality.describe()
    topics = ", ".join(topic.name for topic in found.topics[:3])
    return f"drift (p = {found.p:.4f}): {topics or 'no topic stands out'}"


@task(name="show", **SETTINGS)
def show(home: Path, config: Config, champion: Champion, found: Recorded, folder: Path | None) -> None:
    """Show the verdict as an artifact; put its report into the champion's MLflow run, with a link to it."""
    show_artifact(config, "drift", drift_card(found), f"{found.verdict} on {found.rows} requests")
    if folder is None or found.p is None:
        return
    try:
        link = log_report(champion.run_id, folder, {"drift/p": found.p, "drift/rows": found.rows})
    except ServiceError as error:
        say(f"the report stays in {folder.relative_to(home)}, MLflow has no copy: {error}")
        return
    key = artifact_key(config, "drift-report")
    keep_going(
        lambda: create_link_artifact(link, key=key, description="Evidently's report, in MLflow"),
        f"the artifact {key} is left out",
    )
