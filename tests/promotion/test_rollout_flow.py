"""What must not end a rollout or lose a decision: a dirty checkout, services that are away, tags that are
garbage, pauses, two at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec
import pytest
from places import KEPT_CONNECTIONS, use_no_mlflow, write_files

from flows.promotion import promote_version, roll_back
from flows.rollout import look_once, pause_rollout
from ratchet.config.monitoring import RolloutConfig
from ratchet.config.params import Config
from ratchet.errors import CheckoutError
from ratchet.monitoring.request_records import Unit
from ratchet.pipeline.checkout import git, locked
from ratchet.promotion.champion import read_champion
from ratchet.promotion.rollout import (
    AGAIN,
    Figures,
    advance,
    finish,
    pause,
    read_ended,
    read_rollout,
    resume,
    write_rollout,
)
from ratchet.serving.bundle import write_state
from ratchet.tracking.mlflow import mlflow_client
from ratchet.tracking.registry import CHALLENGER, CHAMPION, get_alias, get_version, list_versions, set_alias
from tasks.rollout import look
from tests.promotion.test_promote import back, register, reign, root  # noqa: F401  (a fixture)
from tests.promotion.test_rollout import CONFIG, MANUAL, ask, challenge, decide, opened, outcome, step, units

pytestmark = pytest.mark.filterwarnings(KEPT_CONNECTIONS)


def test_a_dirty_checkout_delays_a_persons_decision(root: Path):  # noqa: F811
    reign(root, 1)
    register(2, rival=1)
    decide(2, decision="approve")
    write_files(root, {"params.yaml": "project:\n  name: changed\n"})
    assert "waits" in " ".join(step(root, MANUAL)[1]) and outcome(2) == "" and (root / AGAIN).exists(), (
        "nothing in the registry will change"
    )
    git(root, "checkout", "--", "params.yaml")
    step(root, MANUAL)
    assert not (root / AGAIN).exists()
    assert read_champion(root).version == 2 and outcome(2) == "approve: done: it is in charge"


@pytest.mark.parametrize(
    ("tag", "value"), [("gate", "[not json"), ("gate", "[]"), ("batches", "{"), ("data", "null")]
)
def test_a_forced_version_with_garbage_in_its_tags_is_refused(root: Path, tag: str, value: str):  # noqa: F811
    reign(root, 1)
    register(2, rival=1)
    decide(2, **{tag: value}, reason="I know it", decision="force")
    step(root)
    assert outcome(2).startswith(f"force: refused: v2's tag `{tag}` is") and read_champion(root).version == 1


def test_a_reason_that_comes_later_is_heard(root: Path):  # noqa: F811
    reign(root, 1)
    register(2, rival=1, verdict="reject")
    decide(2, decision="force")
    step(root)
    decide(2, reason="see ticket 12")
    step(root)
    assert (read_champion(root).version, read_champion(root).why) == (2, "forced: see ticket 12")


def test_approval_opens_another_rollout_but_not_of_one_that_did_harm(root: Path):  # noqa: F811
    challenge(root)
    step(root)
    finish(root, read_rollout(root), "no_evidence", why="too quiet", by="rollout")
    set_alias("small", CHALLENGER, 2)
    assert "its rollout ended no evidence: too quiet" in " ".join(step(root)[1])
    decide(2, decision="approve")
    assert step(root)[0].state == "open" and outcome(2) == "approve: done: its rollout is open"
    finish(root, read_rollout(root), "rolled_back", why="worse", by="rollout")
    decide(2, decision_outcome="")
    step(root)
    assert "refused: its rollout ended rolled back: worse" in outcome(2) and read_rollout(root) is None


def test_an_alias_on_a_version_that_was_in_charge_before_is_set_back(root: Path):  # noqa: F811
    """It may as well be one that has not followed a rollback made elsewhere."""
    reign(root, 2)
    back(root)
    set_alias("small", CHAMPION, 2)
    _, said = step(root, MANUAL)
    assert (read_champion(root).version, get_alias("small", CHAMPION)) == (1, 1) and any(
        "was in charge before" in line for line in said
    )


def test_a_look_without_news_changes_nothing_in_the_registry(root: Path):  # noqa: F811
    """Each change there asks for another look (flows/rollout_watcher.py)."""
    challenge(root)
    step(root)
    before = list_versions("small")
    ask(root, read_rollout(root), 60, champion=0.5, challenger=0.5)
    found, _ = step(root)
    assert found.state == "open" and found.last.steps[0].challenger > 10 and list_versions("small") == before


def test_the_lock_is_free_while_the_registry_is_asked(root: Path):  # noqa: F811
    """A rollback must not wait for MLflow's tries of a look."""
    challenge(root)
    seen: list[str] = []

    def say(line: str) -> None:
        with locked(root, "promote", wait=False):
            seen.append(line)

    look_once(root, CONFIG, say)
    assert any("of the users" in line for line in seen)


