"""The shared database on a real PostgreSQL: documents, leases with fencing, the review queue, projects."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from patience import scaled
from postgres import QUOTED

from ratchet.config.params import Config, parse_config
from ratchet.data.examples import Message
from ratchet.errors import CheckoutError, ConfigError, LeaseError, ServiceError
from ratchet.gateway.auth import Doorkeeper, add_key, list_keys, revoke_key
from ratchet.gateway.identity import Ids, known_pseudonym
from ratchet.monitoring.request_log import open_log
from ratchet.monitoring.request_records import Logged
from ratchet.monitoring.retrain_budget import is_under_way, last_start, note_asked, read_retrains, remember
from ratchet.pipeline.checkout import locked
from ratchet.promotion.rollout import (
    Rollout,
    end_rollout,
    finish,
    pause,
    read_ended,
    read_rollout,
    write_rollout,
)
from ratchet.review.queue import ReviewQueue
from ratchet.review.records import Decision, Item
from ratchet.services.status import describe, see_status
from ratchet.serving.bundle import ServingState, read_states, write_state
from ratchet.serving.faults import Fault
from ratchet.storage import leases
from ratchet.storage.database import URL_VARIABLE, find_database, find_url
from ratchet.storage.documents import make_document, read_document, remove_document, write_document

NAME = Path(".ratchet/some.json")


@pytest.fixture
def url(port: int, database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database of the test's own, which every checkout of this process shares."""
    found = f"postgresql+psycopg://ana:{QUOTED}@127.0.0.1:{port}/{database}"
    monkeypatch.setenv(URL_VARIABLE, found)
    return found


