"""Scanned digits, those that scikit-learn brings, from a folder and a CSV to answers of the gateway."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from media_models import make_llava
from PIL import Image
from served import serving_candidate
from sklearn.datasets import load_digits
from stages import Ran, run_stages

from ratchet.config.params import Config
from ratchet.data.examples import Example, read_examples
from ratchet.evaluation.report import read_metrics
from ratchet.files import write_json
from ratchet.media.store import FOLDER as MEDIA
from ratchet.media.store import MediaStore
from tasks.base import make_base
from tasks.ingest import add_batch, pull

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ROWS, QUESTION, CHANCE = 900, "Which digit is written here?", 0.1


def write_rows(place: Path) -> Path:
    """Write scans of 8x8 pixels, four times as large, as a folder and a CSV that names them."""
    found: Any = load_digits()
    (place / "images").mkdir()
    with (place / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "question", "answer"])
        for number, (pixels, digit) in enumerate(zip(found.images[:ROWS], found.target, strict=False)):
            scan = Image.fromarray((pixels * 255 / 16).astype("uint8"))
            scan.resize((32, 32), Image.Resampling.BICUBIC).save(place / f"images/{number:04}.png")
            table.writerow([f"images/{number:04}.png", QUESTION, NAMES[digit]])
    return place / "rows.csv"


class Circle(NamedTuple):
    place: Path
    client: openai.OpenAI
    test: list[Example]
    media: MediaStore
    ran: Ran


@pytest.fixture(scope="module")
def circle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Circle]:
    place = tmp_path_factory.mktemp("digits")
    config = Config.model_validate(
        {
            "project": {"name": "pydoc"},
            "base": {"model": str(make_llava(place / "model"))},
            "prepare": {"min_rows": 50, "near_search": False, "test_share": 0.2},
            "train": {
                "epochs": 30,
                "batch_windows": 16,
                "learning_rate": 3.0e-3,
                "patience": 30,
                "precision": "float32",
            },
            "adapter": {"method": "full"},
            "evaluate": {"max_new_tokens": 8},
            "gate": {"min_rows": 50},
            "parity": {"rows": 24},
        }
    )
    write_json(place / "nobody/manifest.json", {"version": None, "batches": []})
    add_batch(place / "raw", pull(config, path=str(write_rows(place))), licence="CC-BY-4.0", who="tests")
    make_base(place / "base", config)
    ran = run_stages(place, place / "base", place / "nobody", config)
    test = list(read_examples(place / "prepared/test.jsonl"))
    with serving_candidate(place / "served", ran.candidate, place / "base", config) as client:
        yield Circle(place, client, test, MediaStore.read(place / "prepared" / MEDIA), ran)


def ask(circle: Circle, picture: bytes) -> str:
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    asked = circle.client.chat.completions.create(
        model="pydoc",
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]
    )
    return asked.choices[0].message.content or ""


def test_most_scans_are_read_and_the_gate_promotes(circle: Circle) -> None:
    scores = circle.ran.scores
    assert len(circle.test) >= 120
    assert scores["candidate"]["exact_match"].low > 0.6
    assert scores["base"]["exact_match"].high < 0.1
    # A classifier that reads the questions alone cannot do better than the most frequent digit.
    assert scores["simple"]["exact_match"].mean < 2.5 * CHANCE
    assert circle.ran.verdict.verdict == "promote", [check.reason for check in circle.ran.verdict.checks]


def test_blind_it_guesses(circle: Circle) -> None:
    checks = {check.name: check for check in circle.ran.verdict.checks}
    for kind in ("without", "another"):
        found = checks[f"pictures:{kind}"]
        assert found.result == "pass" and found.gain is not None
        rows = circle.ran.scores["candidate"]["exact_match"].mean - found.gain[0]
        assert rows < 2.5 * CHANCE, (kind, rows)


def test_the_gateway_reads_scans_as_the_evaluation_does(circle: Circle) -> None:
    right = [ask(circle, circle.media[row.media[0]]) == row.answer for row in circle.test[:60]]
    assert sum(right) / len(right) > 0.6
    everything = read_metrics(circle.place / "evaluation").slices["test"]["candidate"]
    assert abs(sum(right) / len(right) - everything.scores["exact_match"].mean) < 0.15


def test_a_scan_that_was_stored_otherwise_gets_the_same_answer(circle: Circle) -> None:
    """As a JPEG, which a telephone would send."""
    row = next(row for row in circle.test if ask(circle, circle.media[row.media[0]]) == row.answer)
    with Image.open(io.BytesIO(circle.media[row.media[0]])) as image:
        stored = io.BytesIO()
        image.save(stored, "JPEG", quality=95)
    assert ask(circle, stored.getvalue()) == row.answer
