"""Render, as Markdown, what a person decides from.

It is the verdict in one sentence, then the gate's reasons, and the table of candidate, champion and base with
intervals.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from msgspec import UNSET

from ratchet.evaluation.report import (
    Agreement,
    Change,
    Exposure,
    Groups,
    Judged,
    Metrics,
    Models,
    Suite,
    Summary,
)
from ratchet.evaluation.statistics import Estimate, Interval
from ratchet.monitoring.verdicts import Picture, Recorded
from ratchet.promotion.plain_words import tell_verdict
from ratchet.promotion.rollout import Rollout
from ratchet.promotion.verdict import Check, Verdict

MODELS = ("candidate", "champion", "base", "simple")
LABELS = {
    "exact_match": "exact match",
    "accuracy": "accuracy",
    "macro_f1": "macro F1 over labels",
    "token_f1": "token F1",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "json_valid": "valid JSON",
    "json_fields": "same JSON fields",
    "regex_match": "fits the pattern",
    "numeric_match": "same number",
    "tool_decision": "right to call a tool or not",
    "tool_name": "same tools",
    "tool_arguments": "same calls",
    "refusal": "refusals (less is better)",
    "length": "length (words)",
    "answer_nll": "answer NLL (nats a token)",
}
VERDICTS = {"promote": "✅ promote", "reject": "❌ reject", "uncertain": "❔ uncertain: the champion stays"}


def model_card(metrics: Metrics, verdict: Verdict, facts: dict[str, str]) -> str:
    """Render the version's description, which is also an artifact of the flow, as Markdown.

    `facts` are lines such as data and commit.
    """
    rival = verdict.rival.version
    against = (
        f"v{rival}, the champion" if rival is not None else "the untouched base (there is no champion yet)"
    )
    lines = [
        tell_verdict(verdict, quote=_plain),
        "",
        f"## {VERDICTS[verdict.verdict]}",
        "",
        f"Compared with {against}, on the same rows in the same run.",
        *([f"Trained by {verdict.candidate.trained_by}."] if verdict.candidate.trained_by else []),
        "",
    ]
    lines += [
        f"- {mark(check.result)} {_plain(check.reason) if _quotes_data(check) else check.reason}"
        for check in [*verdict.checks, *verdict.shown_worth, *verdict.regions]
    ]
    lines += [f"- {verdict.speed.text}"] if verdict.speed else []
    for name in ("test", "golden"):
        if name in metrics.slices:
            lines += ["", f"### {name.capitalize()} rows", "", *table(metrics.slices[name])]
    lines += _gain_table(verdict.slices)
    lines += audit_lines(metrics, verdict)
    batches = [
        _Row([name, _rows_of(part)], {model: of.scores.get("exact_match") for model, of in part.items()})
        for name, part in metrics.batches.items()
    ]
    lines += _score_table("Exact match by batch", ["batch", "rows"], batches)
    lines += ["", "### Where it comes from", ""]
    return "\n".join([*lines, *(f"- {key}: {value}" for key, value in facts.items())]) + "\n"


def _quotes_data(check: Check) -> bool:
    """Return whether the reason quotes rows: a drifted topic is named by their words."""
    return check.name == "parity" or check.name.startswith("region")


def audit_lines(metrics: Metrics, verdict: Verdict) -> list[str]:
    """Return the tables of the optional audits.

    Their order is: bias, groups, attacks, suites, judge, leaks.
    """
    metric = str(verdict.params.get("metric"))
    return [
        *_bias_table(metrics.bias.get(metric, {})),
        *_group_tables(metrics.groups, metric),
        *_attack_table(metrics.attacks.get(metric, {})),
        *_suite_table(metrics.suites),
        *_judge_table(metrics.judge or Judged()),
        *_leak_table(metrics.leaks),
    ]


def drift_card(found: Recorded) -> str:
    """Render a verdict of the monitor as Markdown.

    It says what was measured, which topics grew, and why a retraining starts or does not.
    """
    lines = [f"## {found.verdict} on {found.rows} requests to v{found.version}", ""]
    if found.p is not None:
        moved = f"; what moved: {', '.join(found.moved)}" if found.moved else ""
        lines += [f"p = {found.p:.4f} for all columns together{moved}", "", "| column | p |", "|---|---|"]
        told = sorted((column.p, column.name) for column in found.columns if column.p is not None)
        lines += [f"| {name} | {p:.4f} |" for p, name in told]
    lines += ["", found.quality.describe()] if found.quality else []
    for topic in found.topics:
        shares = f"{topic.share:.1%} of the requests, {topic.reference_share:.1%} of the reference"
        quoted = [f"> {_plain(example)}" for example in topic.examples]
        lines += ["", f"**{_plain(topic.name)}**: {shares}", "", *quoted]
        lines += _pictures_line(topic.pictures)
    lines += _pictures_line(found.pictures)
    lines += ["", f"### Retraining: {'yes' if found.decision.retrain else 'no'}", ""]
    lines += [f"- for: {line}" for line in found.decision.for_]
    lines += [f"- against: {line}" for line in found.decision.against]
    return "\n".join(lines) + "\n"


def _pictures_line(pictures: list[Picture]) -> list[str]:
    return ["", f"Pictures: {'; '.join(picture.looks for picture in pictures)}"] if pictures else []


def rollout_card(found: Rollout) -> str:
    """Render a rollout as Markdown: its step, each arm's users by step, each measure with its bounds."""
    lines = [
        f"## v{found.version} against v{found.champion}: {found.state.replace('_', ' ')}",
        "",
        found.why,
        "",
        *(
            f"- {found.shares[users.step]:.0%}: {users.challenger} users of the challenger, "
            f"{users.champion} of the champion"
            for users in found.last.steps
        ),
        "",
        "Challenger minus champion; each bound holds at all looks together.",
        "",
        "| measure | difference | bounds | users |",
        "|---|---|---|---|",
    ]
    for name, measure in found.last.measures.items():
        if gain := measure.gain:
            bounds, users = f"{gain.low:+.3f} to {gain.high:+.3f}", f"{gain.champion} + {gain.challenger}"
            lines.append(f"| {name} | {gain.mean:+.3f} | {bounds} | {users} |")
    return "\n".join(lines) + "\n"