@pytest.fixture
def homes(url: str, tmp_path: Path) -> tuple[Path, Path]:
    """Two checkouts of one project, as two machines have them."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return tmp_path / "one", tmp_path / "two"


def rollout(**more: Any) -> Rollout:
    now = time.time()
    values = {"id": "r1", "name": "pydoc", "version": 2, "champion": 1, "commit": "0" * 40, "salt": "s"}
    times = {"opened": now, "step_since": now, "step": 0, "shares": [0.5, 1.0], "state": "open"}
    return Rollout(**values, adapter_sha256="a" * 64, **times, **more)  # type: ignore[arg-type]


def test_without_a_url_the_state_is_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    assert find_database(tmp_path) is None
    write_document(tmp_path, NAME, b"{}")
    assert (tmp_path / NAME).read_bytes() == b"{}"
    (tmp_path / "params.yaml").write_text("project: {name: claims}\nstorage: {url: ''}\n")
    assert find_url(tmp_path) == ("", "claims")


@pytest.mark.parametrize(
    "url", ["postgresql://ana:secret@host/claims", "postgresql://host/claims?user=ana&password=secret"]
)
def test_a_password_in_params_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)storage\.url holds a password.*PGPASSWORD"):
        parse_config({"storage": {"url": url}}, Path("params.yaml"))


def test_only_postgresql_is_taken_and_its_driver_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(URL_VARIABLE, "postgresql://ana@host/claims")
    assert find_url(tmp_path)[0] == "postgresql+psycopg://ana@host/claims"
    monkeypatch.setenv(URL_VARIABLE, "postgres://ana@host/claims")
    assert find_url(tmp_path)[0] == "postgresql+psycopg://ana@host/claims"
    monkeypatch.setenv(URL_VARIABLE, "sqlite:///here.db")
    with pytest.raises(ConfigError, match="only PostgreSQL"):
        find_url(tmp_path)
    monkeypatch.setenv(URL_VARIABLE, "nonsense")
    with pytest.raises(ConfigError, match="no SQLAlchemy URL"):
        find_url(tmp_path)


def test_params_name_the_database_and_a_change_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    path = tmp_path / "params.yaml"
    path.write_text("project: {name: claims}\nstorage: {url: 'postgresql://ana@host/claims'}\n")
    assert find_url(tmp_path) == ("postgresql+psycopg://ana@host/claims", "claims")
    path.write_text("project: {name: claims}\n")
    assert find_url(tmp_path)[0] == ""


def test_a_database_that_is_down_is_named_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(URL_VARIABLE, "postgresql://ana:secret@127.0.0.1:1/claims")
    with pytest.raises(ServiceError, match=r"ana:\*\*\*@127\.0\.0\.1:1/claims") as caught:
        read_document(tmp_path, NAME)
    assert "secret" not in str(caught.value)
    with pytest.raises(ServiceError), locked(tmp_path, "promote"):
        pass
    found = see_status(tmp_path, Config())
    assert found.rollout is None and "cannot be used" in found.fault
    assert any("rollout    unknown" in line for line in describe(found))


def test_both_see_one_document(homes: tuple[Path, Path]) -> None:
    one, two = homes
    write_document(one, NAME, b"\x00first")
    assert read_document(two, NAME) == b"\x00first"
    write_document(two, NAME, b"second")
    assert read_document(one, NAME) == b"second"
    remove_document(one, NAME)
    assert read_document(two, NAME) is None
    assert make_document(one, NAME, b"mine") == make_document(two, NAME, b"other") == b"mine"
    assert not list(one.iterdir()) and not list(two.iterdir()), "nothing is in files"


def test_another_projects_database_is_refused(homes: tuple[Path, Path]) -> None:
    one, two = homes
    (one / "params.yaml").write_text("project: {name: claims}\n")
    (two / "params.yaml").write_text("project: {name: letters}\n")
    write_document(one, NAME, b"{}")
    with pytest.raises(ConfigError, match="belongs to the project 'claims', this one is 'letters'"):
        read_document(two, NAME)
    with pytest.raises(ConfigError, match="belongs to the project 'claims'"):
        ReviewQueue(two).drafts()


def test_a_rollout_is_one_for_all(homes: tuple[Path, Path]) -> None:
    one, two = homes
    write_rollout(one, rollout())
    assert read_rollout(two) == read_rollout(one)
    assert pause(two, "bo").state == "paused" and read_rollout(one).state == "paused"  # type: ignore[union-attr]
    ended = finish(one, rollout(), "aborted", why="enough", by="ana")
    assert read_rollout(two) is None and read_ended(two) == [ended]
    end_rollout(two, ended)
    assert read_ended(one) == [ended], "repeating adds nothing"


def test_the_budget_of_retrainings_is_one_for_all(homes: tuple[Path, Path]) -> None:
    one, two = homes
    assert last_start(two) is None and not is_under_way(two)
    remember(one, reason="drift", seconds=2.5, run_key="k", verdict="promote")
    assert [entry.reason for entry in read_retrains(two)] == ["drift"]
    note_asked(one)
    assert is_under_way(two), "it has been requested on the other machine"
    remember(two, reason="drift", seconds=1.0, run_key="l", verdict="reject")
    assert not is_under_way(one)
    with locked(one, "retrain"):
        assert is_under_way(two)


def test_ids_pseudonyms_and_keys_are_the_same_for_all(
    homes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = homes
    assert known_pseudonym(two, "ana") == ""
    ids = Ids(one)
    assert Ids(two).is_ours(ids.make()) and known_pseudonym(two, "ana") == ids.pseudonym("ana")
    monkeypatch.setattr("ratchet.gateway.auth.FOLLOW_SECONDS", 0.05)
    door = Doorkeeper(two, required=False)
    try:
        key = add_key(one, "website", ["infer"])
        assert [known.name for known in list_keys(two)] == ["website"]
        until(lambda: refuses(door, ""))
        assert door.admit(f"Bearer {key}", "infer").name == "website"
        revoke_key(one, "website")
        until(lambda: refuses(door, key))
    finally:
        door.close()


def refuses(door: Doorkeeper, key: str) -> bool:
    try:
        door.admit(f"Bearer {key}", "infer")
    except Fault:
        return True
    return False


def until(holds: Any, seconds: float = 30) -> None:
    end = time.monotonic() + scaled(seconds)
    while not holds():
        assert time.monotonic() < end, "it did not come in time"
        time.sleep(0.02)


def test_a_gateway_that_is_gone_says_nothing_any_more(homes: tuple[Path, Path]) -> None:
    one, two = homes
    now = time.time()
    write_state(one, ServingState(champion=1, at=now), "a-8400")
    write_state(two, ServingState(champion=2, at=now), "b-8400")
    write_state(two, ServingState(champion=3, at=now - 1000), "c-8400")
    assert sorted(state.champion or 0 for state in read_states(one)) == [1, 2]


def test_the_request_log_is_in_the_same_database(homes: tuple[Path, Path]) -> None:
    one, two = homes
    log, other = open_log(one, Config()), open_log(two, Config())
    try:
        log.put(Logged("chatcmpl-1", time.time(), "u", "champion", 1))
        assert log.flush(scaled(20))
        assert [request.id for request in other.window(limit=5)] == ["chatcmpl-1"]
    finally:
        log.close()
        other.close()


def test_people_review_one_queue(homes: tuple[Path, Path]) -> None:
    one, two = homes
    queue, other = ReviewQueue(one), ReviewQueue(two)
    messages = (Message("user", "what? \x00"), Message("assistant", "that"))
    items = [Item(f"{n:064}", "faq-1", "synthetic", messages, doubts=("odd",)) for n in range(3)]
    assert (queue.add(items, share=0.5), other.add(items, share=0.5)) == (3, 0), "the same rows once"
    clean = [Item(f"{n:064}", "faq-2", "synthetic", messages) for n in range(10, 20)]
    queue.add(clean, share=0.01)
    assert [figures.sampled >= 1 for figures in other.drafts()] == [False, True]
    other.decide(Decision(items[0].id, "faq-1", "reject", by="bo", why="no\x00nul"))
    assert [item.id for item in queue.pending("faq-1")] == [items[1].id, items[2].id]
    queue.undo(items[0].id, "faq-1", by="ana")
    assert other.waiting("faq-1") == 3
    assert [entry.verdict for entry in other.history(items[0].id, "faq-1")] == ["reject", "undo"]
    assert queue.find("0" * 62 + "10").item.draft == "faq-2"
    other.mark_taken("faq-2", "batch-1", content="c")
    assert [(figures.name, figures.batch) for figures in queue.drafts()] == [
        ("faq-1", ""),
        ("faq-2", "batch-1"),
    ]


# --- leases -------------------------------------------------------------------------------------------------


def test_a_lock_excludes_the_other_machine_and_says_who_has_it(homes: tuple[Path, Path]) -> None:
    one, two = homes
    with locked(one, "promote"):
        with (
            pytest.raises(CheckoutError, match=rf"another `promote` runs \(.*process {os.getpid()} holds it"),
            locked(two, "promote", wait=False),
        ):
            pass
        with locked(two, "retrain", wait=False), locked(one, "up"), locked(two, "up"):
            pass  # another lock, and locks of a checkout's own
    with locked(two, "promote", wait=False):
        pass


def test_who_waits_gets_it_when_the_other_is_done(homes: tuple[Path, Path]) -> None:
    one, two = homes
    order: list[str] = []

    def second() -> None:
        with locked(two, "promote"):
            order.append("second")

    with locked(one, "promote"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.5)
        order.append("first")
    thread.join(scaled(20))
    assert order == ["first", "second"]


def test_of_many_at_once_one_holds_it_and_nothing_is_lost(homes: tuple[Path, Path]) -> None:
    one, two = homes

    def add(root: Path) -> None:
        for _ in range(3):
            with locked(root, "retrain"):
                remember(root, reason="r", seconds=1.0, run_key="", verdict="failed")

    threads = [threading.Thread(target=add, args=(root,)) for root in (one, two) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(scaled(60))
    assert len(read_retrains(one)) == 18, "read, add, write: without the lock some would be overwritten"


def test_a_long_piece_of_work_keeps_its_lease(
    homes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = homes
    monkeypatch.setattr(leases, "SECONDS", 1.0)
    with locked(one, "retrain"):
        time.sleep(2.5)
        with pytest.raises(CheckoutError), locked(two, "retrain", wait=False):
            pass
        write_document(one, NAME, b"done")


HOLD = """
import sys
from pathlib import Path
from ratchet.errors import LeaseError
from ratchet.pipeline.checkout import locked
from ratchet.storage import leases
from ratchet.storage.documents import write_document
leases.SECONDS = 2.0
with locked(Path(sys.argv[1]), "retrain"):
    print("held", flush=True)
    input()
    try:
        write_document(Path(sys.argv[1]), Path(".ratchet/some.json"), b"late")
    except LeaseError as error:
        print("refused:", error, flush=True)
