"""Moving a project's state into PostgreSQL and back, interrupted and not."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from patience import scaled
from postgres import PASSWORD

from ratchet.config.params import load_config
from ratchet.data.examples import Message
from ratchet.errors import CheckoutError, ConfigError, UserError
from ratchet.gateway.auth import add_key, list_keys
from ratchet.gateway.identity import Ids, known_pseudonym
from ratchet.monitoring.request_log import open_log
from ratchet.monitoring.request_records import Feedback, Logged
from ratchet.monitoring.retrain_budget import last_start, note_asked, read_retrains, remember
from ratchet.pipeline.checkout import locked
from ratchet.promotion.rollout import Rollout, end_rollout, read_ended, read_rollout, write_rollout
from ratchet.review.queue import ReviewQueue
from ratchet.review.records import Decision, Item
from ratchet.services.doctor import check_storage
from ratchet.serving.bundle import ServingState, drop_state, write_state
from ratchet.storage.database import URL_VARIABLE, close_databases, find_database
from tasks.storage import FILES, move_storage, where

ROWS = 1200  # requests, more than fit in one chunk


@pytest.fixture
def url(port: int, database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    return f"postgresql://ana@127.0.0.1:{port}/{database}"


@pytest.fixture
def root(tmp_path: Path, url: str) -> Path:
    """A laptop's project with everything that moves."""
    (tmp_path / "params.yaml").write_text("# ours\nproject:\n  name: claims\n", encoding="utf-8")
    now = time.time()
    times = {"opened": now, "step_since": now, "step": 0, "shares": [0.5, 1.0], "state": "open"}
    common = {"name": "claims", "champion": 1, "commit": "0" * 40, "adapter_sha256": "a" * 64, "salt": "s"}
    end_rollout(tmp_path, Rollout(id="r1", version=2, **common, **{**times, "state": "rolled_back"}))  # type: ignore[arg-type]
    write_rollout(tmp_path, Rollout(id="r2", version=3, **common, **times))  # type: ignore[arg-type]
    remember(tmp_path, reason="drift", seconds=2.5, run_key="k", verdict="promote")
    note_asked(tmp_path)
    add_key(tmp_path, "website", ["infer"])
    Ids(tmp_path)
    queue = ReviewQueue(tmp_path)
    messages = (Message("user", "what? \ud800"), Message("assistant", "that"))
    queue.add([Item(f"{n:064}", "faq", "synthetic", messages, doubts=("odd",)) for n in range(3)], share=0)
    queue.decide(Decision(f"{1:064}", "faq", "reject", by="ana", why="no"))
    queue.mark_taken("faq", "batch", content="c")
    queue.close()
    log = open_log(tmp_path, load_config(tmp_path / "params.yaml"))
    for number in range(ROWS):
        log.put(Logged(f"chatcmpl-{number}", now - number, "u", "champion", 1, answer=f"é {number}"))
    assert log.flush(scaled(60))
    log.add_feedback(Feedback("chatcmpl-1", "u", now, score=1.0, comment="gut"))
    log.close()
    return tmp_path


def state_of(root: Path) -> dict[str, Any]:
    """Everything as the parts of the program read it."""
    config = load_config(root / "params.yaml")
    queue, log = ReviewQueue(root), open_log(root, config)
    try:
        return {
            "rollout": read_rollout(root),
            "ended": read_ended(root),
            "retrains": read_retrains(root),
            "asked": round(last_start(root) or 0, 2),
            "keys": list_keys(root),
            "pseudonym": known_pseudonym(root, "ana"),
            "entries": queue.entries("faq"),
            "history": queue.history(f"{1:064}", "faq"),
            "drafts": queue.drafts(),
            "requests": log.window(limit=10_000),
            "feedback": log.feedback_of(["chatcmpl-1"]),
        }
    finally:
        queue.close()
        log.close()


def move(root: Path, to: str) -> Any:
    return move_storage(root, load_config(root / "params.yaml"), to, print)


def test_there_and_back_nothing_changes(root: Path, url: str) -> None:
    before = state_of(root)
    moved = move(root, url)
    assert (moved.documents, moved.rows["requests"], moved.rows["items"]) == (6, ROWS, 3)
    text = (root / "params.yaml").read_text()
    assert text.startswith("# ours\n") and PASSWORD not in text
    database = find_database(root)
    assert database is not None and load_config(root / "params.yaml").storage.url == url
    assert state_of(root) == before
    assert not list((root / ".ratchet").glob("*.db*")), "only one of the two is in charge"
    assert where(root, load_config(root / "params.yaml")).rows["requests"] == ROWS

    queue = ReviewQueue(root)  # the numbers of new rows follow those that were copied
    said = (Message("user", "a"), Message("assistant", "b"))
    queue.add([Item("9" * 64, "later", "synthetic", said)], share=1)
    queue.decide(Decision(f"{2:064}", "faq", "reject", by="bo"))
    assert [draft.name for draft in queue.drafts()] == ["faq", "later"]

    changed = state_of(root)
    assert move(root, FILES).target == FILES
    assert find_database(root) is None and state_of(root) == changed
    assert (root / ".ratchet/gateway.key").stat().st_mode & 0o077 == 0
    assert (root / ".ratchet/requests.db").stat().st_mode & 0o077 == 0

    (root / "params.yaml").write_text(text)  # a machine that has not pulled yet
    close_databases()  # as in a new process
    with pytest.raises(ConfigError, match=r"(?s)was moved from .* to files on .*git pull"):
        read_rollout(root)


