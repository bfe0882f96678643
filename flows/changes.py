"""Compare two commits as a retraining would see them, for the comment on a pull request.

The rows of both are prepared in a workspace whose results are not committed. Nothing is trained, and neither
MLflow nor Prefect is asked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from flows.data_check import read_rejected
from flows.training_inputs import make_material
from ratchet.config.docs import yaml_value
from ratchet.config.params import Config, load_config
from ratchet.config.survey import read_settings
from ratchet.data.erasure import FILE as FORGOTTEN
from ratchet.data.erasure import read_forgotten
from ratchet.data.profile import Profile
from ratchet.errors import CommandError, DataError, RatchetError, UserError
from ratchet.files import read_json
from ratchet.pipeline.checkout import Say, check_checkout, git
from ratchet.pipeline.dvc import Workspace, bring, changed_stages, check_out, downstream
from ratchet.pipeline.workspace import clone, get_output
from ratchet.promotion.verdict import Verdict, read_verdict
from ratchet.reporting.changes import Changes, Cost, Side
from ratchet.training.estimate import Plan, plan_training
from tasks.pin import pin
from tasks.prepare import Rejection, prepare

VERDICT = "reports/gate.json"


def find_changes(
    home: Path,
    since: str,
    say: Say,
    *,
    measure: bool = False,
    describe: Callable[[Plan, Config], list[str]] = lambda *_: [],
) -> Changes:
    """Compare HEAD with what it has in common with `since`; `measure` also runs a few steps of the training.

    Raises UserError: there is no such commit; CheckoutError: uncommitted changes, or rows that are not here.
    """
    before = _common_commit(home, since)
    branch = check_checkout(home)
    with clone(home, "changes", say, "--branch", branch, keep_failed=0) as path:
        workspace = Workspace(home, path, branch)
        head = workspace.git("rev-parse", "HEAD").strip()
        workspace.git("fetch", "--quiet", "origin", before)
        workspace.git("checkout", "--quiet", "--detach", before)
        say(f"the rows of {before[:8]} are prepared …")
        old, their_rejected = _side(workspace)
        old_settings, _ = _settings(workspace.path)
        workspace.git("checkout", "--quiet", workspace.branch)
        say(f"the rows of {head[:8]} are prepared …")
        new, rejected = _side(workspace)
        settings, fault = _settings(workspace.path)
        known = old.profile.batches if old.profile else {}
        stages = [] if fault else changed_stages(workspace)
        then = downstream(workspace.path, stages)
        cost = None
        if "train" in {*stages, *then} and not new.fault:
            cost = _cost(workspace, before, old.profile, new.profile, say, measure, describe)
        return Changes(
            before,
            head,
            old,
            msgspec.structs.replace(new, places=_first_places(rejected, set(known))),
            [
                (key, yaml_value(old_settings.get(key)), yaml_value(value))
                for key, value in settings.items()
                if old_settings.get(key) != value
            ]
            if old_settings
            else [],
            fault,
            stages,
            [stage for stage in then if stage not in stages],
            cost,
            _new_verdict(workspace, before),
            waiting=sum(row.review for row in rejected) - sum(row.review for row in their_rejected),
        )


def _common_commit(home: Path, since: str) -> str:
    """Return the newest commit that HEAD and `since` have in common: what `since` got later is no change.

    Raises UserError.
    """
    try:
        asked = ("rev-parse", "--verify", "--quiet", "--end-of-options", f"{since}^{{commit}}")
        commit = git(home, *asked).strip()
    except CommandError:
        raise UserError(
            f"{since!r} names no commit here",
            remedy="git fetch brings the other side's commits; `--since origin/main` is the usual one",
        ) from None
    try:
        return git(home, "merge-base", "HEAD", commit).strip()
    except CommandError:
        raise UserError(
            f"HEAD and {since!r} have no commit in common",
            remedy="git fetch --unshallow, if the history is cut off",
        ) from None


def _side(workspace: Workspace) -> tuple[Side, list[Rejection]]:
    """Prepare the rows of the commit that is checked out; return their counts and the rejected rows."""
    here = workspace.path
    if not (here / "data/raw.dvc").exists():
        return Side(), []
    bring(workspace, "data/raw")
    said: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ratchet-changes-") as scratch:
        out, fault = Path(scratch) / "prepared", ""
        try:
            config = load_config(here / "params.yaml").prepare
            forgotten = read_forgotten(here / FORGOTTEN)
            golden = here / "data/golden.jsonl"
            prepare(here / "data/raw", golden, out, config, forgotten=forgotten, tell=said.append)
        except (DataError, UserError) as error:
            # Without the row that the message quotes: its text stays with the data.
            fault = str(error).partition("\n")[0].partition(" The first: ")[0]
        if not (out / "profile.json").exists():
            return Side(None, fault, said), []
        profile = msgspec.convert(read_json(out / "profile.json"), Profile)
        return Side(profile, fault, said), read_rejected(out / "rejected.jsonl")


def _first_places(rejected: list[Rejection], known: set[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for row in rejected:
        if row.batch not in known:
            found.setdefault(row.reason, f"{row.batch}:{row.line}")
    return found


def _settings(here: Path) -> tuple[dict[str, object], str]:
    """Return every setting by its key, or none and why params.yaml cannot be read."""
    try:
        return {one.key: one.value for one in read_settings(here / "params.yaml", everything=True)}, ""
    except RatchetError as error:
        return {}, " ".join(str(error).split())


def _new_verdict(workspace: Workspace, before: str) -> Verdict | None:
    """Return the gate's verdict if it is another than that of the earlier commit."""
    path = workspace.path / VERDICT
    if not path.exists():
        return None
    try:
        if workspace.git("show", f"{before}:{VERDICT}") == path.read_text(encoding="utf-8"):
            return None
    except CommandError:  # the earlier commit has none
        pass
    return read_verdict(path)


def _cost(
    workspace: Workspace,
    before: str,
    old: Profile | None,
    new: Profile | None,
    say: Say,
    measure: bool,
    describe: Callable[[Plan, Config], list[str]],
) -> Cost:
    """Estimate the training, by the last one's rate and, with `measure`, from a few of its own steps."""
    config = load_config(workspace.path / "params.yaml")
    rows = _training_rows(new)
    found = Cost(rows=rows, per_hour=config.gate.worth.cost_per_hour)
    with tempfile.TemporaryDirectory(prefix="ratchet-changes-") as scratch:
        try:
            get_output(workspace.root, before, "reports/train", Path(scratch) / "train")
            seconds = float(read_json(Path(scratch) / "train/figures.json")["seconds"])
            found = msgspec.structs.replace(
                found, last_seconds=seconds, last_rows=_training_rows(old), seconds=seconds
            )
            if found.last_rows:
                found = msgspec.structs.replace(found, seconds=seconds * rows / found.last_rows)
        except (RatchetError, OSError, KeyError):  # the commit has no training, or its report is not here
            pass
    if not measure:
        return found
    try:
        check_out(workspace)
        pin(workspace)
        plan = plan_training(make_material(workspace, {}, say), config, say)
    except RatchetError as error:
        return msgspec.structs.replace(found, why=" ".join(str(error).split()))
    return msgspec.structs.replace(found, measured=describe(plan, config), seconds=plan.stage_seconds)


def _training_rows(profile: Profile | None) -> int:
    return profile.total.accepted.get("train", 0) if profile else 0