"""


def start_holder(root: Path) -> subprocess.Popen[str]:
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert held.stdout is not None and held.stdout.readline() == "held\n"
    return held


def test_a_killed_holders_lease_ends_by_itself(homes: tuple[Path, Path]) -> None:
    one, two = homes
    held = start_holder(one)
    with pytest.raises(CheckoutError), locked(two, "retrain", wait=False):
        pass
    held.kill()
    held.communicate()
    with locked(two, "retrain"):
        write_document(two, NAME, b"mine")


def test_a_paused_holder_cannot_write_after_another_took_over(homes: tuple[Path, Path]) -> None:
    one, two = homes
    held = start_holder(one)
    held.send_signal(signal.SIGSTOP)
    with locked(two, "retrain"):  # it waits until the lease has ended
        write_document(two, NAME, b"mine")
        held.send_signal(signal.SIGCONT)
        out, _ = held.communicate("go\n", timeout=scaled(30))
        assert "refused: this process held `retrain`" in out
        assert read_document(one, NAME) == b"mine"
        write_document(two, NAME, b"still mine")
    with locked(two, "retrain", wait=False):
        pass  # the late one gave nothing back that was not its own


def test_a_paused_holder_cannot_push(homes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = homes
    monkeypatch.setattr(leases, "_renew", lambda lease, ended: None)  # as when the process is paused
    monkeypatch.setattr(leases, "SECONDS", 0.2)
    with locked(one, "promote"):
        leases.require_held()
        time.sleep(0.4)
        leases.require_held()  # nobody has taken over
        taker = threading.Thread(target=take, args=(two,))
        taker.start()
        taker.join(scaled(20))
        with pytest.raises(LeaseError, match="another process has taken over"):
            leases.require_held()


def take(root: Path) -> None:
    with locked(root, "promote"):
        pass
