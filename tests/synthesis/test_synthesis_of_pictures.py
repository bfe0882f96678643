"""A teacher is shown the pictures of seeds, and its rows show them as well, up to a batch."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from servers import serving
from teacher_stub import TeacherStub, pictures_of

from ratchet.config.params import Config, parse_config
from ratchet.data.examples import MEDIA_MARK, Example, Message, encode_line, make_example
from ratchet.data.media import write_shard
from ratchet.files import write_bytes
from ratchet.review.queue import ReviewQueue
from ratchet.review.records import Decision
from ratchet.synthesis.draft import SeedFigures, find_draft, read_rows
from tasks.ingest import pull
from tasks.synthesize import Wanted, queue_rows, synthesize

COLOURS = ("red", "green", "blue", "black")


def draw(colour: str) -> bytes:
    stored = io.BytesIO()
    Image.new("RGB", (2000, 1000), colour).save(stored, "PNG")
    return stored.getvalue()


PICTURES = {f"{hashlib.sha256(draw(colour)).hexdigest()}.png": draw(colour) for colour in COLOURS}
NAMES = dict(zip(COLOURS, PICTURES, strict=True))


def seed(colour: str) -> Example:
    asked = Message("user", f"Which colour is it?{MEDIA_MARK}", media=(NAMES[colour],))
    return make_example([asked, Message("assistant", colour)], {"batch": "a"})


def good(prompt: str) -> dict[str, Any]:
    """Answer as a teacher that sees pictures: `told` tells by their bytes which pair is right."""
    if '"score"' in prompt:
        return {"score": 0.9, "reason": "fine"}
    if '{"questions"' in prompt:
        return {"questions": ["What colour fills the picture?", "Name the colour that is shown"]}
    return {"pairs": [{"question": f"{MEDIA_MARK}Is the picture of one colour?", "answer": "yes"}]}


@pytest.fixture
def stub() -> TeacherStub:
    return TeacherStub(answer=good)


@pytest.fixture
def address(stub: TeacherStub) -> Iterator[str]:
    with serving(stub) as url:
        yield f"{url}/v1"


def config_of(address: str, **changed: Any) -> Config:
    teacher = {"url": address, "model": "big", "licence": "own", "tries": 1, "max_tokens": 500}
    settings = {"per_chunk": 2, "rounds": 4, **changed}
    settings["teacher"] = teacher | settings.get("teacher", {})
    return parse_config({"project": {"name": "small"}, "synthesize": settings}, Path("params.yaml"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with a batch of four rows with a picture each, prepared."""
    prepared = tmp_path / "data/prepared"
    rows = [seed(colour) for colour in COLOURS]
    write_bytes(prepared / "train.jsonl", map(encode_line, rows))
    write_shard(prepared / "media/a.tar", PICTURES)
    write_shard(tmp_path / "data/raw/a.tar", PICTURES)
    return tmp_path


def run(config: Config, root: Path, **wanted: Any) -> Any:
    return synthesize(config, root, Wanted(**wanted), say=lambda _: None, backoff=0.01)


def test_the_teacher_sees_the_picture_of_a_seed_and_its_rows_show_it_up_to_a_batch(
    address: str, stub: TeacherStub, root: Path
) -> None:
    config = config_of(address, judge={"url": address, "model": "other"})
    found = run(config, root, mode="seeds", count=3)
    assert (found.kept, found.subject) == (3, SeedFigures(4)) and found.doubted == 3
    by_bytes = {Image.open(io.BytesIO(data)).getpixel((5, 5)): name for name, data in PICTURES.items()}
    shown = []
    for body in stub.seen:
        (picture,) = pictures_of(body)
        with Image.open(io.BytesIO(picture)) as image:
            assert (image.format, image.size) == ("JPEG", (1024, 512))
            near = min(
                by_bytes,
                key=lambda one: sum(abs(a - b) for a, b in zip(one, image.getpixel((5, 5)), strict=True)),
            )
        shown.append((by_bytes[near], body["model"]))
        assert MEDIA_MARK not in str(body["messages"])
    rows = [row.example for row in read_rows(find_draft(root, found.draft))]
    assert {row.media for row in rows} == {(name,) for name, model in shown if model == "other"}
    assert all(row.question == f"{MEDIA_MARK}Is the picture of one colour?" for row in rows)
    assert len({row.media for row in rows}) == 3, "one question about three pictures is three questions"

    assert queue_rows(root, config, find_draft(root, found.draft)) == 3
    queue = ReviewQueue(root)
    for entry in queue.entries(found.draft):
        queue.decide(Decision(entry.item.id, found.draft, "accept", by="ana"))
    queue.close()
    pulled = pull(config, root=root, source="review", draft=found.draft)
    assert len(pulled.lines) == 3
    assert all(any(row.media[0].encode() in line for line in pulled.lines) for row in rows)
    assert all(pulled.media[row.media[0]] == PICTURES[row.media[0]] for row in rows)
