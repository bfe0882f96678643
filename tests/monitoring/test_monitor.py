"""The monitor: a rate of false alarms that is kept, each kind of drift by itself, topics, decisions.

On real documentation texts.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest

from ratchet.config.data import PydocSource
from ratchet.config.monitoring import MonitorConfig
from ratchet.config.params import Config
from ratchet.monitoring.drift import WEIGHTS, Family, draw, growth, higher, judge, mix, other
from ratchet.monitoring.families import Answered, Reference, input_families
from ratchet.monitoring.novelty import Familiar, stems_of
from ratchet.monitoring.request_records import Feedback, Logged
from ratchet.monitoring.topics import belongs, find_topics
from ratchet.monitoring.verdicts import Recorded, Topic, Verdict, last_verdict, read_verdicts
from ratchet.promotion.champion import Champion
from ratchet.services.status import verdict_lines
from ratchet.sources.pydoc import harvest
from tasks.monitor import Facts, append_verdict, decide, load_reference, measure, write_report

CONFIG = Config(monitor=MonitorConfig(resamples=800, min_prompts=100))


@cache
def texts(*packages: str) -> list[str]:
    rows = harvest(PydocSource(packages=list(packages), min_objects=1, summaries=0.0))
    found = list(dict.fromkeys(row["messages"][0]["content"] for row in rows))
    return [found[place] for place in np.random.default_rng(0).permutation(len(found))]


@cache
def familiar() -> Familiar:
    return Familiar(texts("stdlib")[:3000])


def reference(answers: list[Answered] | None = None) -> Reference:
    return Reference(
        familiar(), texts("stdlib")[:3000], texts("stdlib")[3000:4200], answers if answers is not None else []
    )


def asked(
    prompts: list[str],
    *,
    answer: str = "json",
    version: int = 1,
    latency: float = 20.0,
    status: int = 200,
    prompt_nll: float | None = None,
) -> list[Logged]:
    return [
        Logged(
            f"{version}-{number}-{len(prompts)}",
            float(number),
            f"u{number}",
            "champion",
            version,
            messages=(("user", prompt),),
            answer=answer,
            status=status,
            latency_ms=latency + number % 5,
            prompt_nll=prompt_nll,
        )
        for number, prompt in enumerate(prompts)
    ]


def quiet() -> list[str]:
    return texts("stdlib")[4200:4500]


def look(window: list[Logged], **settings: object) -> Verdict:
    return measure(
        window,
        settings.pop("feedback", {}),
        settings.pop("earlier", []),
        settings.pop("reference", reference()),
        CONFIG,
    )  # type: ignore[arg-type]


# --- the rate -----------------------------------------------------------------------------------------------


def test_windows_without_drift_give_alarms_no_more_often_than_the_rate():
    pool, chance, alarms = texts("stdlib")[3000:], np.random.default_rng(1), 0
    for number in range(30):
        order = chance.permutation(len(pool))
        window, rest = [pool[place] for place in order[:150]], [pool[place] for place in order[150:600]]
        alarms += judge(
            input_families(window, rest, familiar(), CONFIG.monitor), rate=0.05, resamples=200, seed=number
        ).drift
    assert alarms <= 5, "99 % limit of 30 windows at 5 %"


def test_a_tenth_of_new_subjects_in_five_hundred_prompts_is_found():
    pool, new, chance, found = texts("stdlib")[3000:], texts("numpy"), np.random.default_rng(2), 0
    for number in range(10):
        order = chance.permutation(len(pool))
        window = [pool[place] for place in order[:450]] + [
            new[place] for place in chance.permutation(len(new))[:50]
        ]
        found += judge(
            input_families(window, [pool[place] for place in order[450:]], familiar(), CONFIG.monitor),
            rate=0.05,
            resamples=200,
            seed=number,
        ).drift
    assert found >= 8


def test_the_null_is_right_for_a_reference_that_is_smaller_than_the_window():
    chance, alarms = np.random.default_rng(3), 0
    for number in range(200):
        values = chance.normal(size=300 + 60)
        alarms += judge(
            [Family("surprise", 300, 60, [higher("x", values, 300), other("y", values**3, 300)])],
            rate=0.05,
            resamples=200,
            seed=number,
        ).drift
    assert alarms <= 18, "99 % limit"


def test_draws_hold_the_window_first_and_as_many_rows_in_each():
    draws = draw(7, 13, 50, seed=1)
    assert draws.shape == (51, 20) and draws[0].tolist() == [1.0] * 7 + [0.0] * 13
    assert set(draws.sum(axis=1).tolist()) == {7.0}
    assert (draw(7, 13, 50, seed=1) == draws).all()


def test_the_weights_of_text_share_the_whole_error():
    of_media = {"pictures", "what pictures show", "recordings"}
    assert of_media < WEIGHTS.keys()
    assert sum(WEIGHTS[family] for family in WEIGHTS.keys() - of_media) == pytest.approx(1.0)


# --- each kind by itself ------------------------------------------------------------------------------------


def test_quiet_traffic_is_no_drift():
    verdict = look(asked(quiet()))
    assert (
        verdict.verdict == "no drift" and verdict.p is not None and verdict.p > 0.05 and verdict.topics == []
    )


def test_new_subjects_are_drift_and_are_named_with_examples():
    verdict = look(asked([*quiet()[:200], *texts("numpy")[:80]]))
    assert (
        verdict.verdict == "drift"
        and min(column.p for column in verdict.columns if column.family == "novelty") < 0.01
    )
    assert verdict.topics and any(
        belongs(topic, text)
        for topic in verdict.topics
        for text in ("Return the sum of array elements.", "Return an ndarray.")
    )
    topic = verdict.topics[0]
    assert (
        topic.share > topic.reference_share
        and topic.examples
        and all(example in texts("numpy") or example in quiet() for example in topic.examples)
    )


def test_the_same_subjects_in_another_mix_are_drift():
    mostly = [
        text
        for text in texts("stdlib")[4200:]
        if "test" in text.lower() or "file" in text.lower() or "socket" in text.lower()
    ]
    verdict = look(asked([*mostly[:150], *quiet()[:30]]))
    assert verdict.verdict == "drift"
    assert min(column.p for column in verdict.columns if column.family == "form and mix") < 0.02


@pytest.mark.parametrize("change", ["shorter", "longer"])
def test_shorter_and_longer_prompts_are_drift(change: str):
    prompts = [
        text.rsplit(" ", len(text.split()) // 2)[0] if change == "shorter" else f"{text} {text.lower()}"
        for text in quiet()
    ]
    verdict = look(asked(prompts))
    assert next(column.p for column in verdict.columns if column.name.startswith("prompt length")) < 0.02


def test_other_answers_empty_ones_and_refusals_are_drift():
    own = [Answered(answer, 3.0) for answer in ["json", "email", "os", "typing"] * 80]
    ordinary = asked(quiet(), prompt_nll=3.0)
    ordinary = [
        Logged(
            **{**{name: getattr(one, name) for name in one.__struct_fields__}, "answer": own[number].answer}
        )
        for number, one in enumerate(ordinary)
    ]
    assert look(ordinary, reference=reference(own)).verdict == "no drift"
    for answer in ("", "I cannot answer that.", "socket"):
        verdict = look(asked(quiet(), answer=answer, prompt_nll=3.0), reference=reference(own))
        assert verdict.verdict == "drift" and verdict.moved == ["answers"]


def test_a_prompt_that_surprises_the_model_is_drift():
    own = [Answered("json", 3.0 + 0.01 * (number % 50)) for number in range(320)]
    verdict = look(asked(quiet(), prompt_nll=3.9), reference=reference(own))
    assert verdict.verdict == "drift" and verdict.moved == ["prompt NLL"]


@pytest.mark.parametrize("fault", ["feedback", "errors", "latency"])
def test_worse_feedback_more_errors_and_slower_answers_are_drift(fault: str):
    earlier = asked(texts("stdlib")[4500:4900])
    window = asked(quiet(), latency=60.0 if fault == "latency" else 20.0)
    if fault == "errors":
        window = [*window[:-40], *asked(quiet()[-40:], status=502)]
    score = {
        one.id: [Feedback(one.id, one.user, 0.0, float(number % 10 < 8))]
        for number, one in enumerate(earlier)
    }
    score |= {
        one.id: [Feedback(one.id, one.user, 0.0, float(number % 10 < (5 if fault == "feedback" else 8)))]
        for number, one in enumerate(window)
    }
    verdict = look(window, earlier=earlier, feedback=score)
    assert (verdict.verdict, verdict.moved) == ("drift", [fault]), verdict.columns
    assert verdict.topics == [], "no subject grew"
    assert decide(verdict, Facts(900, 0, 0.0, None), CONFIG).retrain == (fault == "feedback"), (
        "training mends no latency"
    )


def test_a_busy_hour_is_no_drift():
    """Slower by a fourth, to the last request: significant, and of no consequence."""
    verdict = look(asked(quiet(), latency=25.0), earlier=asked(texts("stdlib")[4500:4900]))
    assert verdict.verdict == "no drift" and verdict.moved == [], verdict.columns


# --- what is refused or left out ----------------------------------------------------------------------------


def test_a_small_window_gets_no_verdict_and_the_number_that_is_needed():
    verdict = look(asked(quiet()[:60]))
    assert (verdict.verdict, verdict.p, verdict.distinct, verdict.needed) == ("too few", None, 60, 100)
    decision = decide(verdict, Facts(1000, 0, 0.0, None), CONFIG)
    assert not decision.retrain and "60 distinct prompts, wanted 100" in decision.against[0]


def test_one_question_of_a_hundred_people_is_no_new_subject():
    verdict = look(asked([*quiet()[:200], *["Sum the ndarray over its axis with numpy?"] * 100]))
    assert verdict.verdict == "no drift" and (verdict.rows, verdict.distinct) == (300, 201)


def test_a_log_without_texts_says_so():
    window = [Logged(f"r{number}", 0.0, "", "champion", 1) for number in range(300)]
    verdict = look(window)
    assert verdict.verdict == "too few" and "request_log.texts" in verdict.missing[0]


def test_families_without_a_reference_are_named():
    assert [line.partition(":")[0] for line in look(asked(quiet())).missing] == [
        "answers",
        "feedback",
        "errors",
        "latency",
    ]


def test_hostile_prompts_are_measured_like_any_other():
    odd = ["", " ", "\x00", "\u202e" * 50, "💥" * 30, "<script>alert(1)</script>", "a" * 20_000, "١٢٣", "…"]
    found = familiar().columns(odd)
    assert all(np.isfinite(values).all() and len(values) == len(odd) for values in found.values())
    assert look(asked([*quiet(), *odd])).p is not None


def test_stems_join_the_forms_of_a_word_and_the_parts_of_a_name():
    assert set(stems_of("returns returned returning")) == {"return"}
    assert stems_of("dtype_float64") == ["dtyp", "float"]


def test_a_mix_of_kinds_ignores_the_rare_ones():
    kinds = np.array([0] * 50 + [1] * 50 + [2] * 3)
    assert mix("x", kinds, 50).value == 1.0


def test_one_answer_that_grew_is_found_among_hundreds_of_answers():
    draws, p = draw(500, 2000, 400, 0), dict[str, list[float]]()
    for seed in range(10):
        chance = np.random.default_rng(seed)
        kinds = chance.integers(0, 200, 2500)
        kinds[chance.permutation(500)[:15]] = 7  # of the window: from 2.5 to 17.5 requests
        for one in (mix("mix", kinds, 500), growth("growth", kinds, 500)):
            statistic = one.statistic(draws)
            p.setdefault(one.name, []).append(float((statistic >= statistic[0] - 1e-6).mean()))
            assert one.value == pytest.approx(0.035, abs=0.01)
            assert one.reference == pytest.approx(0.005, abs=0.005)
    assert np.median(p["growth"]) < 0.01 < np.median(p["mix"])
    assert max(p["growth"]) < 0.05
    assert growth("x", np.arange(100), 50).statistic(draw(50, 50, 10, 0)).tolist() == [0.0] * 11


def test_no_topic_is_made_of_words_that_did_not_grow():
    assert (
        sum(
            topic.share
            for topic in find_topics(
                quiet(), texts("stdlib")[3000:4200], texts("stdlib")[:3000], most=8, seed=0
            )
        )
        < 0.15
    )
    grown = find_topics(
        [*quiet()[:100], *texts("jinja2")[:60]],
        texts("stdlib")[3000:4200],
        texts("stdlib")[:3000],
        most=3,
        seed=0,
    )
    assert 1 <= len(grown) <= 3 and any(
        "template" in topic.terms or "jinja" in " ".join(topic.terms) for topic in grown
    ), grown


# --- the decision, and what stays of it ---------------------------------------------------------------------


def drifted(p: float = 0.001) -> Verdict:
    return Verdict(
        "drift",
        p,
        500,
        480,
        100,
        topics=[Topic("array", ["array"], 0.3, 0.0, ["An array?"])],
        moved=["novelty"],
    )


def test_a_verdict_and_the_decision_that_follows_are_told_apart():
    for facts, told in (
        (Facts(900, 0, 0.0, None), "  so a retraining is worth it:"),
        (Facts(900, 3, 0.0, 90.0), "  so no retraining:"),
    ):
        decision = decide(drifted(), facts, CONFIG)
        found = Recorded(**msgspec.structs.asdict(drifted()), at="now", version=1, decision=decision)
        verdict, *lines = verdict_lines(found)
        assert verdict.startswith("drift on ") and lines.count(told) == 1
        assert not any(line.startswith("drift") for line in lines)
        assert len(lines) - lines.index(told) - 1 == len(decision.for_) + len(decision.against)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (
            Facts(10, 0, 0.0, None),
            "10 labelled rows that the champion has not seen, monitor.min_new_rows 200",
        ),
        (
            Facts(10, 0, 0.0, None, known_rows=90),
            "10 labelled rows that the champion has not seen, wanted 20, as it has seen 90 "
            "(monitor.min_new_rows)",
        ),
        (Facts(900, 3, 0.0, 90.0), "3 retrainings in seven days, monitor.max_retrains_per_week 3"),
        (Facts(900, 0, 11.0, 90.0), "11.00 h of training in seven days, monitor.max_gpu_hours_per_week 10"),
        (Facts(900, 1, 0.1, 2.0), "2.0 h since the last retraining, monitor.cooldown_hours 24"),
    ],
)
def test_drift_alone_starts_no_retraining(facts: Facts, words: str):
    decision = decide(drifted(), facts, CONFIG)
    assert (
        not decision.retrain
        and decision.against == [words]
        and any("p = 0.0010" in line for line in decision.for_)
    )


def test_no_other_retraining_starts_while_its_cure_is_tried_on_users():
    [against] = decide(drifted(), Facts(900, 0, 0.0, None, under_way=True), CONFIG).against
    assert "retraining" in against
    decision = decide(drifted(), Facts(900, 0, 0.0, None, rollout_of=4), CONFIG)
    [against] = decision.against
    assert not decision.retrain and "rollout" in against and "v4" in against


def test_drift_with_rows_and_budget_does_and_without_drift_nothing_does():
    assert decide(drifted(), Facts(900, 1, 0.1, 30.0), CONFIG).retrain
    calm = decide(Verdict("no drift", 0.4, 500, 480, 100), Facts(900, 0, 0.0, None), CONFIG)
    [against] = calm.against
    assert not calm.retrain and all(
        word in against for word in ("no drift", "0.4", "monitor.false_alarm_rate", "0.05")
    )


def test_verdicts_are_lines_with_their_reasons(tmp_path: Path):
    champion = Champion(
        "small", 3, 2, "c" * 40, "k", "r", "s", [], {}, {}, "2026-01-02T03:04:05Z", "Ana", "w", "promote", 2
    )
    decision = decide(drifted(), Facts(10, 0, 0.0, None), CONFIG)
    append_verdict(tmp_path, champion, drifted(), decision, None)
    found = append_verdict(
        tmp_path, champion, drifted(0.02), decision, tmp_path / ".ratchet/monitor/reports/x"
    )
    assert read_verdicts(tmp_path)[-1] == last_verdict(tmp_path) == found, "as it was written"
    lines = [
        json.loads(line) for line in (tmp_path / ".ratchet/monitor/verdicts.jsonl").read_text().splitlines()
    ]
    assert [line["p"] for line in lines] == [0.001, 0.02] and lines[1] == msgspec.to_builtins(found)
    assert (
        found.topics[0].terms == ["array"]
        and found.decision.against
        and found.report == ".ratchet/monitor/reports/x"
    )


def test_the_reference_is_read_from_what_a_retraining_leaves(prepared: Path, tmp_path: Path):
    import pandas as pd

    table = pd.DataFrame(
        {
            "model": ["candidate", "base"],
            "answer": ["json", "os"],
            "answer_nll": [1.0, 2.0],
            "prompt_nll": [3.0, 4.0],
        }
    )
    table.to_parquet(tmp_path / "scores.parquet")
    found = load_reference(prepared, tmp_path)
    assert (
        found.answers == [Answered("json", 3.0)]
        and len(found.training) == found.familiar.rows > 100
        and len(found.prompts) > 20
    )
    table.drop(columns="prompt_nll").to_parquet(tmp_path / "scores.parquet")
    assert load_reference(prepared, tmp_path).answers == [Answered("json", None)], "an evaluation of before"


def test_the_report_is_a_page_without_foreign_parts_and_says_what_evidently_saw(tmp_path: Path):
    window = asked([*quiet()[:120], *texts("numpy")[:60]])
    folder = write_report(look(window), reference(), window, tmp_path / "report")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert len(page) > 100_000 and "rarity" in (folder / "report.json").read_text()
    assert json.loads((folder / "verdict.json").read_text())["verdict"] == "drift"
