"""Moving the champion: the commit decides, MLflow's alias follows, twice is once, and a rollback needs the
ledger alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from patience import within
from places import (
    KEPT_CONNECTIONS,
    commit,
    make_repository,
    subjects,
    use_git_without_a_user,
    use_mlflow,
    use_no_mlflow,
    write_files,
)

from flows.promotion import promote_version, roll_back
from ratchet.config.data import ProjectConfig
from ratchet.config.params import Config
from ratchet.errors import CheckoutError, ServiceError, UserError
from ratchet.evaluation.report import Metrics
from ratchet.models.manifests import TrainedManifest
from ratchet.pipeline.checkout import git
from ratchet.pipeline.workspace import open_workspace
from ratchet.promotion.champion import FILE, PENDING, Champion, alias_is_pending, read_champion, read_ledger
from ratchet.promotion.verdict import Candidate, Rival, Verdict
from ratchet.reporting.overview import look_around
from ratchet.services.status import ledger_lines, read_moves, see_status
from ratchet.tracking.mlflow import KEY_TAG, find_or_create_run, mlflow_client
from ratchet.tracking.registry import CHALLENGER, CHAMPION, get_alias, get_version, make_version, set_alias
from tasks.promote import follow_alias, promote, reconcile
from tasks.record import Findings

pytestmark = pytest.mark.filterwarnings(KEPT_CONNECTIONS)
CONFIG = Config(project=ProjectConfig(name="small"))


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    use_git_without_a_user(monkeypatch)
    use_mlflow(monkeypatch, tmp_path)
    return make_repository(tmp_path / "checkout")


def quiet(line: str) -> None:
    """Nobody listens."""


def register(number: int, *, rival: int | None, verdict: str = "promote", commit: str = "") -> int:
    """A version as `tasks.record` makes it."""
    adapter = Path("adapter")
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_model.safetensors").write_text(f"weights {number}")
    gate = {
        "verdict": verdict,
        "rival": rival,
        "metric": "exact_match",
        "mean": 0.2,
        "low": 0.1,
        "high": 0.3,
        "rows": 400,
    }
    tags = {
        KEY_TAG: f"key{number}",
        "git_commit": commit
        or (git(Path("checkout"), "rev-parse", "HEAD").strip() if Path("checkout").exists() else "0" * 40),
        "adapter_sha256": f"{number}" * 64,
        "data": json.dumps({"rows": 10 * number, "batches": number, "dvc": "d.dir"}),
        "batches": json.dumps([f"batch{known}.jsonl" for known in range(number)]),
        "gate": json.dumps(gate),
    }
    made = make_version("small", find_or_create_run("small", f"key{number}", {}), adapter, tags, "card")
    assert made.number == number
    return number


def take(root: Path, number: int, *, reason: str = "better", force: bool = False) -> Champion:
    return promote_version(root, CONFIG, number, reason=reason, force=force, say=quiet)


def back(root: Path, reason: str = "worse in use") -> Champion:
    return roll_back(root, CONFIG, reason=reason, say=quiet)


def reign(root: Path, versions: int) -> None:
    for number in range(1, versions + 1):
        take(root, register(number, rival=number - 1 or None))


# --- promotion ----------------------------------------------------------------------------------------------


def test_a_version_of_a_commit_that_is_not_here_is_not_put_in_charge(root):
    """Two checkouts share one registry: the other one's commit has to come here first, or nobody could fetch
    what was promoted.
    """
    before = git(root, "rev-parse", "HEAD")
    with pytest.raises(
        CheckoutError, match=r"(?s)v1 was made by commit abababab, which is not in this repository.*git pull"
    ):
        take(root, register(1, rival=None, commit="ab" * 20))
    assert (git(root, "rev-parse", "HEAD"), read_champion(root)) == (before, None)


def test_a_promotion_is_a_commit_a_tag_and_an_alias(root):
    chosen = take(root, register(1, rival=None))
    assert read_champion(root) == chosen
    assert (chosen.version, chosen.previous, chosen.replaced, chosen.move, chosen.by, chosen.why) == (
        1,
        None,
        None,
        "promote",
        "Ana",
        "better",
    )
    assert (chosen.commit, chosen.run_key, chosen.batches, chosen.data.rows, chosen.gate.mean) == (
        get_version("small", 1).tags["git_commit"],
        "key1",
        ["batch0.jsonl"],
        10,
        0.2,
    )
    assert subjects(root)[0] == "Promote small v1"
    assert git(root, "log", "-1", "--format=%b").strip() == "By Ana: better"
    assert git(root, "rev-parse", "model/small/v1") == git(root, "rev-parse", "HEAD")
    assert get_alias("small", CHAMPION) == 1
    assert git(root, "status", "--porcelain").strip() == ""
    assert not alias_is_pending(root)


def test_a_promotion_twice_is_a_promotion_once(root):
    first = take(root, register(1, rival=None))
    commits = subjects(root)
    assert take(root, 1, reason="again") == first
    assert subjects(root) == commits
    assert get_alias("small", CHAMPION) == 1


def test_the_next_one_takes_over_and_is_no_challenger_any_more(root):
    reign(root, 1)
    set_alias("small", CHALLENGER, register(2, rival=1))
    chosen = take(root, 2)
    assert (chosen.previous, chosen.replaced) == (1, 1)
    assert (get_alias("small", CHAMPION), get_alias("small", CHALLENGER)) == (2, None)


def test_another_challenger_stays_one(root):
    register(1, rival=None)
    set_alias("small", CHALLENGER, register(2, rival=1))
    take(root, 1)
    assert get_alias("small", CHALLENGER) == 2


@pytest.mark.parametrize("verdict", ["reject", "uncertain"])
def test_what_the_gate_did_not_pass_is_refused(root, verdict):
    register(1, rival=None, verdict=verdict)
    with pytest.raises(UserError, match=f"(?s)the gate's verdict on v1 is {verdict}.*--force --reason"):
        take(root, 1)
    assert read_champion(root) is None
    assert get_alias("small", CHAMPION) is None


def test_what_was_compared_with_another_champion_is_refused(root):
    register(1, rival=None)
    register(2, rival=None)
    take(root, 1)
    with pytest.raises(UserError, match="v2 was compared with the base, in charge is v1"):
        take(root, 2)
    take(root, register(3, rival=1))
    with pytest.raises(UserError, match="v2 was compared with the base, in charge is v3"):
        take(root, 2)


def test_a_person_may_overrule_the_gate_and_the_ledger_keeps_why(root):
    reign(root, 1)
    chosen = take(root, register(2, rival=None, verdict="reject"), reason="the base is to go", force=True)
    assert read_champion(root) == chosen
    assert chosen.why == "the base is to go"
    assert chosen.gate.verdict == "reject"


def test_an_unknown_version_is_refused_with_those_that_there_are(root):
    with pytest.raises(UserError, match="small has no version 7; registered: none"):
        take(root, 7)
    register(1, rival=None)
    with pytest.raises(UserError, match="small has no version 7; registered: v1"):
        take(root, 7)


def test_a_version_that_was_made_by_hand_is_refused_with_what_it_lacks(root):
    client = mlflow_client()
    client.create_registered_model("small")
    client.create_model_version("small", "file:///nowhere")
    with pytest.raises(UserError, match=r"v1 has no tag ratchet\.run_key, git_commit, .*"):
        take(root, 1, reason="I know it", force=True)


def test_a_registry_that_does_not_know_the_champion_gets_no_say(root, tmp_path, monkeypatch):
    """Numbers come from the registry: in an empty one the next candidate would be v1 once more."""
    reign(root, 1)
    (tmp_path / "empty").mkdir()
    use_mlflow(monkeypatch, tmp_path / "empty")
    (tmp_path / "empty" / "adapter").mkdir()
    make_version("small", find_or_create_run("small", "key9", {}), Path("adapter"), {KEY_TAG: "key9"}, "")
    with pytest.raises(
        UserError,
        match=r"champion\.json says v1 of small is in charge; "
        r"the registry has another model under that number",
    ):
        take(root, register(2, rival=1))
    assert read_champion(root).version == 1


def test_with_mlflow_away_nothing_is_promoted(root, monkeypatch):
    register(1, rival=None)
    use_no_mlflow(monkeypatch)
    with pytest.raises(ServiceError, match="MLflow at"):
        take(root, 1)
    assert read_champion(root) is None


def test_a_promotion_that_could_not_land_can_be_tried_again_in_the_same_clone(root):
    """A flow's task retries in its workspace: it must not take its own failed commit for the champion."""
    number = register(1, rival=None)
    with open_workspace(root, "test", quiet) as workspace:
        write_files(root, {"params.yaml": "project:\n  name: changed\n"})
        with pytest.raises(CheckoutError, match="was changed while the run worked"):
            promote(workspace, get_version("small", number), by="gate", why="better", force=False, say=quiet)
        assert read_champion(root) is None
        assert get_alias("small", CHAMPION) is None
        git(root, "checkout", "--", "params.yaml")
        promote(workspace, get_version("small", number), by="gate", why="better", force=False, say=quiet)
    assert read_champion(root).version == 1
    assert git(root, "rev-parse", "model/small/v1") == git(root, "rev-parse", "HEAD")