def test_what_mlflow_did_not_hear_it_hears_at_the_next_look(
    root: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    challenge(root)
    step(root)
    ask(root, read_rollout(root), 900, champion=0.7, challenger=0.3)
    with monkeypatch.context() as patch:
        use_no_mlflow(patch)
        assert step(root)[0].state == "rolled_back"
    assert (get_alias("small", CHALLENGER), get_version("small", 2).tags["rollout_state"]) == (
        2,
        "open",
    ) and (root / AGAIN).exists()
    step(root)
    assert not (root / AGAIN).exists()
    assert (get_alias("small", CHALLENGER), get_version("small", 2).tags["rollout_state"]) == (
        None,
        "rolled_back",
    ) and read_rollout(root) is None


def test_approval_while_another_rollout_is_open_waits_for_its_end(root: Path):  # noqa: F811
    challenge(root)
    step(root)
    register(3, rival=1)
    decide(3, decision="approve")
    assert "waits" in " ".join(step(root)[1]) and outcome(3) == "" and (root / AGAIN).exists()
    finish(root, read_rollout(root), "no_evidence", why="too quiet", by="rollout")
    assert step(root)[0].version == 3 and outcome(3) == "approve: done: its rollout is open"


def test_who_was_rejected_by_a_person_is_not_tried_again(root: Path):  # noqa: F811
    challenge(root)
    decide(2, decision="reject")
    step(root)
    set_alias("small", CHALLENGER, 2)  # as a later retraining with nothing new does
    assert "a person rejected it" in " ".join(step(root)[1]) and read_rollout(root) is None


def test_a_rollout_that_is_refused_at_its_end_ends(root: Path):  # noqa: F811
    """It would hold its share of the users, and every later challenger up, for good."""
    challenge(root)
    step(root)
    ask(root, read_rollout(root), 900, champion=0.3, challenger=0.7)
    decide(2, gate='{"verdict": "reject", "rival": 1}')
    found, _ = step(root)
    assert found.state == "aborted" and "reject" in found.why and read_champion(root).version == 1


def test_a_person_who_moves_the_champion_ends_the_open_rollout_at_once(root: Path):  # noqa: F811
    reign(root, 2)
    register(3, rival=2)
    set_alias("small", CHALLENGER, 3)
    step(root)
    promote_version(root, CONFIG, 3, reason="I know", force=False, say=print)
    assert read_rollout(root) is None and read_ended(root)[-1].state == "promoted"
    roll_back(root, CONFIG, reason="complaints", say=print)
    assert read_champion(root).version == 2 and read_rollout(root) is None, (
        "the version that was taken back gets no share again"
    )


class Garbage(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>It works!</html>")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def garbage() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Garbage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_that_is_no_registry_keeps_no_harm_from_being_seen(
    root: Path,  # noqa: F811
    garbage: str,
    monkeypatch: pytest.MonkeyPatch,
):
    challenge(root)
    step(root)
    ask(root, read_rollout(root), 900, champion=0.7, challenger=0.3)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", garbage)
    found, said = step(root)
    assert found.state == "rolled_back" and any("MLflow hears of it later" in line for line in said)
    assert read_champion(root).version == 1


def test_a_version_that_was_deleted_is_no_challenger(root: Path):  # noqa: F811
    challenge(root)
    mlflow_client().delete_model_version("small", "2")
    found, _ = step(root)
    assert found is None and read_champion(root).version == 1


def test_a_paused_rollout_ends_with_its_champion(root: Path):  # noqa: F811
    reign(root, 2)
    register(3, rival=2)
    set_alias("small", CHALLENGER, 3)
    step(root)
    pause_rollout(root, CONFIG, print)
    back(root)
    step(root)
    assert read_rollout(root) is None and read_ended(root)[-1].state == "aborted"


def test_what_the_gateway_refused_before_the_rollout_opened_does_not_end_it(root: Path):  # noqa: F811
    challenge(root)
    write_state(root, {"refused": {"v2": "no room"}, "refused_since": {"v2": time.time() - 1000}})
    assert step(root)[0].state == "open"


def test_steps_that_begin_with_everybody_are_no_canary(root: Path):  # noqa: F811
    challenge(root)
    at_once = Config.model_validate({"project": {"name": "small"}, "rollout": {"steps": [1.0]}})
    assert step(root, at_once)[0].state == "promoted" and read_champion(root).version == 2


# --- the acts, without a registry ---------------------------------------------------------------------------


def test_an_act_twice_is_an_act_once(tmp_path: Path):
    first = opened(shares=(0.25, 0.5, 1.0))
    write_rollout(tmp_path, first)
    assert advance(tmp_path, first, "well", Figures()).step == 1
    assert advance(tmp_path, first, "well", Figures()).step == 1, "it was looked at in the first step"
    ended = finish(tmp_path, first, "aborted", why="first", by="Ana")
    assert finish(tmp_path, first, "promoted", why="second", by="Bo") == ended == read_ended(tmp_path)[0]
    assert advance(tmp_path, first, "well", Figures()) is None


def test_a_pause_counts_for_no_limit_and_its_requests_for_no_arm(tmp_path: Path):
    write_rollout(tmp_path, opened())
    pause(tmp_path, "Ana")
    write_rollout(tmp_path, msgspec.structs.replace(read_rollout(tmp_path), paused_at=time.time() - 7200))
    gone_on = resume(tmp_path, "Bo")
    assert (
        gone_on.share == 0.5
        and gone_on.paused_seconds == pytest.approx(7200, abs=5)
        and gone_on.step_since == pytest.approx(7200, abs=5)
    )
    meanwhile = [Unit(f"p{number}", -1, "champion", 0.0, 1, 0, 0, 100.0, 0.0, 1) for number in range(500)]
    found = look(
        [*units(30, champion=0.5, challenger=0.5), *meanwhile], gone_on, RolloutConfig(), now=169 * 3600.0
    )
    assert found.action == "hold" and found.figures.steps[0].champion == 30


def test_two_at_once_do_not_overwrite_each_other(tmp_path: Path):
    write_rollout(tmp_path, opened())
    with locked(tmp_path, "promote"):
        waiting = threading.Thread(
            target=finish, args=(tmp_path, opened(), "aborted"), kwargs={"why": "", "by": "Ana"}
        )
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive() and read_rollout(tmp_path) is not None
        with pytest.raises(CheckoutError), locked(tmp_path, "promote", wait=False):
            pass
    waiting.join(5)
    assert read_rollout(tmp_path) is None
