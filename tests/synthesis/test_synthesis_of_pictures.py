"""A teacher is shown the pictures of seeds, and its rows show them as well, up to a batch."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image
from servers import serving
from teacher_stub import Act, TeacherStub, pictures_of

from ratchet.config.params import Config, parse_config
from ratchet.data.examples import MEDIA_MARK, Example, Message, encode_line, make_example
from ratchet.errors import DataError, ServiceError
from ratchet.files import write_bytes
from ratchet.media.store import write_shard
from ratchet.review.queue import ReviewQueue
from ratchet.review.records import Decision
from ratchet.synthesis.draft import SeedFigures, find_draft, read_rows, summary_lines
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
    """Answer as the templates ask: always the same question, about whatever picture."""
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
    settings = {"per_chunk": 1, "rounds": 1, **changed}
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
    assert (found.kept, found.subject) == (3, SeedFigures(4)) and found.doubted == 0
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


def test_new_wordings_of_a_question_keep_its_answer_and_its_picture(
    address: str, stub: TeacherStub, root: Path
) -> None:
    import pandas as pd

    wrong = {
        "id": "t",
        "batch": "b",
        "model": "candidate",
        "question": "Which colour is it?",
        "reference": "red",
    }
    (root / "reports/evaluation").mkdir(parents=True)
    pd.DataFrame([wrong | {"exact_match": 0.0}]).to_parquet(root / "reports/evaluation/scores.parquet")
    (root / "reports/evaluation/metrics.json").write_text('{"champion": null}')
    found = run(config_of(address, per_chunk=2), root, mode="paraphrase", count=50)
    assert [len(pictures_of(body)) for body in stub.seen] == [1] * stub.requests
    rows = [row.example for row in read_rows(find_draft(root, found.draft))]
    assert rows and found.kept == 2 * stub.requests
    for row in rows:
        (colour,) = (colour for colour in COLOURS if row.media == (NAMES[colour],))
        assert row.answer == colour and row.question.count(MEDIA_MARK) == 1


def test_prompts_of_a_topic_with_pictures_are_not_worded_anew_since_their_pictures_are_not_rows(
    address: str, stub: TeacherStub, tmp_path: Path
) -> None:
    topic = {"name": "bikes", "examples": [f"{MEDIA_MARK}Whose bike is it?", "Is my bike covered?"]}
    write_bytes(
        tmp_path / ".ratchet/monitor/verdicts.jsonl",
        [msgspec.json.encode({"at": "2026-01-02T03:04:05Z", "verdict": "drift", "topics": [topic]}) + b"\n"],
    )
    found = run(config_of(address), tmp_path, mode="paraphrase")
    assert found.subject.drifted_prompts == 1 and "Whose bike" not in "".join(stub.prompts())


def test_pictures_are_sent_in_the_form_of_anthropic_too(address: str, stub: TeacherStub, root: Path) -> None:
    config = config_of(address, teacher={"protocol": "anthropic"})
    assert run(config, root, mode="seeds", count=1).kept == 1
    (body,) = stub.seen
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert kinds == ["image", "text"] and len(pictures_of(body)) == 1


def test_a_seed_whose_picture_is_not_here_is_left_out_and_counted(
    address: str, stub: TeacherStub, root: Path
) -> None:
    (root / "data/prepared/media/a.tar").unlink()
    with pytest.raises(DataError, match="the pictures of 4 rows are not in data/prepared"):
        run(config_of(address), root, mode="seeds", count=1)
    few = {NAMES["red"]: PICTURES[NAMES["red"]]}
    write_shard(root / "data/prepared/media/a.tar", few)
    found = run(config_of(address), root, mode="seeds", count=1)
    assert (found.kept, found.subject) == (1, SeedFigures(1, 3))
    assert any("3 seeds whose pictures are not in data/prepared" in line for line in summary_lines(found))


def test_a_picture_counts_in_the_budget_by_tokens_and_not_by_bytes(
    address: str, stub: TeacherStub, root: Path
) -> None:
    enough = config_of(address, max_run_tokens=50_000, per_chunk=1)
    assert run(enough, root, mode="seeds", count=1).stopped == ""
    found = run(config_of(address, max_run_tokens=30_000), root, mode="seeds", count=1)
    assert found.stopped and found.kept == 0


def test_a_teacher_that_sees_no_pictures_ends_the_run_with_the_reason(
    address: str, stub: TeacherStub, root: Path
) -> None:
    refusal = Act(status=400, raw=b'{"error": {"message": "image input is not supported"}}')
    stub.script = {"Which colour": [refusal] * 9}
    with pytest.raises(ServiceError, match=r"(?s)image input is not supported.*one that sees none"):
        run(config_of(address), root, mode="seeds", count=9)


def test_seeds_with_and_without_pictures_are_asked_about_apart(
    address: str, stub: TeacherStub, root: Path
) -> None:
    texts = [
        make_example([Message("user", f"Who is {name}?"), Message("assistant", "A clerk.")], {"batch": "a"})
        for name in ("Ana", "Bert", "Cem", "Dora")
    ]
    path = root / "data/prepared/train.jsonl"
    write_bytes(path, [*path.read_bytes().splitlines(keepends=True), *map(encode_line, texts)])
    run(config_of(address), root, mode="seeds", count=8)
    with_pictures = [body for body in stub.seen if pictures_of(body)]
    assert 0 < len(with_pictures) < stub.requests
    assert not any("Who is" in str(body) for body in with_pictures)
    assert not any("Which colour" in str(body) for body in stub.seen if body not in with_pictures)
