"""The card that a person decides from: whole, true to the figures, and valid Markdown."""

from __future__ import annotations

import re
from typing import Any

import cmarkgfm
import pytest
from cmarkgfm.cmark import Options

from ratchet.evaluation.report import Metrics, decode_metrics
from ratchet.monitoring.verdicts import Recorded, Topic
from ratchet.promotion.plain_words import tell_verdict
from ratchet.promotion.verdict import Candidate, Check, Rival, Verdict
from ratchet.reporting.markdown import LABELS, drift_card, model_card
from ratchet.reporting.markdown import table as show_table

BATCH = "20260101T000000Z-old-00000000.jsonl"


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}


def summary(mean: float, *, rows: int = 300, likelihood: bool = True) -> dict[str, Any]:
    scores = {
        "rows": rows,
        **{metric: interval(mean) for metric in ("exact_match", "token_f1", "rouge_l", "chrf")},
    }
    return scores | ({"answer_nll": interval(1.2), "perplexity": 3.32} if likelihood else {})


MODELS = {
    "base": summary(0.1),
    "candidate": summary(0.6),
    "champion": summary(0.4),
    "simple": summary(0.5, likelihood=False),
}
CHECKS = [
    Check("success", "exact_match", 300, "pass", "exact_match on 300 test rows is better for certain"),
    Check("golden", "exact_match", 40, "fail", "guardrail golden: worse"),
    Check("past", "exact_match", 80, "unclear", "guardrail past: cannot tell"),
]


def metrics_of(slices: dict[str, Any], **audits: Any) -> Metrics:
    return decode_metrics({"champion": 7, "slices": slices, **audits})


def verdict_of(
    verdict: Any = "reject", *, rival: int | None = 7, checks: list[Check] = CHECKS, **more: Any
) -> Verdict:
    against = Rival("base" if rival is None else "champion", rival)
    return Verdict(verdict, ["it is so"], against, checks, Candidate("key1", "sha"), **more)


def table(part: dict[str, Any]) -> list[str]:
    return show_table(metrics_of({"test": part}).slices["test"])


def card(
    slices: dict[str, Any] | None = None,
    *,
    verdict: str = "promote",
    rival: int | None = 7,
) -> str:
    metrics = metrics_of(
        slices or {"test": MODELS, "golden": MODELS, f"batch:{BATCH}": MODELS, "kind:module": MODELS}
    )
    decision = verdict_of(verdict, rival=rival)
    return model_card(metrics, decision, {"data": "100 rows in 2 batches, DVC 9f06", "git commit": "c" * 40})


def tables(text: str) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [rows for rows in found if rows]


def cells(line: str) -> list[str]:
    assert line.startswith("|")
    assert line.endswith("|")
    return [cell.strip() for cell in line[1:-1].split("|")]


@pytest.mark.parametrize("verdict", ["promote", "reject", "uncertain"])
def test_the_card_begins_with_one_sentence_then_the_verdict_and_its_rival(verdict):
    text = card(verdict=verdict)
    first, _, heading = text.splitlines()[:3]
    assert first == tell_verdict(verdict_of(verdict)) and verdict in heading
    assert "Compared with v7, the champion" in text
    assert "the untouched base (there is no champion yet)" in card(rival=None)


def test_the_card_tells_every_reason_with_its_mark():
    lines = card().splitlines()
    for mark, check in zip("✓✗?", CHECKS, strict=True):
        assert f"- {mark} {check.reason}" in lines


def test_the_card_tells_where_the_model_comes_from():
    assert card().endswith(f"- data: 100 rows in 2 batches, DVC 9f06\n- git commit: {'c' * 40}\n")


def test_the_table_has_the_intervals_of_candidate_champion_and_base():
    [head, line, *rows] = table(MODELS)
    assert cells(head) == ["", "candidate", "champion", "base", "simple"]
    assert set(line) == {"|", "-"}
    assert cells(rows[0]) == [
        "exact match",
        "0.600 [0.550, 0.650]",
        "0.400 [0.350, 0.450]",
        "0.100 [0.050, 0.150]",
        "0.500 [0.450, 0.550]",
    ]
    assert [cells(row)[0] for row in rows] == [
        "exact match",
        "token F1",
        "ROUGE-L",
        "chrF",
        "answer NLL (nats a token)",
        "perplexity",
        "rows",
    ]
    assert cells(rows[-2]) == ["perplexity", "3.32", "3.32", "3.32", ""]
    assert cells(rows[-1]) == ["rows", "300", "300", "300", "300"]


