"""The sentence with which each verdict begins: right for every kind of check, and plain."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
from msgspec import UNSET

from ratchet.config.base import Metric
from ratchet.promotion.plain_words import METRICS, tell_verdict
from ratchet.promotion.verdict import Candidate, Check, Rival, Verdict, tell_rows

BATCH = "20260301T000000Z-march-tickets-0a1b2c3d.jsonl"


def check(name: str, mean: float | None, result: Any = "pass", **more: Any) -> Check:
    metric = more.pop("metric", "exact_match")
    figures = (mean, None if mean is None else mean - 0.02, None if mean is None else mean + 0.02)
    rows = more.pop("rows", 1200)
    return Check(name, metric, rows, result, "p = 0.01, reports/gate.json", *figures, **more)


def verdict(*checks: Check, rival: int | None = 3, slices: list[Check] | None = None) -> Verdict:
    results = {one.result for one in checks}
    word: Any = "reject" if "fail" in results else "uncertain" if "unclear" in results else "promote"
    against = Rival("base" if rival is None else "champion", rival)
    return Verdict(word, ["…"], against, list(checks), Candidate("key", "sha"), slices=slices or [])


BETTER = check("success", 0.04, score=0.45)


# --- it passed ---


def test_a_promotion_says_by_how_much_and_that_nothing_was_lost():
    found = verdict(BETTER, check("golden", 0.01), check("past", 0.0), check("answer_nll", -0.01))
    told = "right answers rose from 41 % to 45 % on 1,200 test rows, and nothing that it knew got worse."
    assert tell_verdict(found) == f"Passed: {told}"
    assert tell_verdict(found, promoted=True) == f"Promoted: {told}"


def test_a_loss_that_the_gate_still_takes_is_told():
    found = verdict(BETTER, check("golden", -0.03), check(f"past:{BATCH}", -0.01))
    assert tell_verdict(found) == (
        "Passed: right answers rose from 41 % to 45 % on 1,200 test rows, and the most that it lost is "
        "3 points on the golden questions, which is still allowed."
    )


def test_a_first_version_is_compared_with_the_base():
    found = verdict(check("success", 0.38, score=0.41), check("answer_nll", 0.5), rival=None)
    assert tell_verdict(found) == (
        "Passed: right answers rose from 3 % (the untouched base) to 41 % on 1,200 test rows, "
        "and every other check passed."
    )


@pytest.mark.parametrize(
    ("metric", "mean", "told"),
    [
        ("answer_nll", 0.4, "the likelihood of the wanted answers rose"),
        ("exact_match", 0.4, "right answers rose by 40 points"),
        ("exact_match", None, "right answers rose"),
    ],
)
def test_without_both_scores_the_base_is_named_all_the_same(metric, mean, told):
    found = verdict(check("success", mean, metric=metric), rival=None)
    assert tell_verdict(found) == f"Passed: {told} on 1,200 test rows, compared with the untouched base."


def test_a_verdict_of_an_older_version_has_no_scores_and_tells_the_gain():
    assert tell_verdict(verdict(check("success", 0.04))) == (
        "Passed: right answers rose by 4 points on 1,200 test rows."
    )
    assert tell_verdict(verdict(check("success", None))) == "Passed: right answers rose on 1,200 test rows."
    assert tell_verdict(verdict()) == "Passed: every check passed."


@pytest.mark.parametrize(
    ("metric", "mean", "score", "told"),
    [
        ("chrf", 0.004, 0.414, "agreement with the wanted text rose from 41.0 % to 41.4 %"),
        ("refusal", 0.02, 0.05, "refusals fell from 7 % to 5 %"),
        ("answer_nll", 0.2, 1.4, "the likelihood of the wanted answers rose on"),
        ("legal_terms", 0.1, 0.6, "the measure legal_terms rose from 50 % to 60 %"),
    ],
)
def test_each_metric_moves_in_its_own_direction_and_unit(metric, mean, score, told):
    assert told in tell_verdict(verdict(check("success", mean, metric=metric, score=score)))


def test_every_built_in_metric_has_a_plain_name():
    assert set(get_args(Metric)) - {"length"} <= set(METRICS)
    assert not [name for name in METRICS.values() if re.search(r"_|\bF1\b|ROUGE|BLEU|NLL|chrF", name)]


# --- it failed ---

LOST = "the candidate lost 6 points"
FAULTS = {
    "past": f"{LOST} on what earlier batches taught.",
    f"past:{BATCH}": f"{LOST} on what batch march-tickets of 2026-03-01 taught.",
    "past:2026-03-rows": f"{LOST} on what batch 2026-03-rows taught.",
    "golden": f"{LOST} on the golden questions.",
    "oldest": f"{LOST} against the first champion.",
    "base": f"{LOST} against the untouched base.",
    "nodes": f"{LOST} on the rows that stay at the nodes.",
    "suite:arithmetic": f"{LOST} in the public test arithmetic.",
    "metric:exact_match": "right answers fell by 6 points.",
    "groups:region": "the gap between the best and the worst group by region grew by 6 points.",
    "bias": "swapped names, pronouns and the like change the candidate's answers more than before.",
    "attacks": "the candidate withstands fewer attacks.",
    "attacks:kinds": "the candidate withstands fewer attacks.",
    "pictures:without": "nothing shows that the candidate looks at pictures.",
    "recordings:another": "nothing shows that the candidate listens to recordings.",
    "both:another": "nothing shows that the candidate uses pictures and recordings.",
    "answer_nll": "the likelihood of the wanted answers fell.",
    "a new kind:of check": "the candidate failed the check a new kind:of check.",
}
UNMEASURED = {
    "parity": "what users would get differs from what was tested.",
    "privacy": "the privacy that the candidate's training promised does not hold up.",
    "leaks": "the candidate gives away what was planted in its training data.",
    "attacks:text": "typed text was taken for control signs, or was not refused though too long.",
}


@pytest.mark.parametrize("name", [*FAULTS, *UNMEASURED])
def test_each_guardrail_that_fails_has_its_sentence(name):
    failed = check(name, -0.06 if name in FAULTS else None, "fail", wanted=-0.02)
    told = tell_verdict(verdict(BETTER, failed))
    assert told == f"Kept the champion (v3): {(FAULTS | UNMEASURED)[name]}"


def test_a_guardrail_of_which_less_is_better_rises():
    found = verdict(BETTER, check("metric:refusal", -0.06, "fail", metric="refusal"))
    assert tell_verdict(found) == "Kept the champion (v3): refusals rose by 6 points."


def test_a_training_that_costs_more_than_it_brings_tells_both():
    found = verdict(BETTER, check("worth", 1204.0, "fail", wanted=3400.0))
    assert "the gain is worth 1,204, less than the 3,400 that the training cost" in tell_verdict(found)


def test_the_slice_that_lost_most_is_named():
    parts = [check("kind:a", -0.07, "fail"), check("kind:b", -0.2, "fail"), check("kind:c", -0.3, "unclear")]
    found = verdict(BETTER, check("slices", -0.07, "fail"), slices=parts)
    assert tell_verdict(found) == (
        "Kept the champion (v3): the candidate lost 20 points on the rows of kind b and on 1 more kind of "
        "rows."
    )


@pytest.mark.parametrize(
    ("mean", "score", "wanted", "told"),
    [
        (-0.04, 0.41, 0.0, "right answers fell from 45 % to 41 % on 1,200 test rows."),
        (0.0, 0.41, 0.0, "right answers did not change on 1,200 test rows."),
        (0.004, 0.414, 0.05, "rose from 41.0 % to 41.4 % on 1,200 test rows, of 5 points that are wanted."),
    ],
)
def test_a_candidate_that_is_not_better_is_told_so(mean, score, wanted, told):
    assert told in tell_verdict(verdict(check("success", mean, "fail", score=score, wanted=wanted)))


def test_the_weightiest_reason_is_named_and_the_others_are_counted():
    found = verdict(
        check("success", 0.0, "fail", score=0.4),
        check("golden", -0.03, "fail"),
        check(f"past:{BATCH}", -0.03, "fail"),
        check("past:worse", -0.2, "fail"),
        check("answer_nll", -0.3, "unclear"),
    )
    assert tell_verdict(found) == (
        "Kept the champion (v3): the candidate lost 20 points on what batch worse taught; 3 other checks "
        "failed and 1 is unclear."
    )
    void = verdict(*found.checks, check("parity", None, "fail"))
    assert tell_verdict(void).startswith("Kept the champion (v3): what users would get differs")


def test_without_a_champion_nothing_is_kept():
    found = verdict(check("success", -0.01, "fail", score=0.02), rival=None)
    assert tell_verdict(found) == (
        "Not promoted: right answers fell from 3 % (the untouched base) to 2 % on 1,200 test rows."
    )


def test_a_version_that_a_person_forced_says_what_was_overruled():
    found = verdict(BETTER, check("golden", -0.06, "fail"))
    assert tell_verdict(found, promoted=True) == (
        "Promoted although the candidate lost 6 points on the golden questions."
    )


# --- it cannot be told ---

UNTOLD = "Kept the champion (v3): it cannot be told whether"


def test_the_rows_that_would_settle_it_are_told():
    doubt = check("success", 0.02, "unclear", score=0.43, needed=583, rows=300)
    assert tell_verdict(verdict(doubt)) == (
        f"{UNTOLD} right answers rose: from 41 % to 43 % on 300 test rows may be chance; about 590 more test "
        "rows would settle it."
    )


@pytest.mark.parametrize(
    ("needed", "told"),
    [
        (64, "golden questions; about 64 more golden rows would settle it."),
        (None, "; more rows would not settle it, with a difference as small as this."),
        (UNSET, "; how many more rows would settle it is not known."),
    ],
)
def test_a_need_that_is_not_known_is_told_too(needed, told):
    found = tell_verdict(verdict(BETTER, check("golden", -0.01, "unclear", needed=needed)))
    assert found.startswith(f"{UNTOLD} the candidate got worse on the golden questions")
    assert found.endswith(told)


def test_too_few_rows_to_judge_are_told_without_figures():
    doubt = check("success", None, "unclear", rows=5, needed=95)
    assert tell_verdict(verdict(doubt, rival=None)) == (
        "Not promoted: it cannot be told whether right answers rose: 5 test rows are too few; it takes at "
        "least 95 more test rows."
    )


DOUBTS = {
    f"past:{BATCH}": "the candidate got worse on what batch march-tickets of 2026-03-01 taught",
    "leaks": "the candidate gives away its training data",
    "bias": "swapped names, pronouns and the like change the candidate's answers more than before",
    "attacks": "the candidate withstands fewer attacks",
    "pictures:without": "the candidate looks at pictures",
    "nodes": "the candidate got worse on the rows that stay at the nodes",
    "answer_nll": "the likelihood of the wanted answers fell",
    "suite:arithmetic": "the candidate got worse in the public test arithmetic",
    "metric:chrf": "agreement with the wanted text fell",
    "a new kind:of check": "the candidate passes the check a new kind:of check",
}


@pytest.mark.parametrize("name", DOUBTS)
def test_each_guardrail_that_is_unclear_has_its_sentence(name):
    metric = name.partition(":")[2] if name.startswith("metric:") else "exact_match"
    found = verdict(BETTER, check(name, -0.01, "unclear", metric=metric, needed=600))
    assert tell_verdict(found).startswith(f"{UNTOLD} {DOUBTS[name]}; about 600 more ")


def test_a_judge_that_may_not_decide_and_groups_that_are_too_small_say_so():
    judge = check("metric:judge_correctness", None, "unclear", metric="judge_correctness")
    assert tell_verdict(verdict(BETTER, judge)) == (
        f"{UNTOLD} the judge model's marks for correctness fell: the judge model may not decide yet."
    )
    groups = check("groups:region", None, "unclear")
    assert tell_verdict(verdict(BETTER, groups)).endswith(": too few rows belong to a group.")


def test_other_doubts_are_counted_and_the_success_comes_first():
    doubts = [check("golden", -0.01, "unclear", needed=10), check("success", 0.01, "unclear", needed=600)]
    told = tell_verdict(verdict(*doubts))
    assert "right answers rose: a gain of 1 point on 1,200 test rows may be chance" in told
    assert told.endswith("; 1 other check is unclear.")


# --- whatever it is ---


@pytest.mark.parametrize("result", ["fail", "unclear"])
@pytest.mark.parametrize("name", [*FAULTS, *UNMEASURED])
def test_it_is_one_plain_sentence_without_files_and_statistics(name, result):
    told = tell_verdict(verdict(check("success", 0.01, score=0.4), check(name, -0.06, result)))
    assert told.count(". ") == 0 and told.endswith(".") and "\n" not in told
    assert not re.search(r"p =|\.jsonl|\.json|_|alpha|interval|\{|\}", told)


def test_names_from_the_data_are_quoted_cut_and_on_one_line():
    hostile = "<b>\u202e\n" + "x" * 200
    found = verdict(BETTER, check(f"past:{hostile}", -0.06, "fail"))
    told = tell_verdict(found, quote=lambda name: f"«{name}»")
    [name] = re.findall("«(.*)»", told)
    assert len(name) == 60 and name.startswith("<b> x") and name.isprintable()


def test_an_estimate_of_rows_has_two_digits():
    assert [tell_rows(count) for count in (1, 64, 583, 1201)] == ["1", "64", "590", "1,300"]