def test_a_retraining_decides_on_todays_champion_and_not_on_the_one_of_its_clone(root):
    """Somebody rolled back while the stages ran: the candidate beat a champion that is none any more."""
    from prefect.logging import disable_run_logger

    from flows.retrain import decide

    reign(root, 2)
    register(3, rival=2)
    verdict = Verdict("promote", [], Rival("champion", 2), [], Candidate("", ""))
    found = Findings(TrainedManifest(), {}, Metrics(2), verdict, {}, root)
    with open_workspace(root, "retrain", quiet) as workspace, disable_run_logger():
        back(root)
        assert decide.fn(workspace, get_version("small", 3), found, CONFIG, "new rows").version == 1
    assert read_champion(root).version == 1
    assert (get_alias("small", CHAMPION), get_alias("small", CHALLENGER)) == (1, None)


def test_a_tag_stays_where_a_version_first_took_charge(root):
    reign(root, 2)
    first = git(root, "rev-parse", "model/small/v1")
    take(root, 1, reason="back to the roots", force=True)
    assert git(root, "rev-parse", "model/small/v1") == first
    assert [champion.version for _, champion in read_ledger(root)] == [1, 2, 1]


# --- rollback -----------------------------------------------------------------------------------------------


def test_a_rollback_restores_the_whole_entry(root):
    reign(root, 1)
    before = read_champion(root)
    take(root, register(2, rival=1))
    now = back(root)
    assert read_champion(root) == now
    told = {"at", "by", "why", "move", "replaced"}
    for field in set(Champion.__struct_fields__) - told:
        assert getattr(now, field) == getattr(before, field), field
    assert (now.move, now.replaced, now.by, now.why) == ("rollback", 2, "Ana", "worse in use")
    assert subjects(root)[0] == "Roll back to small v1"
    assert get_alias("small", CHAMPION) == 1


