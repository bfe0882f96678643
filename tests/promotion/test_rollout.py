"""Rollouts: bounds that hold at every look, and what a look does.

Real git, DVC, MLflow store and request log.
"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from places import KEPT_CONNECTIONS, use_no_mlflow

from benchmarks.rollout import WRONG, simulate_many
from flows.rollout import abort_rollout, look_once, pause_rollout, resume_rollout, rollout_status
from ratchet.config.monitoring import RolloutConfig
from ratchet.config.params import Config
from ratchet.errors import CheckoutError, UserError
from ratchet.monitoring.request_log import open_log
from ratchet.monitoring.request_records import Feedback, Logged, Unit
from ratchet.promotion.champion import read_champion
from ratchet.promotion.rollout import (
    FILE,
    Rollout,
    end_rollout,
    position,
    read_ended,
    read_rollout,
    write_rollout,
)
from ratchet.promotion.sequential_test import Stratum, difference, split_e_value
from ratchet.serving.bundle import write_state
from ratchet.tracking.registry import CHALLENGER, CHAMPION, get_alias, get_version, set_alias, set_tag
from tasks.rollout import judge, look, outcomes_of
from tests.promotion.test_promote import back, register, reign, root, take  # noqa: F401  (a fixture)

pytestmark = pytest.mark.filterwarnings(KEPT_CONNECTIONS)
QUICK = {"steps": [0.5, 1.0], "step_minutes": 0, "step_users": 5, "min_users": 20}
CONFIG = Config.model_validate({"project": {"name": "small"}, "rollout": QUICK})
MANUAL = CONFIG.model_copy(update={"promotion": "manual"})


# --- the statistics -----------------------------------------------------------------------------------------


def test_an_equal_model_ends_wrongly_no_more_often_than_alpha_over_all_looks():
    ended = simulate_many(25, 60, effect=0.0, seed=3)
    assert sum(one.action in WRONG for one in ended) <= 5, "99 % limit for 25 rollouts at 5 %"
    assert sum(one.naive for one in ended) > 8, (
        "a plain z-test, looked at as often, is wrong most of the time"
    )


def test_a_much_better_model_is_promoted_and_a_much_worse_one_is_rolled_back():
    assert {one.action for one in simulate_many(4, 80, effect=0.2, seed=4)} == {"promote"}
    assert {one.action for one in simulate_many(4, 80, effect=-0.2, seed=4)} == {"roll_back"}


def test_steps_are_compared_inside_themselves():
    """Both arms are equal in each step; the challenger has most of its users in the better one, so pooled it
    would look better.
    """
    low, high = np.full(400, 0.2), np.full(400, 0.8)
    found = difference([Stratum(low, low[:20]), Stratum(high[:200], high[:200])], 0.05)
    assert found is not None and found.mean == pytest.approx(0.0) and found.low < 0 < found.high


def test_who_comes_back_in_each_step_counts_once():
    """The same 200 users in four steps know no more than in one; 200 others in each do."""
    chance = np.random.default_rng(5)
    champion, challenger = chance.random((2, 100))
    once = difference([Stratum(champion, challenger, np.arange(100), np.arange(100, 200))], 0.05, scale=0.3)
    again = difference(
        [Stratum(champion, challenger, np.arange(100), np.arange(100, 200))] * 4, 0.05, scale=0.3
    )
    others = difference(
        [
            Stratum(champion, challenger, np.arange(100) + 200 * step, np.arange(100, 200) + 200 * step)
            for step in range(4)
        ],
        0.05,
        scale=0.3,
    )
    assert once is not None and again is not None and others is not None
    assert (again.champion, again.challenger, others.champion) == (100, 100, 400)
    assert again.high - again.low > 0.95 * (once.high - once.low) > 1.3 * (others.high - others.low)


def test_bounds_narrow_with_the_users_and_say_nothing_of_too_few():
    chance = np.random.default_rng(0)
    widths = []
    for users in (20, 200, 2000):
        arms = chance.random((2, users))
        found = difference([Stratum(arms[0], arms[1])], 0.05)
        assert found is not None
        widths.append(found.high - found.low)
    assert widths == sorted(widths, reverse=True)
    assert difference([Stratum(np.zeros(4), np.zeros(400))], 0.05) is None


def test_five_equal_scores_are_no_certainty():
    found = difference([Stratum(np.zeros(5), np.ones(5))], 0.02, scale=0.45)
    assert found is not None and found.low < 0.5


def test_a_split_of_users_that_cannot_be_is_told_and_a_right_one_is_not():
    assert split_e_value(950, 50, 0.05) < 1
    assert split_e_value(700, 300, 0.05) > 1000
    chance = np.random.default_rng(1)
    worst = [
        max(
            split_e_value(n - int(k), int(k), 0.25)
            for n, k in zip(range(1, 401), np.cumsum(chance.random(400) < 0.25), strict=True)
        )
        for _ in range(100)
    ]
    assert max(worst) < 1000


def units(
    count: int, *, champion: float, challenger: float, step: int = 0, errors: int = 0, latency: float = 100.0
) -> list[Unit]:
    """As many of either arm; feedback is 1 for that share of them.

    Errors and latency are the challenger's.
    """
    made = []
    for number in range(count):
        good = [number < share * count for share in (champion, challenger)]
        made.append(
            Unit(f"a{number}", step, "champion", number, 2, 0, 0, 100.0 + number % 7, float(good[0]), 1)
        )
        made.append(
            Unit(
                f"b{number}",
                step,
                "challenger",
                number,
                2,
                errors,
                0,
                latency + number % 7,
                float(good[1]),
                1,
            )
        )
    return made


def opened(step: int = 0, shares: tuple[float, ...] = (0.5, 1.0)) -> Rollout:
    return Rollout("r", "small", 2, 1, "2" * 40, "2" * 64, "salt", step, list(shares), "open", 0.0, 0.0)


def test_each_outcome_says_why():
    config = RolloutConfig.model_validate(QUICK)
    cases = {
        "promote": units(400, champion=0.4, challenger=0.8),
        "roll_back": units(400, champion=0.8, challenger=0.4),
        "hold": units(400, champion=0.5, challenger=0.5),
        "stop": [
            unit
            for number, unit in enumerate(units(400, champion=0.5, challenger=0.5))
            if number % 2 or number % 6 == 0
        ],
    }
    for action, found in cases.items():
        seen = look(found, opened(), config, now=60.0)
        assert seen.action == action, (action, seen.reason)
    assert "mean feedback +0.400 [" in look(cases["promote"], opened(), config, 60.0).reason
    late = look(cases["hold"], opened(), config, now=169 * 3600.0)
    assert late.action == "no_evidence" and "168 h passed" in late.reason


def test_more_errors_or_slower_answers_end_it_however_good_the_feedback():
    config = RolloutConfig.model_validate(QUICK)
    failing = look(units(300, champion=0.4, challenger=0.9, errors=1), opened(), config, 60.0)
    slow = look(units(300, champion=0.4, challenger=0.9, latency=400.0), opened(), config, 60.0)
    assert (failing.action, slow.action) == ("roll_back", "roll_back")
    assert "errors worse for certain" in failing.reason and "latency worse for certain" in slow.reason


def test_a_step_waits_for_its_users_and_its_minutes():
    config = RolloutConfig(steps=[0.25, 0.5, 1.0], step_minutes=10, step_users=30)
    few = [unit for unit in units(20, champion=0.5, challenger=0.5)]
    three_to_one = [
        Unit(f"c{number}", 0, "champion", number, 1, 0, 0, 100.0, 0.5, 1) for number in range(60)
    ] + units(40, champion=0.5, challenger=0.5)
    rollout = opened(shares=(0.25, 0.5, 1.0))
    assert "wanted 30" in look(few, rollout, config, 3600.0).reason
    assert "5 min of 10" in look(three_to_one, rollout, config, 300.0).reason
    assert look(three_to_one, rollout, config, 601.0).action == "advance"


def test_nobody_at_all_is_a_hold():
    assert judge(outcomes_of([]), opened(), RolloutConfig(), 60.0).action == "hold"


# --- the file -----------------------------------------------------------------------------------------------


def test_a_rollout_is_read_back_ended_once_and_garbage_is_refused(tmp_path: Path):
    write_rollout(tmp_path, opened())
    assert read_rollout(tmp_path) == opened()
    ended = msgspec.structs.replace(opened(), state="promoted", ended=5.0)
    end_rollout(tmp_path, ended)
    end_rollout(tmp_path, ended)
    assert read_rollout(tmp_path) is None and read_ended(tmp_path) == [ended]
    (tmp_path / FILE).write_text('{"id": 3}')
    with pytest.raises(CheckoutError, match="is no rollout"):
        read_rollout(tmp_path)


def test_a_paused_rollout_has_no_share_and_places_are_even():
    assert opened().share == 0.5 and msgspec.structs.replace(opened(), state="paused").share == 0.0
    places = [position("salt", f"user{number}") for number in range(4000)]
    assert abs(np.mean(places) - 0.5) < 0.02 and abs(np.mean(np.array(places) < 0.05) - 0.05) < 0.015


# --- a look at the real things ------------------------------------------------------------------------------


def ask(
    root: Path,  # noqa: F811
    rollout: Rollout,
    count: int,
    *,
    champion: float,
    challenger: float,
) -> None:
    """Traffic as the gateway logs it, with feedback."""
    log = open_log(root, CONFIG)
    for number in range(count):
        user = f"u{number}"
        arm = "challenger" if position(rollout.salt, user) < rollout.share else "champion"
        share = challenger if arm == "challenger" else champion
        log.put(
            Logged(
                f"q{number}",
                time.time(),
                user,
                arm,
                2 if arm == "challenger" else 1,
                rollout.id,
                rollout.step,
                (("user", "?"),),
                "answer",
                "stop",
                latency_ms=100.0 + number % 9,
            )
        )
        log.add_feedback(Feedback(f"q{number}", user, time.time(), float((number * 37 % 100) < share * 100)))
    assert log.flush()
    log.close()


def step(root: Path, config: Config = CONFIG) -> tuple[dict, list[str]]:  # noqa: F811
    said: list[str] = []
    return look_once(root, config, said.append), said


def challenge(root: Path, number: int = 2, **gate: object) -> None:  # noqa: F811
    reign(root, 1)
    register(number, rival=1, **gate)
    set_alias("small", CHALLENGER, number)


def test_a_challenger_is_rolled_out_and_promoted_by_its_users(root: Path):  # noqa: F811
    challenge(root)
    first, _ = step(root)
    assert (first.version, first.champion, first.share) == (2, 1, 0.5)
    assert get_version("small", 2).tags["rollout_share"] == "0.5"
    rollout = read_rollout(root)
    assert rollout is not None
    ask(root, rollout, 900, champion=0.3, challenger=0.7)

    done, said = step(root)

    champion = read_champion(root)
    assert (
        champion is not None
        and (champion.version, champion.by) == (2, "rollout (Ana)")
        and "mean feedback +0." in champion.why
    ), said
    assert (
        done.state == "promoted"
        and read_rollout(root) is None
        and rollout_status(root, CONFIG).state == "promoted"
    )
    assert (
        get_alias("small", CHAMPION),
        get_alias("small", CHALLENGER),
        get_version("small", 2).tags["rollout_state"],
    ) == (2, None, "promoted")


def test_a_worse_challenger_is_rolled_back_and_not_opened_again(root: Path):  # noqa: F811
    challenge(root)
    step(root)
    rollout = read_rollout(root)
    assert rollout is not None
    ask(root, rollout, 900, champion=0.7, challenger=0.3)
    assert step(root)[0].state == "rolled_back"
    assert get_alias("small", CHALLENGER) is None
    set_alias("small", CHALLENGER, 2)
    found, said = step(root)
    assert found is None and "its rollout ended rolled back" in " ".join(said)
    champion = read_champion(root)
    assert champion is not None and champion.version == 1


def test_one_that_did_not_pass_the_gate_never_answers_a_user(root: Path):  # noqa: F811
    challenge(root, verdict="uncertain")
    found, said = step(root)
    assert (
        found is None
        and "the gate's verdict on v2 is uncertain" in " ".join(said)
        and get_alias("small", CHALLENGER) is None
    )


@pytest.mark.parametrize("tag", ["gate", "git_commit"])
def test_a_registry_that_answers_garbage_opens_nothing(tag: str, root: Path):  # noqa: F811
    from ratchet.tracking.mlflow import mlflow_client

    challenge(root)
    if tag == "gate":
        mlflow_client().set_model_version_tag("small", "2", "gate", "[not json")
    else:
        mlflow_client().delete_model_version_tag("small", "2", tag)
    found, said = step(root)
    assert found is None and read_rollout(root) is None
    assert any("is no challenger any more" in line for line in said)


def test_pausing_and_aborting_need_no_server(root: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    challenge(root)
    step(root)
    use_no_mlflow(monkeypatch)
    said: list[str] = []
    assert pause_rollout(root, CONFIG, said.append).share == 0.0
    assert resume_rollout(root, CONFIG, said.append).share == 0.5
    assert abort_rollout(root, CONFIG, "complaints", said.append).state == "aborted"
    assert (
        read_rollout(root) is None
        and read_ended(root)[-1].why == "complaints"
        and any("MLflow hears of it later" in line for line in said)
    )
    with pytest.raises(UserError, match="no rollout is open"):
        pause_rollout(root, CONFIG, said.append)


def test_a_look_goes_on_with_mlflow_away_and_a_promotion_waits_for_it(
    root: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    challenge(root)
    step(root)
    rollout = read_rollout(root)
    assert rollout is not None
    ask(root, rollout, 900, champion=0.3, challenger=0.7)
    with monkeypatch.context() as patch:
        use_no_mlflow(patch)
        found, said = step(root)
        assert found.state == "open" and any("until MLflow answers" in line for line in said)
    assert step(root)[0].state == "promoted"


def test_a_promotion_waits_for_a_clean_checkout_and_one_cut_off_is_noted(root: Path):  # noqa: F811
    challenge(root)
    step(root)
    rollout = read_rollout(root)
    assert rollout is not None
    ask(root, rollout, 900, champion=0.3, challenger=0.7)
    before = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(before + "# changed\n")
    found, _ = step(root)
    assert found.state == "open" and "waits for the checkout" in found.why
    (root / "params.yaml").write_text(before)
    assert step(root)[0].state == "promoted"
    write_rollout(root, rollout)
    assert step(root)[0].state == "promoted", "champion.json had moved, the file had not"


def test_a_rollback_ends_the_rollout_and_a_refused_version_is_stopped(root: Path):  # noqa: F811
    challenge(root)
    step(root)
    write_state(
        root, {"refused": {"v2": "3 of 9 weights are not finite"}, "refused_since": {"v2": time.time()}}
    )
    assert step(root)[0].state == "open", "it may pass: the gateway tries again"
    write_rollout(root, msgspec.structs.replace(read_rollout(root), opened=time.time() - 1000))
    write_state(
        root, {"refused": {"v2": "3 of 9 weights are not finite"}, "refused_since": {"v2": time.time() - 200}}
    )
    found, _ = step(root)
    assert found.state == "stopped" and "not finite" in found.why
    reign_more(root)
    found, _ = step(root)
    assert found.state == "open" and found.version == 4
    back(root)
    step(root)
    ended = read_ended(root)[-1]
    assert (ended.version, ended.state) == (4, "aborted") and "v1 is in charge" in ended.why


def reign_more(root: Path) -> None:  # noqa: F811
    """v3 takes over, v4 is the challenger."""
    take(root, register(3, rival=1))
    set_alias("small", CHALLENGER, register(4, rival=3))


# --- decisions in MLflow's UI -------------------------------------------------------------------------------


def decide(number: int, **tags: str) -> None:
    for key, value in tags.items():
        set_tag("small", number, key, value)


def outcome(number: int) -> str:
    return get_version("small", number).tags.get("decision_outcome", "")


def test_approval_puts_a_gated_version_in_charge_once_and_names_the_person(root: Path):  # noqa: F811
    reign(root, 1)
    register(2, rival=1)
    decide(2, decision_by="Bo", reason="read the table", decision="approve")
    step(root, MANUAL)
    champion = read_champion(root)
    assert champion is not None and (champion.version, champion.by, champion.why) == (
        2,
        "Bo",
        "read the table",
    )
    assert outcome(2) == "approve: done: it is in charge"
    back(root)
    step(root, MANUAL)
    champion = read_champion(root)
    assert champion is not None and champion.version == 1, "a decision is acted upon once"


def test_approval_of_a_version_that_failed_is_refused_unless_forced_with_a_reason(root: Path):  # noqa: F811
    reign(root, 1)
    register(2, rival=1, verdict="reject")
    decide(2, decision="approve")
    step(root, MANUAL)
    assert outcome(2).startswith("approve: refused: the gate's verdict on v2 is reject")
    decide(2, decision="force")
    step(root, MANUAL)
    assert "needs a tag `reason`" in outcome(2) and read_champion(root).version == 1
    decide(2, decision="approve")
    step(root, MANUAL)
    decide(2, reason="the test rows are wrong", decision="force")
    step(root, MANUAL)
    champion = read_champion(root)
    assert (champion.version, champion.by, champion.why) == (
        2,
        "MLflow UI",
        "forced: the test rows are wrong",
    )


def test_rejection_ends_the_rollout(root: Path):  # noqa: F811
    challenge(root)
    step(root)
    decide(2, reason="tone", decision="reject")
    step(root)
    assert (
        read_rollout(root) is None
        and read_ended(root)[-1].state == "aborted"
        and outcome(2) == "reject: done: its rollout ended"
    )


@pytest.mark.parametrize("verdict", ["promote", "reject"])
def test_an_alias_that_is_moved_by_hand_is_a_decision(verdict: str, root: Path):  # noqa: F811
    reign(root, 1)
    register(2, rival=1, verdict=verdict)
    set_alias("small", CHAMPION, 2)
    step(root, MANUAL)
    wanted = 2 if verdict == "promote" else 1
    assert read_champion(root).version == wanted and get_alias("small", CHAMPION) == wanted
    assert (
        get_version("small", 2)
        .tags["alias_outcome"]
        .startswith(f"alias: {'done' if wanted == 2 else 'refused'}")
        and outcome(2) == ""
    )
