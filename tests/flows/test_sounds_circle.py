"""Rows with recordings, a folder and a CSV, through every stage to a gateway that listens."""

from __future__ import annotations

import base64
import csv
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openai
import pytest
import soundfile
from media_models import make_qwen2_audio, picture, picture_part
from served import serving_candidate
from stages import Ran, run_stages

from ratchet.config.params import Config
from ratchet.data.examples import Example, read_examples
from ratchet.errors import UserError
from ratchet.files import write_json
from ratchet.media.sounds import to_wav
from ratchet.media.store import FOLDER as MEDIA
from ratchet.media.store import MediaStore
from ratchet.serving.bundle import bundle_candidate
from ratchet.serving.version_source import Source
from tasks.base import make_base
from tasks.export import export
from tasks.ingest import add_batch, pull

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

INTERVAL = {"mean": 0.5, "low": 0.4, "high": 0.6}
SCORES = {"rows": 6, "exact_match": INTERVAL, "answer_nll": INTERVAL, "perplexity": 2.0}
METRICS: Any = {"champion": None, "slices": {"test": {"candidate": SCORES}}}
PITCHES = {"low": (200, 300), "middle": (900, 1200), "high": (3000, 3600)}  # hertz
QUESTION = "How high is the tone?"


def play(pitch: str, chance: random.Random) -> tuple[np.ndarray[Any, Any], int]:
    """Return a tone of some pitch, length, loudness and rate, with noise, so that no two are alike."""
    rate = chance.choice((8000, 16000, 44100))
    times = np.arange(int(rate * chance.uniform(0.3, 0.8))) / rate
    noise = np.random.default_rng(chance.randrange(2**32)).normal(0, 0.01, len(times))
    tone = np.sin(2 * np.pi * chance.uniform(*PITCHES[pitch]) * times + chance.uniform(0, 6))
    return (chance.uniform(0.3, 0.6) * tone + noise).astype(np.float32), rate


def write_rows(place: Path, count: int) -> Path:
    """Write a folder of recordings in three formats, and a CSV that names them."""
    chance = random.Random(1)
    (place / "sounds").mkdir()
    with (place / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["audio", "question", "answer"])
        for number in range(count):
            pitch, kind = chance.choice(list(PITCHES)), ("wav", "flac", "mp3")[number % 3]
            samples, rate = play(pitch, chance)
            soundfile.write(place / f"sounds/{number:03}.{kind}", samples, rate)
            table.writerow([f"sounds/{number:03}.{kind}", QUESTION, pitch])
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
    place = tmp_path_factory.mktemp("sounds")
    config = Config.model_validate(
        {
            "project": {"name": "pydoc"},
            "base": {"model": str(make_qwen2_audio(place / "model"))},
            "prepare": {"min_rows": 50, "near_search": False, "test_share": 0.25},
            "train": {"epochs": 10, "batch_windows": 1, "learning_rate": 3.0e-3, "patience": 12},
            "adapter": {"method": "full"},
            "evaluate": {"max_new_tokens": 8, "simple_baseline": False},
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


def part_of(sound: bytes) -> dict[str, Any]:
    return {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(sound).decode(), "format": "wav"},
    }


def ask(circle: Circle, *sounds: bytes, text: str = QUESTION) -> str:
    content = [*map(part_of, sounds), {"type": "text", "text": text}]
    asked = circle.client.chat.completions.create(
        model="pydoc",
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]
    )
    return asked.choices[0].message.content or ""


def test_the_candidate_learned_to_listen_and_passes_parity_and_gate(circle: Circle) -> None:
    candidate, base = (circle.ran.scores[name]["exact_match"].mean for name in ("candidate", "base"))
    assert candidate >= 0.8 > 0.1 > base
    assert circle.ran.compared.passed, circle.ran.compared.parts
    checks = {check.name: check.result for check in circle.ran.verdict.checks}
    assert checks["recordings:another"] == checks["recordings:without"] == "pass"
    assert circle.ran.verdict.verdict == "promote", [check.reason for check in circle.ran.verdict.checks]


def test_held_out_recordings_get_the_answers_that_the_evaluation_saw(circle: Circle) -> None:
    right = [ask(circle, to_wav(circle.media[row.media[0]])) == row.answer for row in circle.test]
    assert sum(right) / len(right) == pytest.approx(circle.ran.scores["candidate"]["exact_match"].mean)


def test_the_responses_protocol_hears_the_same(circle: Circle) -> None:
    row = circle.test[0]
    sound = to_wav(circle.media[row.media[0]])
    asked = circle.client.responses.create(
        model="pydoc",
        input=[{"role": "user", "content": [part_of(sound), {"type": "input_text", "text": QUESTION}]}],  # type: ignore[list-item,misc]
    )
    assert asked.output_text == ask(circle, sound)


def test_what_the_gateway_cannot_hear_is_refused_in_the_form_of_openai(circle: Circle) -> None:
    whole = io.BytesIO()
    samples, rate = play("low", random.Random(5))
    soundfile.write(whole, samples, rate, format="WAV")
    for sound in (b"no recording", whole.getvalue()[:2000]):
        with pytest.raises(openai.BadRequestError, match=r"content\[0\]"):
            ask(circle, sound)
    with pytest.raises(openai.BadRequestError, match="one recording too many"):
        ask(circle, *[whole.getvalue()] * 5)
    long = io.BytesIO()
    soundfile.write(long, np.tile(samples, 100)[: 31 * rate], rate, format="MP3")
    with pytest.raises(openai.BadRequestError, match=r"gateway.max_sound_seconds"):
        ask(circle, long.getvalue())
    longer = io.BytesIO()  # than this base hears, and not than a request may have
    soundfile.write(longer, np.tile(samples, 20)[: 3 * rate], rate, format="MP3")
    with pytest.raises(openai.BadRequestError, match="the base hears 2 s at most") as refused:
        ask(circle, whole.getvalue(), longer.getvalue())
    assert refused.value.param == "messages[0].content[1]"
    content = [part_of(whole.getvalue()), picture_part(picture(1))]
    with pytest.raises(openai.BadRequestError, match="the base reads recordings only") as refused:
        circle.client.chat.completions.create(model="pydoc", messages=[{"role": "user", "content": content}])  # type: ignore[list-item,misc]
    assert refused.value.param == "messages[0].content[1]"
    assert "messages[0].content[1]: a picture is given" in str(refused.value)


def test_the_whole_model_is_exported_with_its_processor_and_no_gguf_file_is(circle: Circle) -> None:
    bundle = bundle_candidate(circle.ran.candidate, circle.place / "base", circle.config)
    media = {row.media[0]: circle.media[row.media[0]] for row in circle.test}
    source = Source("v1", "c" * 40, bundle, circle.test, METRICS, circle.ran.verdict, media)
    record = export(source, "merged", circle.place / "exported", circle.config)
    assert record.check.result == "pass" and "processor_config.json" in record.files
    card = (circle.place / "exported/README.md").read_text(encoding="utf-8")
    assert "AutoModelForMultimodalLM" in card and "pipeline_tag: audio-text-to-text" in card
    with pytest.raises(UserError, match="reads pictures or sound"):
        export(source, "gguf", circle.place / "gguf", circle.config)
    assert not (circle.place / "gguf").exists()
