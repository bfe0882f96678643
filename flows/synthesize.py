"""Let a teacher model write rows, and queue the accepted ones for review: the flow `synthesize`.

The teacher's client retries by itself (ratchet/llm/client.py); `resume` continues a run that ended early.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from flows.console import say
from flows.outage import show_artifact
from ratchet.config.params import Config, load_config
from ratchet.pipeline.stage import project_root
from ratchet.synthesis.draft import Summary, find_draft, summary_card
from tasks import synthesize as tasks

SETTINGS: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}


def name_run() -> str:
    given = flow_run.parameters
    return (
        f"resume {given['resume']}"
        if given.get("resume")
        else f"synthesize: {given.get('mode') or 'documents'}"
    )


@flow(name="synthesize", flow_run_name=name_run, persist_result=False)
def synthesize(
    root: str | None = None,
    mode: str = "documents",
    documents: list[str] | None = None,
    seeds: str = "",
    count: int | None = None,
    resume: str | None = None,
) -> Summary:
    """Write a draft and queue it; return the summary with `queued`, the rows that are new in the review
    queue.

    Raises the errors of `tasks.synthesize`.
    """
    home = project_root(root)
    config = load_config(home / "params.yaml")
    summary = write(config, home, tasks.Wanted(mode, tuple(documents or ()), seeds, count), resume)
    return msgspec.structs.replace(summary, queued=queue(config, home, summary))


@task(name="write", **SETTINGS)
def write(config: Config, home: Path, wanted: tasks.Wanted, resume: str | None) -> Summary:
    summary = tasks.synthesize(config, home, wanted, say=say, resume=resume)
    show_artifact(
        config, "synthesis", summary_card(summary), f"{summary.kept} rows in the draft {summary.draft}"
    )
    return summary


@task(name="queue", **SETTINGS)
def queue(config: Config, home: Path, summary: Summary) -> int:
    queued = tasks.queue_rows(home, config, find_draft(home, summary.draft))
    say(f"{queued} rows wait in the review queue")
    return queued
