"""Take a source's rows in as one immutable batch, a DVC version and a data commit: the flow `ingest`.

That commit starts a retraining, by the GitHub workflow or by the event that is sent here (`retrain.on_data`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from flows.console import say
from flows.events import COMMITTED, tell
from flows.retries import can_pass, on_top
from ratchet.config.params import Config, load_config
from ratchet.errors import UserError
from ratchet.pipeline.checkout import locked, who
from ratchet.pipeline.dvc import Workspace, bring, push_data
from ratchet.pipeline.stage import project_root
from ratchet.pipeline.workspace import land, open_workspace
from ratchet.sources import reviewed as review
from ratchet.sources.streams import shown
from tasks.erase import find_batch
from tasks.ingest import BASE, Pulled, add_batch, check_rows, freeze_golden, pull

RAW, GOLDEN = Path("data/raw"), Path("data/golden.jsonl")
GOLDEN_MEDIA = GOLDEN.with_suffix(".tar")
SETTINGS: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}


class Ingested(TypedDict):
    """The result of an ingest: the batch or the golden file, its rows, whether they are new, the commit."""

    batch: str
    rows: int
    new: bool
    commit: str


def name_run() -> str:
    """Name the run after what it pulls, for the list of runs."""
    given = flow_run.parameters
    what = (
        given.get("draft")
        or shown(given.get("path") or "")
        or ", ".join(given.get("packages") or [])
        or given.get("source")
        or "the source of params.yaml"
    )
    return f"{'freeze golden rows' if given.get('golden') else 'ingest'}: {what}"


@flow(name="ingest", flow_run_name=name_run, persist_result=False)
def ingest(
    root: str | None = None,
    source: str | None = None,
    path: str | None = None,
    packages: list[str] | None = None,
    golden: int = 0,
    draft: str | None = None,
    columns: dict[str, str] | None = None,
    query: str | None = None,
    held_out: bool = False,
    like: str | None = None,
) -> Ingested:
    """Take rows in as a batch. With `golden`, freeze that many rows as the golden set instead.

    With `held_out`, all rows are test rows and none is ever learned; `like` names the batch, or the beginning
    of its name, whose test rows they count among.

    Raises UserError when there is no such batch, or the rows cannot be held out; DataError, CheckoutError.
    """
    home = project_root(root)
    config = load_config(home / "params.yaml")
    if like and not held_out:
        raise UserError("`like` is said of held-out rows alone", remedy="add --held-out, or leave --like out")
    if held_out and golden:
        raise UserError("golden rows are held out already", remedy="leave --held-out or --golden out")
    pulled = pull_rows(config, home, source, path, packages, draft, columns, query)
    if held_out and pulled.source == "feedback":
        raise UserError(
            "people's feedback cannot be held out: they mostly correct wrong answers of the champion, so it "
            "would lose on these rows by their choice",
            remedy="hold out rows of a file or a reviewed draft; feedback is there to be learned",
        )
    check_rows(pulled, config)

    def take_in() -> Ingested:
        with open_workspace(home, "ingest", say, keep_failed=config.retrain.keep_workspaces) as workspace:
            done = (
                commit_golden(workspace, pulled, config, golden)
                if golden
                else commit_batch(workspace, pulled, config, held_out=held_out, like=like or "")
            )
        if done["new"] and not (golden or held_out):  # there is nothing new to learn
            tell(COMMITTED, config, {"reason": f"new data: {done['batch']}", **done})
        if pulled.drafts and not golden:
            review.mark_taken(home, pulled.drafts, done["batch"])
        return done

    with locked(home, "ingest"):
        return on_top(take_in, say)


@task(name="pull", retries=2, retry_delay_seconds=5, retry_condition_fn=can_pass, **SETTINGS)
def pull_rows(
    config: Config,
    root: Path,
    source: str | None,
    path: str | None,
    packages: list[str] | None,
    draft: str | None = None,
    columns: dict[str, str] | None = None,
    query: str | None = None,
) -> Pulled:
    pulled = pull(
        config,
        root=root,
        source=source,
        path=path,
        packages=packages,
        draft=draft,
        columns=columns,
        query=query,
    )
    for line in pulled.said:
        say(line)
    say(f"{len(pulled.lines)} rows from {pulled.source} ({pulled.label}), form {pulled.form}")
    return pulled


@task(name="commit", **SETTINGS)
def commit_batch(
    workspace: Workspace, pulled: Pulled, config: Config, *, held_out: bool = False, like: str = ""
) -> Ingested:
    bring(workspace, str(RAW))
    batch, new = add_batch(
        workspace.path / RAW,
        pulled,
        licence=config.ingest.licence,
        who=", ".join(pulled.reviewers) or who(workspace.root),
        held_out=held_out,
        like=find_batch(workspace.path / RAW, like).name if like else "",
    )
    if not new:
        say(f"these rows are known: batch {batch.name} of {batch.time}; nothing was added")
        return {
            "batch": batch.name,
            "rows": batch.rows,
            "new": False,
            "commit": workspace.git("rev-parse", "HEAD").strip(),
        }
    workspace.dvc("add", "--quiet", str(RAW))
    push_data(workspace, say)
    trailers = [f"Batch: {batch.name}", *(f"Reviewed-by: {name}" for name in pulled.reviewers)]
    commit = land(
        workspace,
        f"{'Hold out' if held_out else 'Ingest'} {batch.rows} rows from {pulled.source} ({pulled.label})"[:72]
        + "\n\n"
        + "\n".join(trailers),
        [f"{RAW}.dvc", "data/.gitignore"],
    )
    say(f"batch {batch.name}: {batch.rows} {'held-out ' if held_out else ''}rows, commit {commit[:8]}")
    return {"batch": batch.name, "rows": batch.rows, "new": True, "commit": commit}


@task(name="freeze", **SETTINGS)
def commit_golden(workspace: Workspace, pulled: Pulled, config: Config, rows: int) -> Ingested:
    frozen = freeze_golden(
        workspace.path / GOLDEN, pulled, config, rows=rows, base=workspace.root / BASE, tell=say
    )
    commit = land(
        workspace,
        f"Freeze a golden set of {frozen} rows from {pulled.source} ({pulled.label})"[:72],
        [str(GOLDEN), *([str(GOLDEN_MEDIA)] if (workspace.path / GOLDEN_MEDIA).exists() else [])],
    )
    say(f"{GOLDEN}: {frozen} rows, commit {commit[:8]}")
    return {"batch": str(GOLDEN), "rows": frozen, "new": True, "commit": commit}
