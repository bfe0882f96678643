"""What a person decides from: the table of candidate, champion and base with intervals, and the gate's
reasons, as Markdown.
"""

from __future__ import annotations

import re
from typing import Any

from ratchet.monitoring.verdicts import Recorded
from ratchet.promotion.rollout import Rollout

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
    "regex_match": "fits the pattern",
    "numeric_match": "same number",
    "refusal": "refusals (less is better)",
    "length": "length (words)",
    "answer_nll": "answer NLL (nats a token)",
}
VERDICTS = {"promote": "✅ promote", "reject": "❌ reject", "uncertain": "❔ uncertain: the champion stays"}
HEAD = (
    "method",
    "quality [95 %]",
    "validation loss",
    "training s",
    "peak MiB",
    "saved MiB",
    "ms an answer [95 %]",
    "tokens an answer",
)


def model_card(metrics: dict[str, Any], decision: dict[str, Any], facts: dict[str, str]) -> str:
    """The version's description and the flow's artifact. `facts` are lines such as data and commit."""
    rival = decision["rival"]
    against = (
        f"v{rival['version']}, the champion"
        if rival["version"] is not None
        else "the untouched base (there is no champion yet)"
    )
    lines = [
        f"## {VERDICTS[decision['verdict']]}",
        "",
        f"Compared with {against}, on the same rows in the same run.",
        "",
    ]
    shown = [*decision["checks"], *_shown_worth(decision), *decision.get("regions", [])]
    lines += [
        f"- {mark(check['result'])}"
        f" {_plain(check['reason']) if check['name'] == 'parity' else check['reason']}"
        for check in shown
    ]
    lines += [f"- {speed_line(decision['speed'])}"] if decision.get("speed") else []
    for name in ("test", "golden"):
        if name in metrics["slices"]:
            lines += ["", f"### {name.capitalize()} rows", "", *table(metrics["slices"][name])]
    lines += _gain_table(decision.get("slices", []))
    lines += audit_lines(metrics, decision)
    slices = {
        name.partition(":")[2]: part for name, part in metrics["slices"].items() if name.startswith("batch:")
    }
    lines += ["", "### Exact match by batch", "", *_slice_table(slices), "", "### Where it comes from", ""]
    return "\n".join([*lines, *(f"- {key}: {value}" for key, value in facts.items())]) + "\n"


def audit_lines(metrics: dict[str, Any], decision: dict[str, Any]) -> list[str]:
    """What was asked for beside the plain rows, part by part: bias, groups, attacks, suites, judge, leaks."""
    metric = str(decision.get("params", {}).get("metric"))
    return [
        *_bias_table(metrics.get("bias", {}).get(metric, {})),
        *_group_tables(metrics.get("groups", {}), metric),
        *_attack_table(metrics.get("attacks", {}).get(metric, {})),
        *_suite_table(metrics.get("suites", {})),
        *_judge_table(metrics.get("judge", {})),
        *_leak_table(metrics.get("leaks", {})),
    ]


def drift_card(found: Recorded) -> str:
    """A verdict of the monitor as Markdown: what was seen, which topics grew, and why it does or does not
    retrain.
    """
    lines = [f"## {found.verdict} on {found.rows} requests to v{found.version}", ""]
    if found.p is not None:
        moved = f"; what moved: {', '.join(found.moved)}" if found.moved else ""
        lines += [f"p = {found.p:.4f} for all columns together{moved}", "", "| column | p |", "|---|---|"]
        told = sorted((column.p, column.name) for column in found.columns if column.p is not None)
        lines += [f"| {name} | {p:.4f} |" for p, name in told]
    for topic in found.topics:
        shares = f"{topic.share:.1%} of the requests, {topic.reference_share:.1%} of the reference"
        lines += ["", f"**{topic.name}**: {shares}", "", *(f"> {example}" for example in topic.examples)]
    lines += ["", f"### Retraining: {'yes' if found.decision.retrain else 'no'}", ""]
    lines += [f"- for: {line}" for line in found.decision.for_]
    lines += [f"- against: {line}" for line in found.decision.against]
    return "\n".join(lines) + "\n"


def rollout_card(found: Rollout) -> str:
    """Write a rollout as Markdown: how far it is, each arm's users by step, each measure with its bounds."""
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


