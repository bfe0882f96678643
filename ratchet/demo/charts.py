"""Draw charts whose questions have known answers: bars, lines and pies of `ratchet demo --base charts`.

A chart is decided by its seed and its kind alone, so every process draws the same one. Axes, ticks and labels
are drawn once for each kind; a chart adds its title and its data to them, which takes a third of the time.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

Kind = Literal["bar", "line", "pie"]
KINDS: tuple[Kind, ...] = ("bar", "line", "pie")
COLOURS = {
    "red": "#d62728",
    "green": "#2ca02c",
    "blue": "#1f4fd0",
    "orange": "#ff9f0e",
}
PARTS: dict[Kind, str] = {"bar": "bars", "line": "lines", "pie": "slices"}
TITLES = ("Rain", "Sales", "Visitors", "Harvest", "Exports", "Orders", "Births", "Traffic")
LEAST, MOST = 2, 4  # colours in a chart
TOP = 10  # of the axis of values
SIZE, DPI = (160, 120), 80  # pixels of a chart; dots an inch, on which the size of its texts depends
POINTS = 4  # of a line
ASKED = {
    "parts": "What is the chart made of?",
    "count": "How many colours are there?",
    "colours": "Which colours are there?",
    "shown": "What does the chart show?",
}


class Chart(NamedTuple):
    """A chart's PNG, and what is in it: values from 1 to 9 by colour, in the order of drawing."""

    kind: Kind
    png: bytes
    values: dict[str, int]

    def answer(self, question: str) -> str:
        """Return the answer to one of ASKED, by its key."""
        if question == "parts":
            return PARTS[self.kind]
        if question == "colours":
            return " ".join(colour for colour in COLOURS if colour in self.values)
        count = str(len(self.values))
        return count if question == "count" else f"{count} {PARTS[self.kind]}"


class Painter:
    """Draws charts of one kind."""

    def __init__(self, kind: Kind) -> None:
        from matplotlib.figure import Figure

        self._kind = kind
        figure = Figure(figsize=(SIZE[0] / DPI, SIZE[1] / DPI), dpi=DPI)
        self._canvas = _canvas(figure)
        self._axes = figure.add_axes((0.1, 0.16, 0.86, 0.66) if kind != "pie" else (0.17, 0, 0.66, 0.88))
        if kind != "pie":
            places = MOST if kind == "bar" else POINTS
            self._axes.set_xlim(*(-0.6, MOST - 0.4) if kind == "bar" else (-0.2, POINTS - 0.8))
            self._axes.set_ylim(0, TOP)
            self._axes.set_yticks([0, TOP / 2, TOP])
            self._axes.tick_params(labelsize=5, length=1, pad=1)
            named = "ABCD" if kind == "bar" else ("Q1", "Q2", "Q3", "Q4")
            self._axes.set_xticks(range(places), list(named))
        else:
            self._axes.set_axis_off()
        self._title = figure.suptitle("", fontsize=7, y=0.98)
        self._canvas.draw()
        self._empty: Any = self._canvas.copy_from_bbox(figure.bbox)

    def draw(self, seed: int) -> Chart:
        """Draw the chart of a seed."""
        chance = random.Random(f"{self._kind} {seed}")  # noqa: S311 (no secret: a chart)
        colours = chance.sample(list(COLOURS), chance.randint(LEAST, MOST))
        values = dict(zip(colours, chance.sample(range(1, TOP), len(colours)), strict=True))
        self._title.set_text(chance.choice(TITLES))
        self._canvas.restore_region(self._empty)
        made = self._add(values, chance)
        for artist in (*made, self._title):
            self._axes.draw_artist(artist)
        stored = io.BytesIO()
        _as_image(self._canvas).save(stored, "PNG")
        for artist in made:
            artist.remove()
        return Chart(self._kind, stored.getvalue(), values)

    def _add(self, values: dict[str, int], chance: random.Random) -> list[Any]:
        colours = [COLOURS[colour] for colour in values]
        if self._kind == "bar":
            width = chance.uniform(0.5, 0.9)
            return list(self._axes.bar(range(len(values)), list(values.values()), width=width, color=colours))
        if self._kind == "pie":
            turned = chance.randrange(360)
            return list(self._axes.pie(list(values.values()), colors=colours, startangle=turned)[0])
        low, high = min(values.values()), max(values.values())
        return [
            self._axes.plot(range(POINTS), _line(value, low, high, chance), color=colour, linewidth=3)[0]
            for value, colour in zip(values.values(), colours, strict=True)
        ]


def _line(end: int, low: int, high: int, chance: random.Random) -> list[float]:
    """Return a line's points, which end at its value; those before it stay within the other lines' ends."""
    start = chance.uniform(low, high)
    way = [start + (end - start) * place / (POINTS - 1) for place in range(POINTS - 1)]
    return [*(min(max(point + chance.uniform(-0.8, 0.8), low + 0.3), high - 0.3) for point in way), end]


def _canvas(figure: Any) -> Any:
    """Return a canvas, whose class has no annotations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    return FigureCanvasAgg(figure)


def _as_image(canvas: Any) -> Any:
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


class Asked(NamedTuple):
    """A chart and one of ASKED, by its key."""

    chart: Chart
    question: str

    @property
    def text(self) -> str:
        return ASKED[self.question]

    @property
    def answer(self) -> str:
        return self.chart.answer(self.question)


def draw(kind: Kind, seeds: Iterable[int]) -> list[Chart]:
    """Draw a chart for each seed."""
    painter = Painter(kind)
    return [painter.draw(seed) for seed in seeds]


def write_rows(folder: Path, name: str, rows: Sequence[Asked]) -> Path:
    """Write a CSV of questions, and a folder of their pictures beside it; return the CSV's path."""
    images = folder / name
    images.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "question", "answer"])
        for number, row in enumerate(rows):
            (images / f"{number:04}.png").write_bytes(row.chart.png)
            table.writerow([f"{name}/{number:04}.png", row.text, row.answer])
    return path
