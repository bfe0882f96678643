"""Print for a terminal: the page of an evaluation (`ratchet gate explain`), what versions still know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from ratchet.evaluation.statistics import Interval
    from ratchet.reporting.evaluation_page import Cells, Evaluated, Moved
    from ratchet.reporting.retention import Retention
    from ratchet.tracking.curve import Point

MOST_POINTS = 12  # of the curve that are printed
MOST_SENTENCE = 400  # characters


def print_evaluation(found: Evaluated) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.text import Text

    from ratchet.federation.status import tell_round
    from ratchet.reporting.markdown import LABELS, VERDICTS, audit_lines, mark

    console, decision, models = Console(), found.decision, found.models
    rival = decision.rival.told
    console.print(_text(found.sentence, MOST_SENTENCE))
    console.print(Text(f"{found.name} against {rival}: {VERDICTS[decision.verdict]}", style="bold"))
    if decision.candidate.trained_by:
        console.print(Text(f"  trained by {decision.candidate.trained_by}"))
    for check in decision.checks:
        console.print(Text(f"  {mark(check.result)} {check.reason}"))
    if decision.regions:
        console.print("  told, not decided on:")
    for check in decision.regions:
        console.print(Text(f"    {mark(check.result)} {check.reason}"))
    if decision.speed:
        console.print(Text(f"  {decision.speed.text}"))
    for part, rows in found.tables.items():
        console.print(_scores(f"{part} rows", models, [(LABELS.get(key, key), cells) for key, cells in rows]))
    console.print(_scores(f"{found.metric.replace('_', ' ')} by batch", models, found.batches))
    for check in decision.slices:
        console.print(Text(f"  {mark(check.result)} {check.reason}"))
    for line in audit_lines(found.metrics, decision):
        console.print(Text(line))
    if found.retention:
        print_retention(found.retention)
    if found.rows_fault:
        console.print(f"the rows cannot be read: {escape(found.rows_fault)}")
    console.print(_moved("rows that got better", found.better, rival, found.name))
    console.print(_moved("rows that got worse", found.worse, rival, found.name))
    console.print(_curve(found.curve))
    for each in found.rounds:
        for line in tell_round(each, "round"):
            console.print(_text(line, 400))


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    return table


def _scores(title: str, models: list[str], rows: list[tuple[str, Cells]]) -> Table:
    table = _table(title, "", *models)
    for name, cells in rows:
        table.add_row(_text(name), *(_cell(cell) for cell in cells))
    return table


def _moved(title: str, rows: list[Moved], rival: str, name: str) -> Table:
    table = _table(f"{len(rows)} {title}, the furthest first", "question", "wanted", rival, name, "")
    for row in rows:
        texts = (row.question, row.wanted, row.before, row.now)
        table.add_row(*(_text(text, 160) for text in texts), f"{row.gain:+.3f}")
    return table


def _curve(points: list[Point]) -> Table:
    table = _table("training: loss in nats a learned token", "step", "train", "validation")
    told: list[Point] = []
    train: Point = {}
    for point in points:
        train = {"train_loss": point["train_loss"]} if "train_loss" in point else train
        told += [train | point] if "validation_loss" in point else []
    told = told or points
    for point in told[:: max(1, -(-len(told) // MOST_POINTS))]:
        table.add_row(
            str(point["step"]),
            *(f"{point[key]:.4f}" if key in point else "" for key in ("train_loss", "validation_loss")),
        )
    return table


def _text(words: str, most: int = 80) -> Any:
    """Return one line of text without markup and control characters, of `most` characters at most."""
    from rich.text import Text

    plain = " ".join("".join(char if char.isprintable() or char.isspace() else "�" for char in words).split())
    return Text(plain if len(plain) <= most else f"{plain[: most - 1]}…")


def _cell(found: Interval | None) -> str:
    return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})" if found else ""


def print_retention(found: Retention) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ratchet.reporting.heatmap import short

    console = Console()
    if not found.versions:
        console.print("no evaluation has landed yet: ratchet retrain")
        return
    table = Table(title=f"{found.metric.replace('_', ' ')}, with 95 % intervals", title_justify="left")
    table.add_column("version", no_wrap=True)
    for name in found.slices:
        table.add_column(Text(f"{short(name)}\n{found.rows[name]} rows"), overflow="fold")
    for row in found.versions:
        cells = [row.cells[name] for name in found.slices]
        texts = (Text(cell.text(".3f")) if cell else Text("not asked", style="dim") for cell in cells)
        table.add_row(Text(row.name), *texts)
    console.print(table)
    if any(cell is None for row in found.versions for cell in row.cells.values()):
        console.print(Text("not asked: rows that came after that version; ratchet retention --fill asks it"))
    for fault in found.faults:
        console.print(Text(f"left out: {fault}"))
