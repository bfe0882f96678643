"""Rows with pictures, a folder and a CSV, through every stage to a gateway that looks at pictures."""

from __future__ import annotations

import base64
import csv
import io
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openai
import pandas as pd
import pytest
from media_models import make_llava, picture_part, sound
from patience import scaled
from PIL import Image
from served import serving_candidate
from stages import Ran, run_stages

from ratchet.config.params import Config
from ratchet.data.examples import Example, read_examples
from ratchet.errors import UserError
from ratchet.files import write_json
from ratchet.media.sounds import to_wav
from ratchet.media.store import FOLDER as MEDIA
from ratchet.media.store import MediaStore
from ratchet.monitoring.picture_features import FILE, read_features, unpack
from ratchet.monitoring.request_log import open_log
from ratchet.serving.bundle import bundle_candidate
from ratchet.serving.version_source import Source
from tasks.base import make_base
from tasks.export import export
from tasks.ingest import add_batch, pull

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

INTERVAL = {"mean": 0.5, "low": 0.4, "high": 0.6}
SCORES = {"rows": 6, "exact_match": INTERVAL, "answer_nll": INTERVAL, "perplexity": 2.0}
METRICS: Any = {"champion": None, "slices": {"test": {"candidate": SCORES}}}
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
QUESTION = "Which colour is the square?"


def draw(colour: str, chance: random.Random) -> bytes:
    """Draw a square on grey blocks that differ from picture to picture, so none is a near duplicate."""
    grey = Image.new("L", (8, 8))
    grey.putdata([chance.randrange(60, 200) for _ in range(64)])
    image = grey.resize((64, 64), Image.Resampling.NEAREST).convert("RGB")
    left, top = chance.randrange(0, 24), chance.randrange(0, 24)
    image.paste(COLOURS[colour], (left, top, left + 40, top + 40))
    stored = io.BytesIO()
    image.save(stored, "PNG")
    return stored.getvalue()


def write_rows(place: Path, count: int) -> Path:
    """Write a folder of pictures and a CSV that names them."""
    chance = random.Random(1)
    (place / "images").mkdir()
    with (place / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "question", "answer"])
        for number in range(count):
            colour = chance.choice(list(COLOURS))
            (place / f"images/{number:03}.png").write_bytes(draw(colour, chance))
            table.writerow([f"images/{number:03}.png", QUESTION, colour])
    return place / "rows.csv"


class Circle(NamedTuple):
    place: Path
    config: Config
    client: openai.OpenAI
    test: list[Example]
    media: MediaStore
    ran: Ran


@pytest.fixture(scope="module")
def circle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Circle]:
    place = tmp_path_factory.mktemp("pictures")
    config = Config.model_validate(
        {
            "project": {"name": "pydoc"},
            "base": {"model": str(make_llava(place / "model"))},
            "prepare": {"min_rows": 50, "near_search": False, "test_share": 0.25},
            "train": {"epochs": 12, "batch_windows": 1, "learning_rate": 3.0e-3, "patience": 12},
            "adapter": {"method": "full"},
            "evaluate": {
                "max_new_tokens": 8,
                "simple_baseline": False,
                "slices": ["modality", "picture_size", "pictures"],
            },
            "gate": {"min_rows": 20},
            "parity": {"rows": 24},
        }
    )
    write_json(place / "nobody/manifest.json", {"version": None, "batches": []})
    add_batch(place / "raw", pull(config, path=str(write_rows(place, 240))), licence="CC0-1.0", who="tests")
    make_base(place / "base", config)
    ran = run_stages(place, place / "base", place / "nobody", config)
    test = list(read_examples(place / "prepared/test.jsonl"))
    with serving_candidate(place / "served", ran.candidate, place / "base", config) as client:
        yield Circle(place, config, client, test, MediaStore.read(place / "prepared" / MEDIA), ran)


def ask(circle: Circle, *pictures: bytes, text: str = QUESTION) -> str:
    content = [*map(picture_part, pictures), {"type": "text", "text": text}]
    asked = circle.client.chat.completions.create(
        model="pydoc",
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]
    )
    return asked.choices[0].message.content or ""