def mark(result: str) -> str:
    return {"pass": "✓", "fail": "✗", "unclear": "?"}[result]


def table(part: Mapping[str, Summary]) -> list[str]:
    """Return a table with one column per model and the 95 % interval in brackets."""
    models = [model for model in MODELS if model in part]
    lines = table_head(["", *models])
    for key in metrics_of(part):
        lines.append(
            table_line([LABELS.get(key, key), *(_cell(part[model].scores.get(key)) for model in models)])
        )
    perplexities = [part[model].perplexity for model in models]
    lines.append(
        table_line(["perplexity", *("" if each is None else f"{each:.2f}" for each in perplexities)])
    )
    return [*lines, table_line(["rows", *(str(part[model].rows) for model in models)])]


def _gain_table(slices: list[Check]) -> list[str]:
    """Return a table of the candidate's gain over its rival by slice, the one that looks worst first."""
    if not slices:
        return []
    return [
        "",
        "### Gain by slice",
        "",
        *table_head(["slice", "rows", f"gain in {slices[0].metric}", ""]),
        *(table_line([_plain(one.name), str(one.rows), one.gain_text, mark(one.result)]) for one in slices),
    ]


class _Row(NamedTuple):
    first: list[str]
    scores: Mapping[str, Interval | None]  # by model
    last: Sequence[str] = ()


def _score_table(title: str, columns: list[str], rows: list[_Row], last: Sequence[str] = ()) -> list[str]:
    """Return a table with one column per model between `columns` and `last`.

    Return no lines when no model has a score.
    """
    models = [model for model in MODELS if any(model in row.scores for row in rows)]
    if not models:
        return []
    return [
        "",
        f"### {title}",
        "",
        *table_head([*columns, *models, *last]),
        *(
            table_line([*row.first, *(_cell(row.scores.get(model)) for model in models), *row.last])
            for row in rows
        ),
    ]