def test_each_rollback_goes_one_version_further_back(root):
    reign(root, 3)
    assert [back(root).version, back(root).version] == [2, 1]
    with pytest.raises(UserError, match="v1 took over from no version: there is nothing to return to"):
        back(root)
    assert get_alias("small", CHAMPION) == 1


def test_after_a_rollback_the_next_promotion_takes_over_from_the_version_in_charge(root):
    reign(root, 2)
    back(root)
    take(root, register(3, rival=1))
    assert back(root).version == 1


def test_without_a_champion_there_is_nothing_to_roll_back(root):
    with pytest.raises(UserError, match="there is no champion to roll back from"):
        back(root)


def test_a_history_that_is_cut_off_is_told_with_its_remedy(root, tmp_path):
    reign(root, 2)
    git(tmp_path, "clone", "--quiet", "--depth", "1", f"file://{root}", "shallow")
    with pytest.raises(UserError, match=r"(?s)the ledger has no entry of v1.*--unshallow"):
        back(tmp_path / "shallow")


def test_a_rollback_works_with_mlflow_away_and_the_alias_follows_later(root, monkeypatch):
    reign(root, 2)
    known = os.environ["MLFLOW_TRACKING_URI"]
    told: list[str] = []
    use_no_mlflow(monkeypatch)
    with within(10):
        now = roll_back(root, CONFIG, reason="wrong answers", say=told.append)
    assert read_champion(root) == now
    assert now.version == 1
    assert any("the alias in MLflow follows later" in line for line in told)
    assert alias_is_pending(root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", known)
    assert get_alias("small", CHAMPION) == 2
    assert follow_alias(root, now, quiet) is True
    assert get_alias("small", CHAMPION) == 1
    assert not alias_is_pending(root)


KILLED_ROLLBACK = """
import os, sys
from pathlib import Path
from flows.promotion import roll_back
from ratchet.config.params import Config
os.environ["KILLED"] = str(os.getpid())
roll_back(Path(sys.argv[1]), Config(project={"name": "small"}), reason="worse", say=print)
"""


def test_a_rollback_that_is_killed_as_it_lands_is_told_and_the_next_command_moves_the_alias(root):
    reign(root, 2)
    hook = root / ".git/hooks/post-receive"
    hook.write_text('#!/bin/sh\nkill -9 "$KILLED"\n')
    hook.chmod(0o755)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", KILLED_ROLLBACK, root], env=environment, check=False)
    assert done.returncode == -9
    assert (read_champion(root).version, get_alias("small", CHAMPION)) == (1, 2)
    assert alias_is_pending(root)
    around = look_around(root, CONFIG, see_status(root, CONFIG))
    assert any("MLflow's alias" in line for line in around.wrong)
    reconcile(root, quiet)
    assert get_alias("small", CHAMPION) == 1 and not alias_is_pending(root)


def test_a_move_that_was_killed_before_it_landed_leaves_a_persons_alias_alone(root):
    reign(root, 1)
    write_files(root, {PENDING: "v2\n"})
    set_alias("small", CHAMPION, register(2, rival=1))
    reconcile(root, quiet)
    assert get_alias("small", CHAMPION) == 2 and not alias_is_pending(root)


def test_a_promotion_that_could_not_land_leaves_no_note(root):
    reign(root, 1)
    number = register(2, rival=1)
    with pytest.raises(CheckoutError), open_workspace(root, "promote", quiet, keep_failed=0) as workspace:
        write_files(root, {"params.yaml": "project: {name: small}  # changed\n"})
        promote(workspace, get_version("small", number), by="Ana", why="better", force=False, say=quiet)
    assert read_champion(root).version == 1 and not (root / PENDING).exists()


def test_a_rollback_leaves_the_users_files_alone(root):
    reign(root, 2)
    write_files(root, {"notes.txt": "mine"})
    back(root)
    assert (root / "notes.txt").read_text() == "mine"
    assert not any((root / ".ratchet" / "workspaces").iterdir())


def test_a_champion_file_that_is_garbage_is_refused(root):
    reign(root, 2)
    write_files(root, {FILE: "garbage"})
    commit(root, "Break it")
    with pytest.raises(CheckoutError, match="is no champion entry"):
        back(root)


# --- what people read ---------------------------------------------------------------------------------------


def test_the_history_tells_every_move_with_its_reason_data_and_gate(root):
    reign(root, 2)
    back(root, "wrong answers about refunds")
    moves = read_moves(root)
    rows = msgspec.to_builtins(moves)
    assert [(row["move"], row["from"], row["to"]) for row in rows] == [
        ("rollback", 2, 1),
        ("promote", 1, 2),
        ("promote", None, 1),
    ]
    assert json.loads(json.dumps(rows)) == rows
    text = "\n".join(ledger_lines(moves))
    for words in (
        "rollback v2 → v1  by Ana",
        "why   wrong answers about refunds",
        "promote  — → v1",
        "10 rows in 1 batches, DVC d.dir",
        "gate  promote against v1: exact_match +0.200 [+0.100, +0.300]",
    ):
        assert words in text