def test_the_candidate_learned_to_look_and_passes_parity_and_gate(circle: Circle) -> None:
    candidate, base = (circle.ran.scores[name]["exact_match"].mean for name in ("candidate", "base"))
    assert candidate >= 0.8 > 0.1 > base
    assert circle.ran.compared.passed, circle.ran.compared.parts
    checks = {check.name: check.result for check in circle.ran.verdict.checks}
    assert checks["pictures:another"] == checks["pictures:without"] == "pass"
    assert circle.ran.verdict.verdict == "promote", [check.reason for check in circle.ran.verdict.checks]


def test_each_row_has_its_slices_by_pictures(circle: Circle) -> None:
    scores = pd.read_parquet(circle.place / "evaluation/scores.parquet")
    found = {field: set(scores[f"slice:{field}"]) for field in ("modality", "picture_size", "pictures")}
    assert found == {
        "modality": {"pictures"},
        "picture_size": {"under 0.1 megapixels"},
        "pictures": {"1"},
    }


def test_held_out_pictures_get_the_answers_that_the_evaluation_saw(circle: Circle) -> None:
    right = [ask(circle, circle.media[row.media[0]]) == row.answer for row in circle.test]
    assert sum(right) / len(right) == pytest.approx(circle.ran.scores["candidate"]["exact_match"].mean)


def test_the_monitor_gets_what_the_candidate_sees_in_pictures_of_rows_and_of_requests(circle: Circle) -> None:
    seen = read_features(circle.place / "evaluation" / FILE)
    rows = {
        split: [name for row in read_examples(circle.place / f"prepared/{split}.jsonl") for name in row.media]
        for split in ("train", "validation", "test")
    }
    assert set(seen.trained) == set(rows["train"])
    assert set(seen.held_out) == {*rows["validation"], *rows["test"]}
    ask(circle, circle.media[rows["test"][0]])
    log, told = open_log(circle.place / "served", circle.config), dict[str, bytes]()
    for _ in range(int(scaled(100))):  # the gateway writes its log behind the answers
        told = {look.name: look.features for request in log.window(limit=999) for look in request.pictures}
        if rows["test"][0] in told:
            break
        time.sleep(0.1)
    log.close()
    expected = seen.held_out[rows["test"][0]]
    np.testing.assert_allclose(unpack([told[rows["test"][0]]]), unpack([expected]), atol=2e-3)


def test_what_the_gateway_cannot_look_at_is_refused_in_the_form_of_openai(circle: Circle) -> None:
    with pytest.raises(openai.BadRequestError, match=r"content\[0\]"):
        ask(circle, b"no picture")
    whole = draw("red", random.Random(5))
    with pytest.raises(openai.BadRequestError, match=r"content\[0\]"):
        ask(circle, whole[: len(whole) // 2])
    with pytest.raises(openai.BadRequestError, match="one picture too many"):
        ask(circle, *[whole] * 9)
    played = {"data": base64.b64encode(to_wav(sound(1))).decode(), "format": "wav"}
    content = [{"type": "text", "text": QUESTION}, {"type": "input_audio", "input_audio": played}]
    with pytest.raises(openai.BadRequestError, match="the base reads pictures only") as refused:
        circle.client.chat.completions.create(model="pydoc", messages=[{"role": "user", "content": content}])  # type: ignore[list-item,misc]
    assert refused.value.param == "messages[0].content[1]"
    assert "messages[0].content[1]: a recording is given" in str(refused.value)


def test_the_whole_model_is_exported_with_its_processor_and_no_gguf_file_is(circle: Circle) -> None:
    bundle = bundle_candidate(circle.ran.candidate, circle.place / "base", circle.config)
    media = {row.media[0]: circle.media[row.media[0]] for row in circle.test}
    source = Source("v1", "c" * 40, bundle, circle.test, METRICS, circle.ran.verdict, media)
    record = export(source, "merged", circle.place / "exported", circle.config)
    assert record.check.result == "pass" and "processor_config.json" in record.files
    card = (circle.place / "exported/README.md").read_text(encoding="utf-8")
    assert "AutoModelForImageTextToText" in card and "pipeline_tag: image-text-to-text" in card
    with pytest.raises(UserError, match="reads pictures"):
        export(source, "gguf", circle.place / "gguf", circle.config)
    assert not (circle.place / "gguf").exists()