def test_every_slice_has_its_gain_and_its_name_opens_no_column():
    told = [Check("topic:a|b <b>", "chrf", 60, "unclear", "…", -0.1, -0.2, 0.05)]
    lines = model_card(metrics_of({"test": MODELS}), verdict_of(slices=told), {}).splitlines()
    assert "| slice | rows | gain in chrf | |" in lines
    assert r"| topic:a\|b \<b\> | 60 | -0.100 [-0.200, +0.050] | ? |" in lines


def test_what_a_gain_brings_stands_in_the_card_once():
    worth = Check("worth", "exact_match", 300, "fail", "worth: it does not")
    for checks in (CHECKS, [*CHECKS, worth]):
        text = model_card(metrics_of({"test": MODELS}), verdict_of(checks=checks, worth=worth), {})
        assert text.count("- ✗ worth: it does not") == 1


def test_every_kind_of_attack_has_the_share_that_each_model_withstood():
    withstood = {
        "exact_match": {
            "injection": {"candidate": {"rows": 40, **interval(0.9)}, "base": {"rows": 40, **interval(0.5)}}
        }
    }
    metrics = metrics_of({"test": MODELS}, attacks=withstood)
    lines = model_card(metrics, verdict_of(params={"metric": "exact_match"}), {}).splitlines()
    assert "| kind | rows | candidate | base |" in lines
    assert "| injection | 40 | 0.900 [0.850, 0.950] | 0.500 [0.450, 0.550] |" in lines


def test_a_metric_of_ones_own_has_a_line_before_the_likelihood():
    own = {
        "candidate": summary(0.6) | {"legal_term_recall": interval(0.7), "macro_f1": interval(0.3)},
        "base": summary(0.1),
    }
    [_, _, *rows] = table(own)
    names = [cells(row)[0] for row in rows]
    assert names == [
        "exact match",
        LABELS["macro_f1"],
        "token F1",
        "ROUGE-L",
        "chrF",
        "legal_term_recall",
        LABELS["answer_nll"],
        "perplexity",
        "rows",
    ]
    assert cells(rows[5]) == ["legal_term_recall", "0.700 [0.650, 0.750]", ""]


def test_a_model_that_was_not_scored_has_no_column():
    assert cells(table({"base": summary(0.1), "candidate": summary(0.6)})[0]) == ["", "candidate", "base"]


def test_the_golden_section_is_there_only_with_golden_rows():
    assert "### Golden rows" in card()
    assert "olden rows" not in card({"test": MODELS, f"batch:{BATCH}": MODELS})


def test_every_batch_has_a_line_and_kinds_have_none():
    other = "20260201T000000Z-new-00000000.jsonl"
    text = card(
        {
            "test": MODELS,
            f"batch:{BATCH}": MODELS,
            f"batch:{other}": {"base": summary(0.1, rows=12), "candidate": summary(0.6, rows=12)},
            "kind:module": MODELS,
        }
    )
    rows = {cells(line)[0]: cells(line) for line in tables(text)[-1]}
    assert set(rows) == {"batch", "---", BATCH, other}
    assert rows[other] == [other, "12", "0.600 [0.550, 0.650]", "", "0.100 [0.050, 0.150]", ""]
    assert "module" not in text


@pytest.mark.parametrize(
    "slices",
    [None, {"test": {"candidate": summary(0.6)}, f"batch:{BATCH}": {"candidate": summary(0.6)}}],
    ids=["whole", "one model"],
)
def test_every_line_of_a_table_has_as_many_cells_as_its_head(slices):
    found = tables(card(slices))
    assert len(found) == (3 if slices is None else 2)
    for rows in found:
        assert len(rows) >= 3
        assert {len(cells(row)) for row in rows} == {len(cells(rows[0]))}


def test_what_users_wrote_cannot_begin_markup_in_the_cards():
    """GitHub's parser renders both cards, with HTML left in: only our own elements may come out."""
    hostile = "<img src=x> ![a](b) **c** | `d` <!-- e\n\n# f"
    region = Check("region:x", "exact_match", 9, "pass", f"drifted topic {hostile}: better")
    lost = Check(f"past:{hostile}", "exact_match", 9, "fail", "worse", -0.5, -0.6, -0.4)
    shown = model_card(metrics_of({"test": MODELS}), verdict_of(checks=[lost], regions=[region]), {})
    topic = Topic(hostile, share=0.2, reference_share=0.1, examples=[hostile])
    drifted = drift_card(Recorded(at=0, verdict="drift", rows=9, topics=[topic]))
    for text in (shown, drifted):
        html = cmarkgfm.github_flavored_markdown_to_html(text, options=Options.CMARK_OPT_UNSAFE)
        tags = set(re.findall(r"<(?:!--|[a-z]\w*)", html))
        assert tags & {"<img", "<!--", "<a", "<h1", "<code"} == set(), html
        assert "&lt;img src=x&gt;" in html