def _rows_of(part: Mapping[str, Estimate | Change | Summary]) -> str:
    return str(next(iter(part.values())).rows)


def _bias_table(lists: dict[str, dict[str, Change]]) -> list[str]:
    """Return a table of how much swapped terms change each model's score."""
    rows = [
        _Row([_plain(name), _rows_of(part)], {model: of.change for model, of in part.items()})
        for name, part in lists.items()
    ]
    return _score_table("Change of the score with a swapped term", ["list", "pairs"], rows)


def _group_tables(fields: dict[str, dict[str, dict[str, Groups]]], metric: str) -> list[str]:
    """Return tables of each group's score, with difference and ratio between the best and the worst."""
    lines: list[str] = []
    for field, scores in fields.items():
        part = scores.get(metric, {})
        first = next((part[model].by_group for model in MODELS if model in part), {})
        rows = [
            _Row([_plain(value), str(of.rows)], {model: part[model].by_group.get(value) for model in part})
            for value, of in first.items()
        ]
        rows.append(_Row(["**difference**", ""], {model: part[model].difference for model in part}))
        rows.append(_Row(["**ratio**", ""], {model: part[model].ratio for model in part}))
        lines += _score_table(f"{metric} by {_plain(field)}", ["group", "rows"], rows)
    return lines


def _attack_table(kinds: dict[str, Models]) -> list[str]:
    """Return a table of the share of attacks that each model withstood."""
    rows = [_Row([kind, _rows_of(part)], part) for kind, part in kinds.items()]
    return _score_table("Attacks withstood", ["kind", "rows"], rows)


def _suite_table(found: dict[str, Suite]) -> list[str]:
    """Return a table of each model's scores in public suites."""
    rows = [_Row([_plain(name), _plain(of.metric), str(of.rows)], of.models) for name, of in found.items()]
    return _score_table("Public suites", ["suite", "metric", "documents"], rows)


def _judge_table(found: Judged) -> list[str]:
    """Return a table of the judge's scores for both models, and of its agreement with people."""
    rows = []
    for metric, part in found.scores.items():
        of = found.agreement.get(metric, Agreement())
        kappa = f"{of.kappa_text} ({of.labels} decisions)" if of.kappa is not None else "not measured"
        rows.append(_Row([metric, _rows_of(part)], part, [kappa]))
    lines = _score_table(f"Judged by {_plain(found.model)}", ["", "rows"], rows, ["kappa with people"])
    if lines and found.consistent is not UNSET:
        share = f"{found.consistent:.0%}"
        lines += ["", f"The same answer was preferred from either place in {share} of the pairs."]
    return lines


def _leak_table(found: dict[str, Exposure]) -> list[str]:
    """Return a table of how much each model reveals of the planted canaries.

    The same figures for canaries that were never planted, which no model can know, stand beside them.
    """
    if not found:
        return []
    return [
        "",
        "### Exposure of canaries (bits; 1.4 is chance, 7 known by heart)",
        "",
        *table_head(["model", "canaries", "planted", "never planted"]),
        *(
            table_line([model, str(of.planted.rows), _cell(of.planted), _cell(of.reference)])
            for model in MODELS
            if (of := found.get(model))
        ),
    ]


def metrics_of(part: Mapping[str, Summary]) -> list[str]:
    """List the metrics that any model has in this slice.

    The built-in metrics come first in their order, then the user's own, and the NLL last.
    """
    found = {key for summary in part.values() for key in summary.scores}
    return [
        *(key for key in LABELS if key in found and key != "answer_nll"),
        *sorted(found - set(LABELS)),
        *(["answer_nll"] if "answer_nll" in found else []),
    ]


def table_head(cells: Sequence[str]) -> list[str]:
    """Return the lines of a Markdown table's head."""
    return [table_line(cells), f"|{'---|' * len(cells)}"]


def table_line(cells: Iterable[str]) -> str:
    """Return a line of a Markdown table; the cells are Markdown."""
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"


def _cell(found: Interval | None) -> str:
    return found.text(".3f") if found else ""


def _plain(text: str) -> str:
    """Escape a value from data for a table cell, so that it cannot start a new column or markup."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))