def test_the_doctor_says_what_was_left_in_files(
    root: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_storage(root) == []
    monkeypatch.setenv(URL_VARIABLE, url)
    (found,) = check_storage(root)
    assert found.ok is None and ".ratchet/rollout.json" in found.found and "storage move" in found.remedy
    monkeypatch.delenv(URL_VARIABLE)
    move(root, url)
    assert [found.ok for found in check_storage(root)] == [True]
    monkeypatch.setenv(URL_VARIABLE, url.replace(url.rpartition("/")[2], "absent"))
    (found,) = check_storage(root)
    assert found.ok is False and "absent" in found.found


def test_a_target_that_holds_something_is_not_overwritten(root: Path, url: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "params.yaml").write_text(f"project: {{name: claims}}\nstorage: {{url: '{url}'}}\n")
    remember(other, reason="there", seconds=1.0, run_key="", verdict="failed")
    before = (root / "params.yaml").read_bytes()
    with pytest.raises(UserError, match="holds documents of this project already"):
        move(root, url)
    assert (root / "params.yaml").read_bytes() == before
    assert [entry.reason for entry in read_retrains(root)] == ["drift"]
    assert [entry.reason for entry in read_retrains(other)] == ["there"]
    (other / ".ratchet").mkdir()
    (other / ".ratchet/rollouts.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match=r"rollouts\.jsonl exist"):
        move(other, FILES)
    assert (other / ".ratchet/rollouts.jsonl").read_text() == "mine\n"
    assert [entry.reason for entry in read_retrains(other)] == ["there"]


def test_what_stands_in_the_way_is_named(root: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="in files already"):
        move(root, FILES)
    with pytest.raises(UserError, match=r"(?s)holds a password.*PGPASSWORD") as caught:
        move(root, url.replace("ana@", "ana:hunter2@"))
    assert "hunter2" not in str(caught.value)
    with locked(root, "retrain"), pytest.raises(CheckoutError, match="another `retrain` runs"):
        move(root, url)
    monkeypatch.setenv(URL_VARIABLE, url)
    with pytest.raises(UserError, match=f"{URL_VARIABLE} is set"):
        move(root, FILES)
    monkeypatch.delenv(URL_VARIABLE)
    move(root, url)
    write_state(root, ServingState(champion=1, at=time.time()), "a-8400")
    with pytest.raises(UserError, match=r"1 gateway\(s\) with this database still answer"):
        move(root, FILES)
    drop_state(root, "a-8400")
    move(root, FILES)


KILLED = """
import os, signal, sys
from pathlib import Path
from ratchet.config.params import load_config
from tasks import storage
where, to, root = sys.argv[1], sys.argv[2], Path(sys.argv[3])
whole = getattr(storage, where)
def dies(*given, **named):
    if where == "_copy":
        whole(*given, **named)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(storage, where, dies)
storage.move_storage(root, load_config(root / "params.yaml"), to, print)
"""


def kill_at(step: str, root: Path, to: str) -> None:
    command = [sys.executable, "-c", KILLED, step, to, str(root)]
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()


def let_leases_end(root: Path) -> None:
    """As after the 30 s in which nobody renews those of the killed process."""
    database = find_database(root)
    assert database is not None
    with database.transaction() as connection:
        connection.execute(database.tables["leases"].update().values(until=0.0))


@pytest.mark.parametrize("step", ["_copy", "_switch"])
def test_an_interrupted_move_leaves_the_source_in_charge(root: Path, url: str, step: str) -> None:
    """In the middle of the copy, and when all is there but not yet in charge."""
    before = state_of(root)
    kill_at(step, root, url)
    assert find_database(root) is None and state_of(root) == before
    move(root, url)
    assert state_of(root) == before

    kill_at(step, root, FILES)
    assert find_database(root) is not None and state_of(root) == before
    let_leases_end(root)
    move(root, FILES)
    assert find_database(root) is None and state_of(root) == before


def test_the_command_tells_what_it_did(root: Path, url: str) -> None:
    done = run(root, "move", "--to", url, "--json")
    assert json.loads(done.stdout)["rows"]["requests"] == ROWS
    shown = run(root, "status").stdout
    assert f"{ROWS:,}" in shown and "127.0.0.1" in shown and PASSWORD not in shown + done.stdout + done.stderr


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ratchet.cli", "-C", str(root), "storage", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True)
