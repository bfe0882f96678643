"""What counts as one observation, and what has no reference."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest

from ratchet.config.monitoring import MonitorConfig
from ratchet.config.params import Config
from ratchet.monitoring.families import (
    MOST_ROWS,
    Answered,
    Reference,
    all_families,
    by_prompt,
    input_families,
)
from ratchet.monitoring.novelty import Familiar
from ratchet.monitoring.request_records import Feedback, Logged
from ratchet.monitoring.verdicts import Verdict
from tasks.monitor import measure, write_report

CONFIG = Config(monitor=MonitorConfig(resamples=400, min_prompts=100))
WORDS = [
    "open",
    "close",
    "read",
    "write",
    "file",
    "socket",
    "date",
    "thread",
    "parser",
    "queue",
    "signal",
    "buffer",
    "codec",
    "locale",
    "error",
    "path",
    "string",
    "number",
    "list",
    "table",
]


def prompts(count: int, seed: int) -> list[str]:
    chance = np.random.default_rng(seed)
    return list(
        dict.fromkeys(" ".join(chance.choice(WORDS, int(chance.integers(5, 12)))) for _ in range(count))
    )


@cache
def reference() -> Reference:
    training, held_out = prompts(1200, 1), prompts(600, 2)
    return Reference(
        Familiar(training),
        training,
        held_out,
        [Answered(("json", "os", "email")[len(text) % 3], 3.0 + len(text) % 7 / 10) for text in held_out],
    )


def request(number: int, prompt: str, **given: object) -> Logged:
    figures = {
        "answer": ("json", "os", "email")[len(prompt) % 3],
        "latency_ms": 20.0 + number % 5,
        "prompt_nll": 3.0 + len(prompt) % 7 / 10,
    } | given
    return Logged(
        f"r{number}", float(number), "", "champion", 1, messages=(("user", prompt),),
        **figures,  # type: ignore[arg-type]
    )  # fmt: skip


def window(count: int = 200, seed: int = 3, **given: object) -> list[Logged]:
    return [request(number, prompt, **given) for number, prompt in enumerate(prompts(count, seed))]


def look(requests: list[Logged], known: Reference | None = None) -> Verdict:
    return measure(requests, {}, [], known or reference(), CONFIG)


def test_one_answer_to_a_question_of_a_hundred_people_is_no_other_mix_of_answers():
    crowd = [request(1000 + number, "read table write list", answer="numpy") for number in range(100)]
    verdict = look([*window(), *crowd])
    assert verdict.verdict == "no drift", [column for column in verdict.columns if column.p < 0.05]
    assert (verdict.rows, verdict.distinct) == (len(window()) + 100, len(window()) + 1)


def test_of_a_repeated_prompt_the_newest_answer_counts_and_a_failure_only_where_there_is_none():
    asked = [
        request(0, "a"),
        request(1, " a ", answer="newest"),
        request(2, "a", status=502, answer=""),
        request(3, "b", status=502),
        request(4, "  "),
    ]
    found = by_prompt(asked)
    assert {asked.prompt: one.id for asked, one in found.items()} == {"a": "r1", "b": "r3"}


def test_a_champion_without_held_out_rows_gets_no_verdict_and_the_reason():
    verdict = look(window(), reference()._replace(prompts=prompts(9, 4)))
    assert verdict.verdict == "too few" and verdict.p is None and "wanted 10" in verdict.missing[0]


def test_fast_failures_do_not_look_like_fast_answers():
    earlier = window(300, 5)
    slow = [request(number, prompt, latency_ms=40.0) for number, prompt in enumerate(prompts(150, 6))]
    failing = [
        request(500 + number, prompt, latency_ms=0.1, status=502)
        for number, prompt in enumerate(prompts(100, 7))
    ]
    assert shown([*slow, *failing], {}, earlier)["latency"] == pytest.approx(
        (np.log1p(40.0), np.mean([np.log1p(one.latency_ms) for one in earlier]))
    )


def shown(
    window: list[Logged], feedback: dict[str, list[Feedback]], earlier: list[Logged]
) -> dict[str, tuple[float, float]]:
    """Family → (window, reference), of families with one column."""
    families, _ = all_families(window, feedback, earlier, reference(), CONFIG.monitor)
    return {
        family.name: (family.measures[0].value, family.measures[0].reference)
        for family in families
        if len(family.measures) == 1
    }


def test_feedback_is_compared_among_those_who_spoke():
    requests, earlier = (
        window(200, 8),
        [msgspec.structs.replace(one, id=f"e{one.id}") for one in window(200, 9)],
    )
    said = {one.id: [Feedback(one.id, "", 0.0, 0.5)] for one in requests[:60]} | {
        one.id: [Feedback(one.id, "", 0.0, 1.0)] for one in earlier[:90]
    }
    families, _ = all_families(requests, said, earlier, reference(), CONFIG.monitor)
    found = next(family for family in families if family.name == "feedback")
    assert (found.window, found.reference) == (60, 90) and shown(requests, said, earlier)["feedback"] == (
        0.5,
        1.0,
    )


def test_the_models_surprise_is_compared_among_the_requests_that_have_it():
    mixed = [
        msgspec.structs.replace(one, prompt_nll=None) if number % 2 else one
        for number, one in enumerate(window())
    ]
    families, _ = all_families(mixed, {}, [], reference(), CONFIG.monitor)
    found = next(family for family in families if family.name == "prompt NLL")
    assert found.window == (len(mixed) + 1) // 2 and 3.0 <= found.measures[0].value <= 4.0
    families, missing = all_families(window(prompt_nll=None), {}, [], reference(), CONFIG.monitor)
    assert "prompt NLL" not in {family.name for family in families} and any(
        line.startswith("prompt NLL: 0 in this window") for line in missing
    )


def test_a_reference_is_sampled_where_it_is_much_larger_than_a_window():
    long = [f"{text} {number}" for number in range(20) for text in prompts(400, 10)]
    families = input_families(prompts(100, 11), long, reference().familiar, CONFIG.monitor)
    assert len(long) > MOST_ROWS and {family.reference for family in families} == {MOST_ROWS}


def test_the_report_compares_prompts_and_answers_and_loads_nothing_from_elsewhere(tmp_path: Path):
    requests = window(120)
    folder = write_report(look(requests), reference(), requests, tmp_path / "report")
    page, told = (folder / "report.html").read_text(encoding="utf-8"), (folder / "report.json").read_text()
    assert not re.findall(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)
    assert all(name in told for name in ("rarity", "5-gram surprise", "answer characters", "prompt NLL"))
    assert json.loads((folder / "verdict.json").read_text())["distinct"] == len(requests)
