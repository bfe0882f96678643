"""`ratchet gate`: plan an evaluation, explain a verdict, measure the judge."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec
import typer

from ratchet.cli.context import (
    Columns,
    Draft,
    Json,
    Like,
    Query,
    find_root,
    read_config,
    read_mapping,
    ready_root,
    say,
    show,
)
from ratchet.errors import UserError

if TYPE_CHECKING:
    from ratchet.audits.judge import Measured
    from ratchet.config.params import Config
    from ratchet.gate.open_checks import Open
    from ratchet.gate.power import Plan, Spread
    from ratchet.promotion.verdict import Verdict

app = typer.Typer(
    help="The gate: how many rows it needs, why it decided so, how far its judge can be trusted.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
ASSUMED = 0.2  # share of rows in which two models differ, until it has been measured


class Basis(NamedTuple):
    """The facts that a plan is computed from."""

    metric: str
    look: int  # number of the look at the gate, against this champion
    spread: Spread
    source: str  # where the spread comes from
    golden: int  # golden rows
    past_batches: int

    def as_json(self) -> dict[str, object]:
        found = self._asdict() | {"spread": self.spread._asdict()}
        return {"from" if key == "source" else key: value for key, value in found.items()}


@app.command("plan")
def gate_plan(
    effect: Annotated[
        float,
        typer.Option("--effect", metavar="GAIN", help="The gain to detect, in the unit of `gate.metric`."),
    ],
    rows: Annotated[
        int | None, typer.Option("--rows", min=2, help="Test rows; otherwise those of the last evaluation.")
    ] = None,
    differing: Annotated[
        float | None,
        typer.Option(
            "--differing",
            min=0.0,
            max=1.0,
            help="Share of rows in which the models differ; otherwise the last evaluation's.",
        ),
    ] = None,
    wished: Annotated[
        float,
        typer.Option("--power", min=0.5, max=0.999, help="Wanted chance that such a candidate is promoted."),
    ] = 0.8,
    as_json: Json = False,
) -> None:
    """Compute how likely the gate promotes a candidate better by GAIN, and how many test rows that takes.

    Example: ratchet gate plan --effect 0.03
    """
    root = find_root()
    config = read_config(root)
    if effect <= config.gate.min_gain:
        raise UserError(
            f"--effect is {effect:g}; wanted more than gate.min_gain, {config.gate.min_gain:g}",
            remedy="raise --effect or lower gate.min_gain: a smaller gain is never promoted",
        )
    found, basis = _plan(root, config, effect, rows, differing, wished)
    show(
        {**found._asdict(), "wished": wished, "basis": basis.as_json()},
        as_json,
        lambda: say("\n".join(_describe(found, basis, wished, config))),
    )


@app.command("more")
def gate_more(
    path: Annotated[
        str | None, typer.Option(help="File, glob, folder or URL of rows with right answers.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Another source than a file, such as review.")] = None,
    columns: Columns = None,
    query: Query = None,
    draft: Draft = None,
    like: Like = None,
    as_json: Json = False,
) -> None:
    """Judge an `uncertain` candidate again on more rows, without training.

    The rows are held out: none is ever learned. Without a source, it says how many it takes.
    Example: ratchet gate more --path more.csv
    """
    if not (path or source or query or draft):
        root = find_root()
        from flows.more_rows import open_verdict
        from ratchet.gate.open_checks import open_checks

        verdict = open_verdict(root)
        found = open_checks(verdict)
        plain = {"verdict": verdict.verdict, "open": msgspec.to_builtins(found)}
        show(plain, as_json, lambda: say("\n".join(_describe_open(verdict, found))))
        return
    root = ready_root()
    from flows.more_rows import judge_on_more
    from ratchet.cli.loop import tell_retrained

    taken, done = judge_on_more(
        root,
        like=like,
        source=source,
        path=path,
        draft=draft,
        columns=read_mapping(columns),
        query=query,
    )

    def tell() -> None:
        if done is None:
            say(f"nothing new: these rows are batch {taken['batch']}")
        else:
            tell_retrained(done)

    show({"ingested": taken, "retrained": done and done._asdict()}, as_json, tell)


def _describe_open(verdict: Verdict, found: list[Open]) -> list[str]:
    from ratchet.promotion.plain_words import tell_verdict
    from ratchet.promotion.verdict import tell_rows

    lines = [tell_verdict(verdict), ""]
    for each in found:
        more = "more" if each.more is None else f"about {tell_rows(each.more)} more"
        wanted = {
            "test": f"{more} test rows, of any batch",
            "batch": f"{more} rows like those of {each.batch}: add --like {each.batch.partition('-')[0]}",
            "golden": f"{more} golden rows; the golden set is frozen, and a new one is frozen by hand",
            "none": "rows do not settle it; `ratchet gate explain` gives the reason",
        }[each.kind]
        lines.append(f"  {each.check} ({each.rows:,} rows): {wanted}")
    return [
        *lines,
        "",
        "ratchet gate more --path FILE takes rows with right answers that no model has learned, asks both "
        "models, and decides on all rows. Without such rows: `ratchet synthesize` writes drafts, and once "
        "they are reviewed, ratchet gate more --source review",
    ]


@app.command("judge")
def gate_judge(as_json: Json = False) -> None:
    """Measure how far `evaluate.judge` agrees with people's decisions in the review queue.

    A judge's score may gate only where the agreement reaches `gate.judge_agreement`.

    Example: ratchet gate judge
    """
    from ratchet.audits.judge import AGREEMENT
    from ratchet.audits.judge_agreement import measure_agreement
    from ratchet.files import write_json
    from ratchet.review.queue import ReviewQueue

    root = find_root()
    config = read_config(root)
    if not config.evaluate.judge.model:
        raise UserError(
            "evaluate.judge.model is empty; wanted the name of a judge",
            remedy="name an endpoint and a model in `evaluate.judge`",
        )
    queue = ReviewQueue(root)
    try:
        found = measure_agreement(queue, config.evaluate.judge, root)
    finally:
        queue.close()
    kept = {key: value for key, value in msgspec.to_builtins(found).items() if key != "failures"}
    write_json(root / "metrics" / AGREEMENT, kept)
    show(found, as_json, lambda: say("\n".join(_describe_agreement(found, config))))


def _describe_agreement(found: Measured, config: Config) -> list[str]:
    from ratchet.audits.judge import AGREEMENT

    lines = [f"{found.model} against people's decisions in the review queue:"]
    for metric, part in found.agreement.items():
        if part.why or part.low is None:
            lines.append(f"  {metric}: may not gate: {part.why}")
            continue
        may = "may gate" if part.low >= config.gate.judge_agreement else "may not gate"
        lines.append(
            f"  {metric}: {may}: agrees in {part.agree:.0%} of {part.labels}, kappa "
            f"{part.kappa_text} (gate.judge_agreement: {config.gate.judge_agreement:g})"
        )
    lines += [f"  without an answer: {count} ({reason})" for reason, count in found.failures.items()]
    return [
        *lines,
        f"written to metrics/{AGREEMENT}; commit it, and the next evaluation takes it into account",
    ]


@app.command("explain")
def gate_explain(
    version: Annotated[
        str,
        typer.Argument(
            metavar="[vN]", help="A version, or a commit; otherwise the last evaluation that was committed."
        ),
    ] = "",
    page: Annotated[Path | None, typer.Option("--page", help="Write it as one HTML page instead.")] = None,
    as_json: Json = False,
) -> None:
    """Show the verdict in one sentence, then reasons, figures, retention, the rows that moved, the curve.

    Example: ratchet gate explain v3
    """
    root = find_root()
    config = read_config(root)
    from ratchet.cli.retention import known_numbers
    from ratchet.promotion.champion import was_promoted
    from ratchet.reporting.evaluation_page import fetched, gather, keep_page
    from ratchet.reporting.retention import build
    from ratchet.reporting.terminal import print_evaluation

    numbers = known_numbers(root, config)
    commit, name = _find(root, version, numbers)
    with fetched(root, commit) as folder:
        found = gather(folder, name, build(root, config.gate.metric, numbers))
    judged = found.decision
    promoted = was_promoted(root, judged.candidate.adapter_sha256, judged.rival.version)
    found = msgspec.structs.replace(found, promoted=promoted)
    keep_page(root, found)
    if page:
        from ratchet.reporting.evaluation_page import write_evaluation_page

        say(str(write_evaluation_page(page, found)))
    else:
        from ratchet.promotion.lineage import reverted_since
        from ratchet.services.status import reverted_lines

        reverted = reverted_since(root, commit)

        def tell() -> None:
            print_evaluation(found)
            for line in reverted_lines(reverted):
                say(line)

        show({**found.to_json(), "reverted": msgspec.to_builtins(reverted)}, as_json, tell)


def _find(root: Path, wanted: str, numbers: dict[str, int]) -> tuple[str, str]:
    """Return the commit and the name of the `wanted` evaluation, or of the last. Raises UserError."""
    from ratchet.reporting.retention import read_evaluations

    evaluations = read_evaluations(root)
    if not evaluations:
        raise UserError("no evaluation has landed in this checkout yet", remedy="ratchet retrain")
    number = re.fullmatch(r"v?(\d{1,6})", wanted)
    for each in evaluations:
        named = (
            numbers.get(each.adapter) == int(number[1])
            if number
            else len(wanted) >= 7 and each.commit.startswith(wanted)
        )
        if not wanted or named:
            known = numbers.get(each.adapter)
            return each.commit, f"v{known}" if known is not None else f"the candidate of {each.commit[:8]}"
    known_ones = (
        ", ".join(f"v{known}" for known in sorted(set(numbers.values()))[-10:]) or "none with a number"
    )
    raise UserError(
        f"this checkout has no evaluation of {wanted}; known: {known_ones}",
        remedy="versions that were never in charge are known by number where MLflow runs (ratchet up)",
    )


def _plan(
    root: Path, config: Config, effect: float, rows: int | None, differing: float | None, wished: float
) -> tuple[Plan, Basis]:
    from ratchet.gate.alpha_budget import FILE, alpha_of, look_number, read_looks, with_verdict
    from ratchet.gate.power import Spread, plan
    from ratchet.promotion.champion import read_champion
    from ratchet.promotion.verdict import read_verdict

    champion, verdict = read_champion(root), root / "reports/gate.json"
    looks = read_looks(root / FILE) if (root / FILE).exists() else {}
    looks = with_verdict(looks, read_verdict(verdict)) if verdict.exists() else looks
    look = look_number(looks, champion.version if champion else None)
    batches, golden, spread = _last_evaluation(root, config)
    if not batches and rows is None:
        raise UserError(
            "there is no evaluation yet, so the number of test rows is unknown",
            remedy="name one with --rows, or run `ratchet retrain` first",
        )
    source = "--differing" if differing is not None else "the last evaluation" if spread else "an assumption"
    if differing is not None and not (spread and spread.differing is None):
        spread = Spread(differing, 0.0, spread.explained if spread else 0.0)
    spread = spread or Spread(ASSUMED, 0.0)
    if spread.differing is not None and not abs(effect) <= 1:
        raise UserError(
            f"--effect is {effect:g}; wanted 1 at most, since {config.gate.metric} is a share",
            remedy="name a share, such as 0.03",
        )
    seen = champion.batches if champion else []
    found = plan(
        effect,
        batches or {"test": rows or 0},
        seen,
        golden,
        spread,
        alpha_of(look, config.gate),
        config.gate,
        rows=rows,
        wished=wished,
    )
    return found, Basis(config.gate.metric, look, spread, source, golden, len(set(batches) & set(seen)))


def _last_evaluation(root: Path, config: Config) -> tuple[dict[str, int], int, Spread | None]:
    """Read the last evaluation: test rows by batch, golden rows, spread of the gains; empty without one."""
    path = root / "reports/evaluation/scores.parquet"
    if not path.exists():
        return {}, 0, None
    import pandas as pd

    from ratchet.evaluation.paired import graded_gains, paired_gains
    from ratchet.gate.power import spread_of

    scores = pd.read_parquet(path)
    test = scores[scores.batch != "golden"]
    rival = "champion" if (scores.model == "champion").any() else "base"
    mine = test[test.model == "candidate"]
    return (
        {str(name): len(part) for name, part in mine.groupby("batch")},
        int(((scores.batch == "golden") & (scores.model == "candidate")).sum()),
        spread_of(*(gains_of(test, rival, config.gate.metric) for gains_of in (paired_gains, graded_gains))),
    )


def _describe(found: Plan, basis: Basis, wished: float, config: Config) -> list[str]:
    spread = basis.spread
    varies = (
        f"the models differ in {spread.differing:.1%} of the rows"
        if spread.differing is not None
        else f"a row's gain deviates by {spread.deviation:.3f}"
    )
    lines = [
        (
            f"a gain of {found.effect:+.3f} in {basis.metric}, look {basis.look} against this "
            f"champion, error {found.alpha:.2g}"
        ),
        f"  {varies} ({basis.source})",
        (
            f"  with {found.rows:,} test rows: promoted with {found.power:.0%} ({found.success:.0%} by the "
            "success metric alone)"
        ),
    ]
    if found.smallest is not None:
        lines.append(f"  the smallest gain that is promoted with {wished:.0%} there: {found.smallest:+.3f}")
    if found.needed is not None:
        lines.append(f"  for {wished:.0%}: {found.needed:,} test rows")
    else:
        lines.append(
            f"  more test rows alone never reach {wished:.0%}: {basis.golden} golden rows are too few for "
            f"gate.golden_margin {config.gate.golden_margin:g}"
        )
    return lines