def table(part: dict[str, Any]) -> list[str]:
    """One column a model; the 95 % interval in brackets."""
    models = [model for model in MODELS if model in part]
    lines = [f"| | {' | '.join(models)} |", f"|---|{'---|' * len(models)}"]
    for key in metrics_of(part):
        lines.append(
            f"| {LABELS.get(key, key)} | {' | '.join(_cell(part[model].get(key)) for model in models)} |"
        )
    perplexities = [
        f"{part[model]['perplexity']:.2f}" if "perplexity" in part[model] else "" for model in models
    ]
    lines.append(f"| perplexity | {' | '.join(perplexities)} |")
    return [*lines, f"| rows | {' | '.join(str(part[model]['rows']) for model in models)} |"]


def _shown_worth(decision: dict[str, Any]) -> list[dict[str, Any]]:
    """Where it is no rule, and so among no checks."""
    worth = decision.get("worth")
    return [worth] if worth and all(check["name"] != "worth" for check in decision["checks"]) else []


def _gain_table(slices: list[dict[str, Any]]) -> list[str]:
    """Candidate against rival by slice, the lowest first."""
    if not slices:
        return []
    lines = [
        "",
        "### Gain by slice",
        "",
        f"| slice | rows | gain in {slices[0]['metric']} | |",
        "|---|---|---|---|",
    ]
    return [
        *lines,
        *(
            f"| {_plain(one['name'])} | {one['rows']} | {one['mean']:+.3f} [{one['low']:+.3f},"
            f" {one['high']:+.3f}] | {mark(one['result'])} |"
            for one in slices
        ),
    ]


def _bias_table(lists: dict[str, Any]) -> list[str]:
    """How much swapped terms change each model's score."""
    if not lists:
        return []
    models = [model for model in MODELS if any(model in part for part in lists.values())]
    lines = [
        "",
        "### Change of the score with a swapped term",
        "",
        f"| list | pairs | {' | '.join(models)} |",
        f"|---|---|{'---|' * len(models)}",
    ]
    for name, part in lists.items():
        lines.append(
            f"| {_plain(name)} | {next(iter(part.values()))['rows']} |"
            f" {' | '.join(_cell(part.get(model, {}).get('change')) for model in models)} |"
        )
    return lines


def _group_tables(fields: dict[str, Any], metric: str) -> list[str]:
    """The score of each group, with the difference and the ratio between the best and the worst."""
    lines: list[str] = []
    for field, scores in fields.items():
        part = scores.get(metric, {})
        models = [model for model in MODELS if model in part]
        if not models:
            continue
        lines += [
            "",
            f"### {metric} by {_plain(field)}",
            "",
            f"| group | rows | {' | '.join(models)} |",
            f"|---|---|{'---|' * len(models)}",
        ]
        values = part[models[0]]["by_group"]
        lines += [
            f"| {_plain(value)} | {of['rows']} |"
            f" {' | '.join(_cell(part[model]['by_group'].get(value)) for model in models)} |"
            for value, of in values.items()
        ]
        lines += [
            f"| **{gap}** | | {' | '.join(_cell(part[model][gap]) for model in models)} |"
            for gap in ("difference", "ratio")
        ]
    return lines


def _attack_table(kinds: dict[str, Any]) -> list[str]:
    """The share of attacks that each model withstood."""
    if not kinds:
        return []
    models = [model for model in MODELS if any(model in part for part in kinds.values())]
    lines = [
        "",
        "### Attacks withstood",
        "",
        f"| kind | rows | {' | '.join(models)} |",
        f"|---|---|{'---|' * len(models)}",
    ]
    return [
        *lines,
        *(
            f"| {kind} | {next(iter(part.values()))['rows']} |"
            f" {' | '.join(_cell(part.get(model)) for model in models)} |"
            for kind, part in kinds.items()
        ),
    ]


def _suite_table(found: dict[str, Any]) -> list[str]:
    """What each model scores in public suites."""
    if not found:
        return []
    models = [model for model in MODELS if any(model in part["models"] for part in found.values())]
    lines = [
        "",
        "### Public suites",
        "",
        f"| suite | metric | documents | {' | '.join(models)} |",
        f"|---|---|---|{'---|' * len(models)}",
    ]
    return [
        *lines,
        *(
            f"| {_plain(name)} | {_plain(part['metric'])} | {part['rows']} |"
            f" {' | '.join(_cell(part['models'].get(model)) for model in models)} |"
            for name, part in found.items()
        ),
    ]


