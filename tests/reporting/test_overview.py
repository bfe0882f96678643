"""`ratchet status` in fifteen lines: what matters first, whatever state the checkout is in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from busy import CONFIG, HOSTILE, check, make_busy
from places import commit, make_repository, use_git_without_a_user

from ratchet.config.params import Config
from ratchet.data.examples import Message
from ratchet.federation.link.flower import FOLDER
from ratchet.federation.records import NODE, SETTINGS, Node
from ratchet.files import read_json, write_json
from ratchet.monitoring.request_log import URL_VARIABLE
from ratchet.pipeline.workspace import open_workspace
from ratchet.promotion.rollout import read_rollout, write_rollout
from ratchet.reporting.overview import (
    EVERYTHING,
    MOST_LINES,
    describe_all,
    describe_in_short,
    look_around,
)
from ratchet.review.queue import ReviewQueue
from ratchet.review.records import Item
from ratchet.services.status import Answering, Status, describe, see_status

NAMES = ("mlflow", "prefect", "deployments", "gateway")
MANUAL = CONFIG.model_copy(update={"promotion": "manual"})


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    use_git_without_a_user(monkeypatch)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow sets it in the process of other tests
    monkeypatch.delenv(URL_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def _busy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        use_git_without_a_user(patch)
        return make_busy(tmp_path_factory.mktemp("status") / "checkout")


@pytest.fixture
def busy(_busy: Path, tmp_path: Path) -> Path:
    return shutil.copytree(_busy, tmp_path / "checkout")


def seen(root: Path, config: Config = CONFIG, columns: int = 100, **services: Answering) -> list[str]:
    """The lines; of any state they are at most fifteen, of at most so many columns, and end with the rest."""
    status = see_status(root, config)
    if services:
        status = msgspec.structs.replace(status, services=services)
    lines = describe_in_short(status, look_around(root, config, status), columns)
    assert len(lines) <= MOST_LINES and max(map(len, lines)) <= columns
    assert lines[-1] == f"more       {EVERYTHING}"
    return lines


def part(lines: list[str], head: str) -> str:
    """The text that begins with `head`, with the lines that belong to it; empty without one."""
    heads = [line[:10].strip() for line in lines]
    if head not in heads:
        return ""
    first = heads.index(head)
    after = next((place for place in range(first + 1, len(heads)) if heads[place]), len(heads))
    return " ".join(line[11:].strip() for line in lines[first:after])


def test_a_fresh_clone_says_what_to_do_next(tmp_path: Path) -> None:
    lines = seen(make_repository(tmp_path / "fresh"))
    assert part(lines, "champion") == "nobody yet"
    assert part(lines, "wrong") == f"not running: {', '.join(NAMES)}: ratchet up"
    assert part(lines, "data").endswith("ratchet ingest --path FILE")
    assert [line[:10].strip() for line in lines] == ["project", "champion", "wrong", "data", "more"]


def test_services_that_answer_are_named_and_one_that_does_not_is_wrong(tmp_path: Path) -> None:
    up = {name: Answering(f"http://127.0.0.1:{port}", True, True) for port, name in enumerate(NAMES)}
    root = make_repository(tmp_path / "fresh")
    lines = seen(root, **up)
    assert part(lines, "wrong") == "" and "gateway http://127.0.0.1:3" in part(lines, "services")
    silent = up | {"mlflow": Answering("http://127.0.0.1:0", False, True)}
    assert part(seen(root, **silent), "wrong") == "no answer from mlflow: ratchet doctor"


def test_champion_rollout_drift_and_the_last_verdict_have_a_line_each(busy: Path) -> None:
    lines = seen(busy)
    assert part(lines, "champion").startswith("v3 since ")
    assert part(lines, "rollout").startswith("v4 open: 25% of the users (step 2 of 4), the others v3")
    assert part(lines, "last gate") == "Promoted: every check passed."
    assert part(lines, "drift") == (
        "drift on 500 requests to v3, in numpy, array; so no retraining: 120 new rows, wanted 200"
    )
    heads = [line[:10].strip() for line in lines if line[:10].strip()]
    assert heads == ["project", "champion", "rollout", "wrong", "last gate", "drift", "data", "more"]


def test_a_retraining_that_runs_is_told_with_its_start(tmp_path: Path) -> None:
    root = make_repository(tmp_path / "small")
    with open_workspace(root, "retrain", lambda line: None):
        assert part(seen(root), "runs").startswith("retrain since 20")
    assert part(seen(root), "runs") == ""


def test_rows_that_wait_for_review_are_counted(tmp_path: Path) -> None:
    root = make_repository(tmp_path / "small")
    assert part(seen(root), "waits") == "" and not (root / ".ratchet/review.db").exists()
    queue = ReviewQueue(root)
    messages = (Message("user", "a?"), Message("assistant", "b"))
    queue.add([Item(str(number), "draft", "synthetic", messages, "", {}) for number in range(3)], share=1)
    queue.close()
    assert part(seen(root), "waits") == "3 rows to review: ratchet review status"


def judged(root: Path, verdict: str, rival: int, **more: Any) -> None:
    gate = read_json(root / "reports/gate.json")
    candidate = {"run_key": "new", "adapter_sha256": "b" * 64}
    gate |= {"verdict": verdict, "rival": {"model": "champion", "version": rival}, "candidate": candidate}
    write_json(root / "reports/gate.json", gate | more)


def test_a_candidate_that_only_a_person_can_promote_waits(busy: Path) -> None:
    (busy / ".ratchet/rollout.json").unlink()
    assert part(seen(busy, MANUAL), "waits") == "", "the champion's own verdict"
    judged(busy, "promote", 3)
    assert "ratchet promote N" in part(seen(busy, MANUAL), "waits")
    assert part(seen(busy), "waits") == "", "a rollout decides"
    judged(busy, "promote", 2)
    assert part(seen(busy, MANUAL), "waits") == "", "it was compared with another champion"
    judged(busy, "reject", 3, checks=[check("golden", -0.06, -0.08, -0.04, -0.02, "fail")])
    lines = seen(busy, MANUAL)
    assert part(lines, "waits") == ""
    assert part(lines, "last gate").startswith("Kept the champion (v3): the candidate lost 6 points on the ")


def test_a_paused_rollout_waits(busy: Path) -> None:
    found = read_rollout(busy)
    assert found
    write_rollout(busy, msgspec.structs.replace(found, state="paused"))
    assert part(seen(busy), "waits") == "the rollout of v4 is paused: ratchet rollout resume"


def test_the_nodes_of_a_federation_are_counted_and_a_node_knows_its_coordinator(busy: Path) -> None:
    write_json(busy / FOLDER / "nodes.json", {"1": "north", "2": "south"})
    assert part(seen(busy), "nodes") == (
        "0 of 2 connected; the link does not run: ratchet federate up, or join"
    )
    write_json(busy / NODE / SETTINGS, msgspec.to_builtins(Node("north", "here.example:8092")))
    (busy / NODE.parent / "ended.txt").write_text("the coordinator refused it")
    lines = seen(busy)
    assert part(lines, "nodes").startswith("this is north, of the coordinator at here.example:8092")
    assert "the link to the federation ended: the coordinator refused it" in part(lines, "wrong")


def test_a_part_that_cannot_be_read_is_wrong_and_the_others_stay(busy: Path) -> None:
    (busy / ".ratchet/review.db").write_text("no database" * 100)
    write_json(
        busy / "reports/gate.json",
        {"verdict": "promote", "reasons": [], "rival": {"model": "base", "version": None}},
    )
    lines = seen(busy)
    assert "review.db" in part(lines, "wrong") and "holds no verdict" in part(lines, "wrong")
    assert part(lines, "last gate") == "promote: ratchet gate explain"
    assert part(lines, "champion").startswith("v3 since ")


@pytest.mark.parametrize("columns", [60, 80, 100, 240])
def test_all_at_once_has_room_for_what_matters(busy: Path, columns: int) -> None:
    """Twelve faults, long words, a node, waiting rows: fifteen lines, and the most important in each."""
    write_json(busy / ".ratchet/serving/state.json", {"refused": {f"v{n}": HOSTILE * 9 for n in range(9)}})
    for number in range(3):
        (busy / f".ratchet/workspaces/2026010{number}T000000-retrain-1-failed").mkdir(parents=True)
    queue = ReviewQueue(busy)
    messages = (Message("user", "a?"), Message("assistant", "b"))
    queue.add([Item("1", "draft", "synthetic", messages, "", {})], share=1)
    queue.close()
    found = read_rollout(busy)
    assert found
    write_rollout(busy, msgspec.structs.replace(found, state="paused", why=HOSTILE * 9))
    write_json(busy / FOLDER / "nodes.json", {"1": "north", "2": "south"})
    judged(busy, "reject", 3, checks=[check(f"past:{HOSTILE * 9}", -0.06, -0.08, -0.04, -0.02, "fail")])
    commit(busy, "Judge")
    with open_workspace(busy, "retrain", lambda line: None):
        lines = seen(busy, columns=columns)
    for head in ("project", "champion", "rollout", "wrong", "waits", "runs"):
        assert part(lines, head)
    assert "is paused" in part(lines, "waits") and "row to review" in part(lines, "waits")
    assert "more" in part(lines, "wrong") and "\u202e" not in "".join(lines)


def test_all_shows_what_the_short_form_leaves_out(busy: Path) -> None:
    status: Status = see_status(busy, CONFIG)
    around = look_around(busy, CONFIG, status)
    everything = describe_all(status, around)
    assert set(describe(status)) <= set(everything)
    assert f"           {around.sentence}" in everything
    assert any("unseen words: p = 0.0004" in line for line in everything)
    assert not any("unseen words" in line for line in seen(busy))