def _judge_table(found: dict[str, Any]) -> list[str]:
    """What the judge says of both models, and how far people agree with it."""
    if not found.get("scores"):
        return []
    models = [model for model in MODELS if any(model in part for part in found["scores"].values())]
    lines = [
        "",
        f"### Judged by {_plain(found['model'])}",
        "",
        f"| | rows | {' | '.join(models)} | kappa with people |",
        f"|---|---|{'---|' * len(models)}---|",
    ]
    for metric, part in found["scores"].items():
        agreement = found.get("agreement", {}).get(metric, {})
        kappa = (
            f"{agreement['kappa']:.2f}, at least {agreement['low']:.2f} ({agreement['labels']} decisions)"
            if "kappa" in agreement
            else "not measured"
        )
        lines.append(
            f"| {metric} | {next(iter(part.values()))['rows']} |"
            f" {' | '.join(_cell(part.get(model)) for model in models)} | {kappa} |"
        )
    if "consistent" in found:
        lines += [
            "",
            f"The same answer was preferred from either place in {found['consistent']:.0%} of the pairs.",
        ]
    return lines


def _leak_table(found: dict[str, Any]) -> list[str]:
    """What each model gives away of the planted canaries, beside ones that it cannot know."""
    if not found:
        return []
    lines = [
        "",
        "### Exposure of canaries (bits; 1.4 is chance, 7 known by heart)",
        "",
        "| model | canaries | planted | never planted |",
        "|---|---|---|---|",
    ]
    return [
        *lines,
        *(
            f"| {model} | {found[model]['planted']['rows']} | {_cell(found[model]['planted'])} |"
            f" {_cell(found[model].get('reference'))} |"
            for model in MODELS
            if model in found
        ),
    ]


def _plain(text: str) -> str:
    """A value of somebody's data as a cell: it opens no column and no markup."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))


def metrics_of(part: dict[str, Any]) -> list[str]:
    """Those that any model has in this slice: ours in their order, then the user's own, the NLL last."""
    found = {key for summary in part.values() for key, value in summary.items() if isinstance(value, dict)}
    own = sorted(found - set(LABELS))
    return [
        *(key for key in LABELS if key in found and key != "answer_nll"),
        *own,
        *(["answer_nll"] if "answer_nll" in found else []),
    ]


def _slice_table(slices: dict[str, Any]) -> list[str]:
    models = [model for model in MODELS if any(model in part for part in slices.values())]
    lines = [f"| batch | rows | {' | '.join(models)} |", f"|---|---|{'---|' * len(models)}"]
    for name, part in slices.items():
        lines.append(
            f"| {name} | {next(iter(part.values()))['rows']} |"
            f" {' | '.join(_cell(part.get(model, {}).get('exact_match')) for model in models)} |"
        )
    return lines


def _cell(found: dict[str, float] | None) -> str:
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" if found else ""


def markdown(found: dict[str, Any]) -> str:
    """The table with what it rests on."""
    lines = [
        f"# Methods compared\n\n{found['rows']} test rows, `{found['metric']}`; commit {found['commit'][:8]},"
        f" {found['machine']}. One training each, seed {found['seed']}.\n"
    ]
    lines += ["\n".join(f"| {' | '.join(row)} |" for row in table_rows(found)), ""]
    lines += [f"- `{row['method']}`: {_settings(row['changes'])}" for row in found["methods"]]
    return "\n".join(lines) + "\n"


def table_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """With its head, and Markdown's line under it."""
    return [HEAD, tuple("---" for _ in HEAD), *(_row(row) for row in found["methods"])]


def text(found: dict[str, Any]) -> list[str]:
    rows = [row for row in table_rows(found) if row[0] != "---"]
    widths = [max(len(row[column]) for row in rows if len(row) > column) for column in range(len(HEAD))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    if row["failed"]:
        reason = f"failed: {row['failed']}".replace("|", "/")
        return (row["method"], reason, *("" for _ in HEAD[2:]))
    quality, latency = row["quality"], row["latency"]["milliseconds"]
    return (
        row["method"],
        f"{quality['mean']:.3f} [{quality['low']:.3f}, {quality['high']:.3f}]",
        f"{row['validation_loss']:.4f}",
        f"{row['seconds']:.1f}",
        f"{row['peak_mib']:,.0f}",
        f"{row['saved_mib']:.2f}",
        f"{latency['mean']:.1f} [{latency['low']:.1f}, {latency['high']:.1f}]",
        f"{row['latency']['tokens']:.1f}",
    )


def _settings(changes: dict[str, Any]) -> str:
    return ", ".join(f"`{key}: {value}`" for key, value in changes.items())


def speed_line(found: dict[str, Any]) -> str:
    """What `ratchet.parity.latency` measured, in words."""
    time = found["milliseconds"]
    each = (
        f"{time['mean']:.0f} ms [{time['low']:.0f}, {time['high']:.0f}] an answer,"
        f" {found['tokens_per_second']:.0f} tokens a second"
    )
    return f"in the gateway's engine, one question at a time: {each} ({found['answers']} answers)"
