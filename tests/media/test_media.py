"""Pictures, from files to prepared rows: each bad case by its number, each form, each kind of change.

The numbers 55 to 58 are those of the catalogue of bad data; 61 and on continue it for pictures.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import struct
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import msgspec
import numpy as np
import pyarrow as pa
import pytest
from media_models import make_llava
from PIL import Image, PngImagePlugin
from pyarrow import parquet

from flows.data_check import read_rejected
from flows.review_queue import queue_doubtful
from ratchet.config.data import MediaConfig, PrepareConfig
from ratchet.config.params import Config
from ratchet.data.batches import check_batch, read_manifest, take_back
from ratchet.data.dedup import Gallery, LookIndex
from ratchet.data.erasure import Entry, Forgotten
from ratchet.data.examples import (
    MEDIA_MARK,
    Example,
    Message,
    RowError,
    make_example,
    make_raw_row,
    read_examples,
    to_openai,
)
from ratchet.data.forms import read_conversation
from ratchet.data.validation import Origin, Validator
from ratchet.errors import DataError
from ratchet.media.pictures import Look, alike, look_at, read_picture, size_of
from ratchet.media.store import MediaStore, write_shard
from ratchet.models.loading import load_chat
from ratchet.review.queue import ReviewQueue
from ratchet.review.records import Decision
from ratchet.sources.columns import parse_columns
from ratchet.sources.media import MediaIntake
from ratchet.sources.preview import as_plain, preview_rows
from tasks.ingest import add_batch, check_rows, freeze_golden, pull
from tasks.prepare import Rejection, prepare

LIMITS = MediaConfig()
GPS = {1: "N", 2: (48.0, 51.0, 24.0), 3: "E", 4: (2.0, 21.0, 3.0)}


def noise(number: int = 0, size: tuple[int, int] = (48, 32), mode: str = "RGB") -> Image.Image:
    """Return a picture that is like no other: large patches, so that it survives scaling."""
    width, height = size
    patches = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(patches).resize((width, height), Image.Resampling.NEAREST)
    return image.convert(mode)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def with_exif(orientation: int = 1, *, gps: bool = False) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if gps:
        exif[0x8825] = GPS
    return encoded(noise(), "JPEG", exif=exif, quality=90)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes, *, depth: int = 8, colour: int = 2) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def frames(count: int) -> dict[str, Any]:
    return {"save_all": True, "append_images": [noise(number) for number in range(1, count)]}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


PNG, JPEG = encoded(noise()), encoded(noise(), "JPEG", quality=90)
GLASS = Image.fromarray(np.full((8, 8, 4), (200, 0, 0, 0), dtype=np.uint8))  # red, and wholly transparent
DEEP = Image.fromarray(np.full((8, 8), 0x8040, dtype=np.uint16))
TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("Author", "Ana Lima")
ZTXT = PngImagePlugin.PngInfo()
ZTXT.add_text("bomb", "x" * 2**21, zip=True)


BMP = encoded(noise(), "BMP")
HUGE_BMP = BMP[:18] + struct.pack("<ii", 90_000, 90_000) + BMP[26:]


class Refused(NamedTuple):
    number: int
    data: bytes
    reason: str


REFUSED = [
    Refused(56, png(50_000, 50_000, b"", depth=1, colour=0), "media_size"),
    Refused(56, png(10_000, 10_000, b"", depth=1, colour=0), "media_size"),
    Refused(56, encoded(Image.new("1", (6_000, 5_000))), "media_size"),
    Refused(56, b"GIF89a\xff\xff\xff\xff\x00\x00\x00" + encoded(noise(), "GIF")[13:], "media_size"),
    Refused(56, HUGE_BMP, "media_size"),
    Refused(57, PNG[: len(PNG) // 2], "media_broken"),
    Refused(57, JPEG[: len(JPEG) // 2], "media_broken"),
    Refused(57, encoded(noise(), "WEBP")[:60], "media_broken"),
    Refused(57, encoded(noise(), "TIFF")[:-600], "media_broken"),
    Refused(57, b'<svg xmlns="http://www.w3.org/2000/svg"/>', "media_type"),
    Refused(57, b'<?xml version="1.0"?><svg onload="x()"/>', "media_type"),
    Refused(57, encoded(Image.new("L", (4, 4)), "GIF", **frames(101)), "media_type"),
    Refused(61, b"%PDF-1.7\n", "media_type"),
    Refused(62, b"<!doctype html><title>login</title>", "media_type"),
    Refused(63, b"PK\x03\x04" + bytes(100), "media_type"),
    Refused(64, b"\x1f\x8b\x08" + bytes(100), "media_type"),
    Refused(65, b"\x00\x00\x00\x20ftypheic" + bytes(100), "media_type"),
    Refused(66, b"%!PS-Adobe-3.0 EPSF-3.0\n", "media_type"),
    Refused(67, b"8BPS" + bytes(100), "media_type"),
    Refused(68, b"just a text", "media_type"),
    Refused(69, b"", "media_broken"),
    Refused(70, PNG[:20], "media_broken"),
    Refused(71, PNG[:60] + bytes([PNG[60] ^ 0xFF]) + PNG[61:], "media_broken"),  # a wrong checksum
    Refused(72, png(0, 5, b""), "media_broken"),
    Refused(73, encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "media_type"),
    Refused(74, b"\x89PNG\r\n\x1a\n" + bytes(40), "media_broken"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case.number}-{case.reason}")
def test_a_bad_picture_has_one_reason(case: Refused) -> None:
    with pytest.raises(RowError) as refused:
        read_picture(case.data, LIMITS)
    assert refused.value.reason == case.reason


def test_a_file_or_a_picture_over_the_settings_is_too_large() -> None:
    for limits in (MediaConfig(max_bytes=len(PNG) - 1), MediaConfig(max_megapixels=48 * 32 / 1e6 - 1e-6)):
        with pytest.raises(RowError) as refused:
            read_picture(PNG, limits)
        assert refused.value.reason == "media_size"
    assert read_picture(PNG, MediaConfig(max_bytes=len(PNG), max_megapixels=48 * 32 / 1e6)).data == PNG


HARMLESS = {
    *("jfif", "jfif_version", "jfif_unit", "jfif_density"),
    *("progressive", "progression", "adobe", "adobe_transform"),
}


class Taken(NamedTuple):
    number: int
    data: bytes
    changed: set[str]
    suffix: str = "png"
    size: tuple[int, int] = (48, 32)


TAKEN = [
    Taken(58, with_exif(gps=True), {"position", "metadata"}, "jpg"),
    *(
        Taken(75, with_exif(number), {"orientation", "metadata"}, "jpg", (48, 32) if number < 5 else (32, 48))
        for number in range(2, 9)
    ),
    Taken(76, encoded(noise(mode="CMYK"), "JPEG"), {"cmyk"}, "jpg"),
    Taken(77, encoded(noise(mode="P")), {"palette"}),
    Taken(78, encoded(noise(mode="P"), transparency=0), {"palette", "alpha"}),
    Taken(79, encoded(GLASS), {"alpha"}, size=(8, 8)),
    Taken(80, encoded(noise(mode="LA")), {"alpha"}),
    Taken(81, encoded(noise(mode="1")), {"bitmap"}),
    Taken(82, encoded(DEEP), {"depth"}, size=(8, 8)),
    Taken(83, png(2, 1, b"\x00" + bytes.fromhex("ffee80407010" * 2), depth=16), {"depth"}, size=(2, 1)),
    Taken(84, encoded(noise(), "GIF", **frames(3)), {"animation", "palette", "gif"}),
    Taken(85, encoded(noise(), **frames(3)), {"animation", "metadata"}),
    Taken(86, encoded(noise(), "WEBP", lossless=True, **frames(3)), {"animation", "webp"}),
    Taken(87, encoded(noise(), "BMP"), {"bmp"}),
    Taken(88, encoded(noise(), "TIFF", **frames(2)), {"animation", "tiff"}),
    Taken(89, encoded(noise(), pnginfo=TEXT), {"metadata"}),
    Taken(90, encoded(noise(), "JPEG", comment=b"taken by Ana Lima"), {"metadata"}, "jpg"),
    Taken(91, JPEG + b"PK\x03\x04 an archive behind the picture", {"metadata"}, "jpg"),
    Taken(92, PNG + b"<script>", {"metadata"}),
    Taken(93, encoded(noise(), icc_profile=b"a profile" * 20), {"metadata"}),
    Taken(94, PNG, set()),
    Taken(94, encoded(noise(mode="L")), set()),
    Taken(95, JPEG, set(), "jpg"),
    Taken(95, encoded(noise(), "JPEG", progressive=True), set(), "jpg"),
    Taken(95, encoded(noise(mode="L"), "JPEG"), set(), "jpg"),
    Taken(96, encoded(Image.new("RGB", (1, 1))), set(), size=(1, 1)),
    Taken(97, encoded(noise(mode="LAB"), "TIFF"), {"colours", "metadata", "tiff"}),
]


@pytest.mark.parametrize("case", TAKEN, ids=lambda case: f"{case.number}-{'-'.join(sorted(case.changed))}")
def test_a_picture_is_stored_upright_bare_and_in_one_of_two_formats(case: Taken) -> None:
    found = read_picture(case.data, LIMITS)
    assert set(found.changed) == case.changed and len(found.changed) == len(case.changed)
    assert found.name.endswith(f".{case.suffix}") and (found.width, found.height) == case.size
    with Image.open(io.BytesIO(found.data)) as stored:
        assert stored.mode in ("L", "RGB") and stored.size == case.size
        assert stored.format == {"png": "PNG", "jpg": "JPEG"}[case.suffix]
        assert not stored.getexif() and stored.info.keys() <= {
            "jfif",
            "jfif_version",
            "jfif_unit",
            "jfif_density",
        } | {"progressive", "progression", "adobe", "adobe_transform"}
        assert getattr(stored, "n_frames", 1) == 1
    if not case.changed:
        assert found.data == case.data
    again = read_picture(found.data, LIMITS)
    assert (again.data, again.changed) == (found.data, ())  # what is stored needs no further change
    for secret in (b"Ana Lima", b"archive", b"script"):
        assert secret not in found.data


def test_a_picture_is_changed_to_what_people_see() -> None:
    seen = pixels(read_picture(encoded(GLASS), LIMITS).data)
    assert (seen == 255).all()  # glass on white
    assert (pixels(read_picture(encoded(DEEP), LIMITS).data) == 0x80).all()  # the high byte of 16 bits
    assert (pixels(read_picture(JPEG + b"more", LIMITS).data) == pixels(JPEG)).all()
    turned = pixels(read_picture(with_exif(6), LIMITS).data)
    wanted = np.rot90(pixels(with_exif()), -1)
    assert np.abs(turned - wanted).mean() < 10
    first = pixels(read_picture(encoded(noise(), "WEBP", lossless=True, **frames(3)), LIMITS).data)
    assert (first == pixels(PNG)).all()
    inked = pixels(read_picture(encoded(noise(mode="CMYK"), "JPEG", quality=95), LIMITS).data)
    assert np.abs(inked - pixels(PNG)).mean() < 8


@pytest.mark.filterwarnings("ignore")  # of Pillow, about what it reads in spite of a fault
def test_no_bytes_break_it_and_what_is_stored_stays_as_it_is() -> None:
    chance = random.Random(0)
    for data in {case.number: case.data for case in TAKEN}.values():
        for _ in range(25):
            bad = bytearray(data)
            for _ in range(chance.randrange(1, 5)):
                bad[chance.randrange(len(bad))] = chance.randrange(256)
            try:
                found = read_picture(bytes(bad[: len(bad) - chance.choice((0, 0, 0, 9))]), LIMITS)
            except RowError as error:
                assert error.reason in ("media_broken", "media_type", "media_size")
            else:
                assert read_picture(found.data, LIMITS).data == found.data


def test_a_text_that_unpacks_without_end_is_no_way_to_fill_the_memory() -> None:
    with pytest.raises(RowError) as refused:
        read_picture(encoded(noise(), pnginfo=ZTXT), LIMITS)
    assert refused.value.reason == "media_broken"


# --- references ---------------------------------------------------------------------------------------------


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def talk(*asked: Any, answer: str = "noise") -> dict[str, Any]:
    turns = [
        turn
        for one in asked
        for turn in ({"role": "user", "content": one}, {"role": "assistant", "content": answer})
    ]
    return {"messages": turns}


def question(number: int, **more: Any) -> dict[str, Any]:
    words = ["amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet"]
    return {"prompt": " ".join(f"{word}{number}" for word in words), "completion": f"answer {number}", **more}


def folder_of(path: Path) -> Path:
    (path / "images/inner").mkdir(parents=True)
    (path / "images/a.png").write_bytes(PNG)
    (path / "images/b.jpg").write_bytes(encoded(noise(2), "JPEG"))
    (path / "images/a.jpg").write_bytes(PNG)  # a PNG by another name
    (path / "images/half.png").write_bytes(PNG[:100])
    (path / "images/link.png").symlink_to("a.png")
    (path.parent / "outside.png").write_bytes(PNG)
    (path / "images/out.png").symlink_to("../../outside.png")
    (path / "images/away").symlink_to("/etc")
    os.mkfifo(path / "images/pipe.png")
    return path


def verdict_of(path: Path, row: dict[str, Any]) -> tuple[str, Example | None]:
    """Take the row in among good ones, prepare them, and return its counter and the example it became."""
    rows = [question(number) for number in range(100)]
    (path / "rows.jsonl").write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in [*rows, row]))
    pulled = pull(Config(), path=str(path / "rows.jsonl"))
    add_batch(path / "raw", pulled, licence="", who="tests")
    settings = PrepareConfig(test_share=0.0, validation_share=0.0, min_rows=1)
    profile = prepare(path / "raw", path / "golden.jsonl", path / "prepared", settings, tell=lambda _: None)
    (batch,) = profile.batches.values()
    found = {f"sanitised.{name}" for name in batch.sanitised}
    found |= {reason for reason in batch.rejected if reason != "rows"}
    shown = [one for one in read_examples(path / "prepared/train.jsonl") if one.media]
    return " ".join(sorted(found)) or "taken", shown[0] if shown else None


TURNS = talk("a")["messages"]
ROWS: list[tuple[int, dict[str, Any], str]] = [
    *(
        (55, question(1000, image_path=path), "media_path")
        for path in (
            "/etc/passwd",
            "../outside.png",
            "images/../../outside.png",
            "C:\\x.png",
            "\\\\host\\x.png",
            "..\\outside.png",
            "images/out.png",
            "images/away/hostname",
            "images/a.png\x00.txt",
        )
    ),
    *(
        (55, question(1000, image_path=path), "media_url")
        for path in (
            "http://10.0.0.1/x.png",
            "https://example.org/x.png",
            "file:///etc/passwd",
            "//host/x.png",
            "s3://bucket/x.png",
            "ftp://host/x",
            "gopher:x",
            "hTTp:/x.png",
        )
    ),
    (55, talk([part("http://169.254.169.254/latest/meta-data")]), "media_url"),
    (57, question(1000, image="images/a.jpg"), "taken"),
    (57, question(1000, image="images/half.png"), "media_broken"),
    (98, question(1000, image="images/none.png"), "media_missing"),
    (98, question(1000, image="images/inner"), "media_missing"),
    (98, question(1000, image="images/pipe.png"), "media_missing"),
    (99, question(1000, image="images/link.png"), "taken"),
    (99, question(1000, image="images\\a.png"), "taken"),
    (99, question(1000, image=" ./images/a.png "), "taken"),
    (100, question(1000, image="data:image/png,%89PNG"), "media_broken"),
    (100, question(1000, image=uri(PNG)[:-7]), "media_broken"),
    (100, question(1000, image=uri(PNG[:90])), "media_broken"),
    (100, question(1000, image=uri(b"<svg/>", "image/svg+xml")), "media_type"),
    (101, question(1000, image=uri(PNG, "text/html")), "taken"),
    (101, question(1000, image=base64.b64encode(PNG).decode()), "taken"),
    (102, question(1000, image=f"media:{'0' * 64}.png"), "media_missing"),
    (102, question(1000, image="media:../../x.png"), "media_url"),
    (102, question(1000, image="media-error:media_type:made up"), "media_type"),
    (102, question(1000, image="media-error:secret:made up"), "media"),
    (103, question(1000, image=7), "media_type"),
    (103, question(1000, images=[["images/a.png"]]), "media_type"),
    (103, question(1000, images=["images/a.png", None]), "media_type"),
    (
        104,
        {"prompt": "<image> and <image> differ how?", "completion": "so", "image": "images/a.png"},
        "media_place",
    ),
    (104, {"images": ["images/a.png"], **talk([{"type": "image"}, {"type": "image"}])}, "media_place"),
    (104, {"image": "images/a.png", **talk([part("images/b.jpg")])}, "media_place"),
    (105, talk([{"type": "text", "text": "and"}, {"type": "image"}]), "media_missing"),
    (106, talk("draw", answer=[part("images/a.png")]), "media_place"),  # type: ignore[arg-type]
    (
        106,
        {"messages": [{"role": "system", "content": [part("images/a.png")]}, *talk("a")["messages"]]},
        "media_place",
    ),
    (107, question(1000, video="images/a.mp4"), "media"),
    (107, question(1000, image="images/a.png", audio="a.wav"), "media_missing"),
    (107, question(1000, image="images/a.png", image_id=7), "unknown_key"),
    (107, talk([{"type": "input_audio", "input_audio": {"data": "AAAA"}}]), "media_type"),
    (107, talk([{"type": "video_url", "video_url": {"url": "x"}}]), "media"),
    (108, {"image": "images/a.png", "question": "what is it?"}, "no_answer"),
    (
        109,
        talk(
            f"a {MEDIA_MARK} mark of its own",
        ),
        "sanitised.media_marks",
    ),
    (
        109,
        talk([part("images/a.png"), {"type": "text", "text": f"{MEDIA_MARK} {MEDIA_MARK}?"}]),
        "sanitised.media_marks",
    ),
    (110, question(1000, image="images/a.png", images=[]), "taken"),
    (110, question(1000, image=None, images=None), "taken"),
]


@pytest.mark.parametrize(
    ("number", "row", "verdict"),
    ROWS,
    ids=[f"{number}-{verdict}-{at}" for at, (number, _, verdict) in enumerate(ROWS)],
)
def test_a_reference_gets_its_verdict_and_no_row_vanishes(tmp_path, number, row, verdict) -> None:
    found, example = verdict_of(folder_of(tmp_path / "data"), row)
    assert found == verdict
    if example:
        assert all(message.content.count(MEDIA_MARK) == len(message.media) for message in example.messages)
    assert not (tmp_path / "data/prepared/media").exists() or example


BASE64 = base64.b64encode(PNG).decode()
HEIC = b"\x00\x00\x00\x20ftypheic" + bytes(100)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"base64": "images/a.png"},
            "`base64` is the path 'images/a.png'; wanted base64 (`path` names a file)",
        ),
        (
            "data:image/png;base64,images/a.png",
            "the path 'images/a.png' in place of base64; wanted the bytes",
        ),
        (
            {"base64": base64.b64encode(b"images/a.png").decode()},
            "the path 'images/a.png' in place of a picture",
        ),
        (b"images/a.png", "the path 'images/a.png' in place of a picture; wanted"),
        (base64.b64encode(HEIC).decode(), "neither a path nor base64 that is taken: there is no file"),
        (base64.b64encode(HEIC).decode(), "as base64, a file of type HEIC in place of a picture; wanted"),
        ({"path": BASE64[:160]}, "the picture is cut off: it has no end"),
        ({"base64": BASE64[:101]}, "cut off or broken: 101 characters, wanted a multiple of 4"),
        ({"base64": "ab-_" * 30}, "broken: character 3 is '-'"),
    ],
)
def test_paths_and_base64_in_the_place_of_each_other_are_named(tmp_path, given, said) -> None:
    folder_of(tmp_path / "data")
    reference = MediaIntake(LIMITS, tmp_path).beside(
        fsspec.filesystem("file"), str(tmp_path / "data/rows.jsonl")
    )
    assert said in reference.refer(given, sound=False)


def test_base64_is_taken_where_a_path_is_named_however_it_begins(tmp_path) -> None:
    tiny = base64.b64encode(encoded(Image.new("L", (1, 1)))).decode()
    rows = MediaIntake(LIMITS).beside(fsspec.filesystem("file"), str(tmp_path / "rows.jsonl"))
    assert len(tiny) < 100 and rows.refer({"path": tiny}, sound=False).startswith("media:")


A = read_picture(PNG, LIMITS).name
B = read_picture(encoded(noise(2), "JPEG"), LIMITS).name
ASKED = {"prompt": "What is it?", "completion": "noise"}
# A row, and the contents of the user's turns, with # for a picture.
FORMS: list[tuple[dict[str, Any], list[str]]] = [
    (talk([part("images/a.png"), {"type": "text", "text": "What is it?"}]), ["#What is it?"]),
    (talk([part(uri(PNG)), {"type": "text", "text": "What is it?"}]), ["#What is it?"]),
    (talk([{"type": "text", "text": "What"}, part(uri(PNG)), {"type": "text", "text": "is?"}]), ["What#is?"]),
    (talk([{"type": "image", "image": "images/a.png"}, {"type": "text", "text": "so?"}]), ["#so?"]),
    (talk([{"type": "image", "path": "images/a.png"}, {"type": "text", "text": "so?"}]), ["#so?"]),
    (talk([{"type": "image", "base64": base64.b64encode(PNG).decode()}]), ["#"]),
    ({**talk([part(uri(PNG)), {"type": "text", "text": "so?"}]), "prompt": "so?"}, ["#so?"]),
    (talk([{"type": "input_image", "image_url": uri(PNG)}, {"type": "input_text", "text": "so?"}]), ["#so?"]),
    (
        talk([{"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                           "data": base64.b64encode(PNG).decode()}}]),
        ["#"],
    ),
    (talk("first?", [part("images/a.png"), part("images/b.jpg"), {"type": "text", "text": "and now?"}]),
     ["first?", "##and now?"]),
    ({"image": "images/a.png", "question": "What is it?", "answer": "noise"}, ["#What is it?"]),
    ({"image_path": "images/a.png", **ASKED}, ["#What is it?"]),
    ({"image_path": "images/a.png", "text_qa_pair": {"question": "What is it?", "answer": "noise"}},
     ["#What is it?"]),
    ({"images": ["images/a.png", "images/b.jpg"], **ASKED}, ["##What is it?"]),
    ({"images": '["images/a.png", "images/b.jpg"]', **ASKED}, ["##What is it?"]),
    ({"images": ["images/a.png"], **talk("<image>What is it?")}, ["#What is it?"]),
    ({"images": ["images/a.png", "images/b.jpg"], **talk("<image>\nfirst", "then <image>?")},
     ["#\nfirst", "then #?"]),
    ({"images": ["images/a.png"], **talk([{"type": "image"}, {"type": "text", "text": "so?"}])}, ["#so?"]),
    ({"images": [{"bytes": None, "path": "images/a.png"}], **talk("so?")}, ["#so?"]),
    ({"image": "images/a.png", "conversations": [{"from": "human", "value": "<image>\nso?"},
                                                 {"from": "gpt", "value": "noise"}]}, ["#\nso?"]),
    ({"image": "images/a.png", "instruction": "Say it", "input": "", "output": "noise"}, ["#Say it"]),
    ({"image": "images/a.png", "text": "a picture of noise"}, ["#"]),
    (
        {  # as TRL has them, with the nulls of Arrow
            "images": [{"bytes": None, "path": "images/a.png"}],
            "prompt": [
                {
                    "role": "user",
                    "content": [{"type": "image", "text": None}, {"type": "text", "text": "so?"}],
                }
            ],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": "noise"}]}],
        },
        ["#so?"],
    ),
    (
        {
            "images": ["images/a.png"],
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "so?"}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "noise"}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}],
        },
        ["#so?"],
    ),
    ({"file_name": "images/a.png", "text": "a picture of noise"}, ["#"]),
    (
        {
            "images": [{"bytes": None, "path": "images/a.png"}],
            "texts": [
                {"user": "so?", "assistant": "noise", "source": "x"},
                {"user": "And?", "assistant": "more"},
            ],
        },
        ["#so?", "And?"],
    ),
    ({"messages": [{"role": "user", "content": "so?", "images": ["images/a.png"]},
                   {"role": "assistant", "content": "noise"}]}, ["#so?"]),
    ({"prompt": [{"role": "user", "content": [part("images/a.png"), {"type": "text", "text": "so?"}]}],
      "chosen": "noise", "rejected": "a cat"}, ["#so?"]),
    ({"input": {"messages": [{"role": "user", "content": [part("images/a.png")]}]},
      "preferred_output": [{"role": "assistant", "content": "noise"}],
      "non_preferred_output": [{"role": "assistant", "content": "a cat"}]}, ["#"]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "asked"), FORMS)
def test_every_form_that_people_have_shows_its_pictures_where_they_stood(tmp_path, row, asked) -> None:
    found, example = verdict_of(folder_of(tmp_path / "data"), row)
    assert found == "taken" and example is not None
    users = [message for message in example.messages if message.role == "user"]
    assert [message.content.replace(MEDIA_MARK, "#") for message in users] == asked
    assert example.media == (A, B)[: sum(text.count("#") for text in asked)]
    store = MediaStore.read(tmp_path / "data/prepared/media")
    assert set(store) == set(example.media) and store[A] == PNG


def test_a_row_without_a_picture_beside_rows_with_one_stays_as_it_was(tmp_path) -> None:
    rows = [
        b'{"prompt":"a",  "completion":"b", "image": null}',
        b'{"prompt": "\\u0061", "completion": "image"}',
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(rows))
    pulled = pull(Config(), path=str(tmp_path / "rows.jsonl"))
    assert pulled.lines == rows and not pulled.media
    (said,) = pulled.said
    assert said == "pictures: 1 rows have a column for one and nothing in it: they are rows of text"


@pytest.mark.parametrize("mapping", ["", "image=photo"])
def test_empty_cells_of_a_column_of_pictures_are_counted(tmp_path, mapping: str) -> None:
    (tmp_path / "a.png").write_bytes(encoded(noise(1)))
    head = "photo" if mapping else "image"
    (tmp_path / "rows.csv").write_text(f"{head},question,answer\na.png,What?,red\n,What now?,blue\n")
    pulled = pull(Config(), path=str(tmp_path / "rows.csv"), columns=parse_columns(mapping))
    assert "1 rows have a column for one and nothing in it" in pulled.said[0]
    first, second = map(msgspec.json.decode, pulled.lines)
    assert (first["question"], first["answer"], first["image"][:6]) == ("What?", "red", "media:")
    assert second == {"question": "What now?", "answer": "blue"}


def test_what_is_written_is_read_back_equal() -> None:
    turns = [
        Message("user", f"{MEDIA_MARK}a\n{MEDIA_MARK}{MEDIA_MARK} b", media=(A, B, A)),
        Message("assistant", "yes"),
        Message("user", f"and {MEDIA_MARK}", media=(B,)),
        Message("assistant", "no"),
    ]
    example = make_example(turns, {"kind": "x"})
    row = json.loads(msgspec.json.encode(make_raw_row(example.messages, example.meta)))
    again = read_conversation(row).example(row["meta"])
    assert again == example and again.media == (A, B, A, B)
    assert to_openai(turns[:1])[0]["content"][0] == {"type": "image_url", "image_url": {"url": f"media:{A}"}}


def test_marks_hidden_in_calls_and_tools_make_no_place() -> None:
    call = {
        "id": "c",
        "type": "function",
        "function": {"name": "f", "arguments": '{"x": "\\ufffc", "\\uFFFC": 1}'},
    }
    tool = {"type": "function", "function": {"name": "f", "description": f"d{MEDIA_MARK}"}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    row = {"messages": turns, "tools": json.dumps([tool])}
    assert MEDIA_MARK not in str(read_conversation(row))


# --- files --------------------------------------------------------------------------------------------------


def made(path: Path, config: Config | None = None, **given: Any) -> tuple[Any, list[Example]]:
    """Ingest a file and prepare it; return the batch and the accepted rows."""
    config = config or Config()
    pulled = pull(config, path=str(path), **given)
    check_rows(pulled, config)
    batch, _ = add_batch(path.parent / "raw", pulled, licence="", who="tests")
    settings = PrepareConfig(min_rows=1)
    out = path.parent / "prepared"
    prepare(path.parent / "raw", path.parent / "golden.jsonl", out, settings, tell=lambda _: None)
    splits = ("train", "validation", "test")
    return batch, [row for split in splits for row in read_examples(out / f"{split}.jsonl")]


def test_a_folder_of_pictures_and_a_csv_become_rows(tmp_path) -> None:
    (tmp_path / "images").mkdir()
    lines = ["file_name,frage,antwort"]
    for number in range(30):
        (tmp_path / f"images/{number}.png").write_bytes(encoded(noise(number)))
        lines.append(f"images/{number}.png,What is it?,answer {number}")
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    mapping = {"image": "file_name", "question": "frage", "answer": "antwort"}
    batch, rows = made(tmp_path / "rows.csv", columns=mapping)
    assert len(rows) == 30 and batch.pictures == 30
    assert {row.messages[0].content for row in rows} == {f"{MEDIA_MARK}What is it?"}
    store = MediaStore.read(tmp_path / "prepared/media")
    for row in rows:
        number = int(row.answer.split()[1])
        assert store[row.media[0]] == encoded(noise(number))


def test_bytes_of_parquet_and_arrow_become_rows(tmp_path) -> None:
    count = 40
    cells = [{"bytes": encoded(noise(number)), "path": f"{number}.png"} for number in range(count)]
    columns = {
        "picture": cells,
        "question": ["What is it?"] * count,
        "answer": [str(n) for n in range(count)],
    }
    parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
    batch, rows = made(tmp_path / "rows.parquet")
    assert len(rows) == count == batch.pictures
    bare = {**columns, "image": [cell["bytes"] for cell in cells]}
    del bare["picture"]
    lists = {**columns, "images": [[cell, cells[0]] for cell in cells]}
    del lists["picture"]
    for number, table in enumerate((bare, lists)):
        parquet.write_table(pa.table(table), tmp_path / f"{number}.parquet")
        pulled = pull(Config(), path=str(tmp_path / f"{number}.parquet"))
        assert sorted(pulled.media) == sorted({row.media[0] for row in rows})
    mapped = {"image": "photo_of_it", "question": "question", "answer": "answer"}
    parquet.write_table(
        pa.table({**columns, "photo_of_it": bare["image"]}).drop_columns("picture"), tmp_path / "m"
    )
    assert len(pull(Config(), path=str(tmp_path / "m"), columns=mapped).media) == count


def test_lines_far_over_a_mebibyte_are_read_if_pictures_make_them_so(tmp_path) -> None:
    large = noise(1, (900, 700))
    speckled = Image.fromarray(np.random.default_rng(1).integers(0, 256, (700, 900, 3), dtype=np.uint8))
    data = [encoded(Image.blend(large, speckled, 0.5)), encoded(speckled)]
    assert min(map(len, data)) > 2**20
    rows = [talk([part(uri(one)), {"type": "text", "text": "so?"}]) for one in data]
    long = {"prompt": "x" * 2**21, "completion": "y"}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, long])))
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    for name, lines in (("rows.jsonl", 3), ("rows.json", 2)):
        pulled = pull(Config(), path=str(tmp_path / name))
        assert len(pulled.lines) == lines and len(pulled.media) == 2
        assert all(len(line) < 1000 for line in pulled.lines[:2]) and max(map(len, pulled.lines)) <= 2**20


def test_paths_count_from_the_folder_that_the_settings_name(tmp_path) -> None:
    folder_of(tmp_path / "data")
    (tmp_path / "rows.jsonl").write_text(json.dumps(question(1, image="images/a.png")))
    config = Config.model_validate({"ingest": {"media": {"folder": "data"}}})
    assert set(pull(config, root=tmp_path, path="rows.jsonl").media) == {A}
    assert not pull(Config(), root=tmp_path, path="rows.jsonl").media


def test_a_store_of_files_elsewhere_is_read_beside_its_rows() -> None:
    files = fsspec.filesystem("memory")
    for name, data in (("data/images/a.png", PNG), ("outside.png", PNG)):
        files.pipe(f"/pictures/{name}", data)
    names = ("images/a.png", "images/none.png", "../outside.png")
    rows = [json.dumps(question(number, image=name)).encode() for number, name in enumerate(names)]
    files.pipe("/pictures/data/rows.jsonl", b"\n".join(rows))
    pulled = pull(Config(), path="memory://pictures/data/rows.jsonl")
    assert set(pulled.media) == {A}
    said = [json.loads(line)["image"].split(":")[:2] for line in pulled.lines]
    assert said == [["media", A], ["media-error", "media_missing"], ["media-error", "media_path"]]


def test_the_ingest_tells_what_became_of_the_pictures(tmp_path) -> None:
    folder = folder_of(tmp_path / "data")
    (folder / "images/turned.jpg").write_bytes(with_exif(6, gps=True))
    names = ("a.png", "a.jpg", "turned.jpg", "none.png", "half.png")
    rows = [question(number, image=f"images/{name}") for number, name in enumerate(names)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (said,) = pull(Config(), path=str(folder / "rows.jsonl")).said
    assert "2 different pictures" in said  # a.jpg holds the bytes of a.png
    for told in ("48x32", "orientation 1", "position 1", "metadata 1", "media_missing 1", "media_broken 1"):
        assert told in said


# --- batches and stores -------------------------------------------------------------------------------------


def batch_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    add_batch(path / "raw", pull(Config(), path=str(path / "rows.jsonl")), licence="", who="tests")
    return path / "raw"


def test_a_batch_is_checked_with_its_pictures_and_leaves_with_them(tmp_path) -> None:
    raw = batch_of(
        folder_of(tmp_path / "data"), [question(1, image="images/a.png"), question(2, image=uri(PNG))]
    )
    (batch,) = read_manifest(raw)
    assert batch.pictures == 1 and (raw / batch.shard).stem == Path(batch.name).stem
    check_batch(raw, batch)
    whole = (raw / batch.shard).read_bytes()
    (raw / batch.shard).write_bytes(whole.replace(b"IDAT", b"IDAU"))
    with pytest.raises(DataError, match="immutable"):
        check_batch(raw, batch)
    (raw / batch.shard).unlink()
    with pytest.raises(DataError, match="missing"):
        check_batch(raw, batch)
    (raw / batch.shard).write_bytes(whole)
    take_back(raw, batch)
    assert [path.name for path in raw.iterdir()] == ["manifest.jsonl"]


def test_a_batch_without_pictures_is_written_as_before(tmp_path) -> None:
    raw = batch_of(tmp_path, [question(1), question(2)])
    assert sorted(path.suffix for path in raw.iterdir()) == [".jsonl", ".jsonl"]
    assert b"media" not in (raw / "manifest.jsonl").read_bytes()
    prepare(raw, tmp_path / "golden.jsonl", tmp_path / "out", PrepareConfig(min_rows=1), tell=lambda _: None)
    assert not (tmp_path / "out/media").exists()


def test_a_batch_is_taken_in_again_with_its_own_pictures(tmp_path) -> None:
    raw = batch_of(
        folder_of(tmp_path / "data"), [question(1, image="images/a.png"), question(2, image="images/b.jpg")]
    )
    (batch,) = read_manifest(raw)
    kept = tmp_path / "kept.jsonl"
    kept.write_bytes((raw / batch.name).read_bytes().splitlines()[1])
    assert not pull(Config(), path=str(kept)).media
    kept.with_suffix(".tar").write_bytes((raw / batch.shard).read_bytes())
    again, _ = add_batch(tmp_path / "again", pull(Config(), path=str(kept)), licence="", who="tests")
    assert list(MediaStore([tmp_path / "again" / again.shard])) == [B]  # of the row that was kept, no other


def test_a_shard_is_the_same_for_the_same_pictures_and_any_tar_reads_it(tmp_path) -> None:
    pictures = {
        picture.name: picture.data for picture in (read_picture(encoded(noise(n)), LIMITS) for n in range(5))
    }
    write_shard(tmp_path / "a.tar", pictures)
    write_shard(tmp_path / "b.tar", dict(reversed(pictures.items())))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar", "r:") as shard:
        members = shard.getmembers()
        assert [member.name for member in members] == sorted(pictures)
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in members} == {(0, 0, 0, 0o644, "")}
        assert all(shard.extractfile(m).read() == pictures[m.name] for m in members)  # type: ignore[union-attr]
    with pytest.raises(DataError):
        write_shard(tmp_path / "c.tar", {A: b"other bytes"})
    with pytest.raises(DataError):
        write_shard(tmp_path / "c.tar", {}, [A])


def test_a_store_reads_every_shard_and_names_what_is_missing(tmp_path) -> None:
    write_shard(tmp_path / "media/one.tar", {A: PNG})
    write_shard(tmp_path / "media/two.tar", {B: encoded(noise(2), "JPEG")})
    store = MediaStore.read(tmp_path / "media")
    assert set(store) == {A, B} and len(store) == 2 and store[A] == PNG and size_of(store[B]) == (48, 32)
    missing = f"{'0' * 64}.png"
    assert missing not in store and store.get(missing) is None
    with pytest.raises(DataError, match=f"the picture {missing} is in none"):
        store[missing]
    assert len(MediaStore.read(tmp_path / "none")) == 0
    (tmp_path / "media/three.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match="no tar"):
        MediaStore.read(tmp_path / "media")


# --- splits -------------------------------------------------------------------------------------------------


def sides_of(path: Path, **settings: Any) -> tuple[dict[str, set[str]], Counter[str]]:
    """Prepare the batches; return picture → splits, and the reasons of rejected rows."""
    more = {"min_rows": 1, "max_leaked_share": 1.0, "validation_share": 0.3, "test_share": 0.3} | settings
    prepare(path / "raw", path / "golden.jsonl", path / "out", PrepareConfig(**more), tell=lambda _: None)
    sides: dict[str, set[str]] = {}
    for split in ("train", "validation", "test", "golden"):
        for row in read_examples(path / f"out/{split}.jsonl"):
            for name in row.media:
                sides.setdefault(name, set()).add(split)
    lines = (path / "out/rejected.jsonl").read_bytes().splitlines()
    return sides, Counter(msgspec.json.decode(line, type=Rejection).reason for line in lines)


@pytest.mark.parametrize("near_search", [True, False])
def test_rows_that_share_a_picture_stand_in_one_split(tmp_path, near_search) -> None:
    rows = [question(at, image=uri(encoded(noise(at % 40)))) for at in range(120)]
    batch_of(tmp_path, rows)
    sides, reasons = sides_of(tmp_path, near_search=near_search)
    assert len(sides) == 40 and all(len(found) == 1 for found in sides.values()) and not reasons
    assert set().union(*sides.values()) == {"train", "validation", "test"}


def test_a_scaled_or_compressed_copy_counts_as_the_same_picture(tmp_path) -> None:
    rows = []
    for at in range(30):
        whole = noise(at, (320, 240))
        rows.append(question(2 * at, image=uri(encoded(whole))))
        copy = encoded(whole.resize((160, 120)), "JPEG", quality=70)
        rows.append(question(2 * at + 1, image=uri(copy, "image/jpeg")))
    batch_of(tmp_path, rows)
    pairs = [
        json.loads(line)
        for line in (next((tmp_path / "raw").glob("*Z-rows-*.jsonl"))).read_bytes().splitlines()
    ]
    names = [row["image"].removeprefix("media:") for row in pairs]
    sides, _ = sides_of(tmp_path)
    assert all(sides[one] == sides[other] for one, other in zip(names[::2], names[1::2], strict=True))
    apart, _ = sides_of(tmp_path, picture_distance=-1)
    assert any(apart[one] != apart[other] for one, other in zip(names[::2], names[1::2], strict=True))


def test_one_question_about_many_pictures_is_neither_a_copy_nor_a_contradiction(tmp_path) -> None:
    rows = [{**ASKED, "completion": f"thing {at}", "image": uri(encoded(noise(at)))} for at in range(60)]
    batch_of(tmp_path, [*rows, rows[0], {**rows[1], "completion": "another thing"}])
    sides, reasons = sides_of(tmp_path)
    assert len(sides) == 60 and reasons == {"contradiction": 1}  # and the very same row once


def test_pages_without_a_mark_are_not_taken_for_one_another(tmp_path) -> None:
    pages = [Image.new("RGB", (64, 64), (at, 0, 255 - at)) for at in range(60)]
    batch_of(tmp_path, [question(at, image=uri(encoded(page))) for at, page in enumerate(pages)])
    sides, _ = sides_of(tmp_path)
    assert len({min(found) for found in sides.values()}) == 3


def test_a_picture_of_two_splits_leaks_and_its_row_is_rejected(tmp_path) -> None:
    rows = [question(at, image=uri(encoded(noise(at)))) for at in range(40)]
    both = [
        question(100 + at, images=[uri(encoded(noise(at))), uri(encoded(noise(at + 1)))]) for at in range(39)
    ]
    batch_of(tmp_path, [*rows, *both])
    sides, reasons = sides_of(tmp_path)
    assert all(len(found) == 1 for found in sides.values()) and 0 < reasons["straddles"] < 39


def test_golden_rows_keep_their_pictures_for_themselves(tmp_path) -> None:
    rows = [question(at, image=uri(encoded(noise(at)))) for at in range(10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pulled = pull(Config(), path=str(tmp_path / "rows.jsonl"))
    golden = tmp_path / "golden.jsonl"
    assert freeze_golden(golden, pulled, Config(), rows=4, base=tmp_path / "none", tell=lambda _: None) == 4
    assert len(MediaStore([tmp_path / "golden.tar"])) == 4
    others = [question(100 + at, image=uri(encoded(noise(at)))) for at in range(40)]
    batch_of(tmp_path, others)
    sides, reasons = sides_of(tmp_path)
    assert reasons == {"near_golden": 4} and len(sides) == 40
    shards = {path.stem: set(MediaStore([path])) for path in (tmp_path / "out/media").iterdir()}
    assert shards["golden"] == {name for name, found in sides.items() if found == {"golden"}}
    (tmp_path / "golden.tar").unlink()
    with pytest.raises(DataError, match="media_missing"):
        sides_of(tmp_path)


def test_a_forgotten_row_leaves_no_picture_behind(tmp_path) -> None:
    rows = [question(at, image=uri(encoded(noise(at)))) for at in range(30)]
    raw = batch_of(tmp_path, rows)
    (batch,) = read_manifest(raw)
    gone = json.loads((raw / batch.name).read_bytes().splitlines()[4])["image"].removeprefix("media:")
    forgotten = Forgotten([Entry([], batch.name, 5, "ticket", "tests", "2026-01-01T00:00:00Z")])
    settings = PrepareConfig(min_rows=1)
    prepare(
        raw, tmp_path / "golden.jsonl", tmp_path / "out", settings, forgotten=forgotten, tell=lambda _: None
    )
    store = MediaStore.read(tmp_path / "out/media")
    assert len(store) == 29 and gone not in store


def test_a_picture_that_is_like_two_joins_them_with_the_sides_of_both() -> None:
    gallery, cells = Gallery(6), bytes(1024)
    for name, hash in (("one", 0), ("other", 0b11_1111_1111), ("between", 0b1_1111)):
        gallery.learn(name, Look(hash, cells))
    gallery.hang(gallery.groups(["one"]), "row 1", "train")
    gallery.hang(gallery.groups(["other"]), "row 2", "test")
    assert gallery.sides(gallery.groups(["other"])) == [("row 2", "test")]
    assert set(gallery.sides(gallery.groups(["other", "between"]))) == {("row 1", "train"), ("row 2", "test")}
    assert len(set(gallery.groups(["one", "other", "between"]))) == 1


def test_what_pictures_show_is_compared_by_more_than_a_hash() -> None:
    page = Image.new("RGB", (320, 320), "white")
    page.paste(noise(1, (320, 120)), (0, 0))
    one, other = page.copy(), page.copy()
    one.paste((0, 0, 0), (40, 200, 140, 230))
    other.paste((0, 0, 0), (60, 260, 160, 290))
    looks = [look_at(encoded(image)) for image in (one, other, one.resize((160, 160)))]
    assert looks[0] and looks[1] and looks[2]
    table = np.frombuffer(looks[1].cells + looks[2].cells, np.uint8).reshape(2, -1)
    assert alike(table, looks[0].cells).tolist() == [False, True]


def test_the_index_finds_what_a_comparison_of_all_pairs_finds() -> None:
    chance = np.random.default_rng(5)
    index, known = LookIndex(6), list[tuple[Look, int]]()
    base = chance.integers(0, 200, (4, 1024))
    for number in range(120):
        kind = int(chance.integers(4))
        bits = sum(1 << int(bit) for bit in set(chance.integers(0, 64, int(chance.integers(0, 6)))))
        apart = chance.integers(-7, 8, 1024) if number % 2 else chance.integers(-5, 6, 1024)
        look = Look((kind << 40) ^ bits, (base[kind] + 8 + apart).clip(0, 255).astype(np.uint8).tobytes())
        wanted = {
            group
            for other, group in known
            if (other.hash ^ look.hash).bit_count() <= 6
            and np.abs(np.array([*other.cells]) - np.array([*look.cells])).max() <= 12
        }
        assert set(index.like(look)) == wanted
        index.add(look, number)
        known.append((look, number))


def test_a_row_that_a_person_accepts_keeps_its_picture(tmp_path) -> None:
    rows = [question(at, image=uri(encoded(noise(at)))) for at in range(40)]
    doubtful = {"prompt": "log in at p\u0430ypal now", "completion": "no", "image": uri(encoded(noise(99)))}
    raw = batch_of(tmp_path, [*rows, doubtful])
    (tmp_path / "data").mkdir()
    raw = raw.rename(tmp_path / "data/raw")
    config, out = Config.model_validate({"prepare": {"min_rows": 1}}), tmp_path / "data/prepared"

    prepare(raw, tmp_path / "data/golden.jsonl", out, config.prepare, tell=lambda _: None)
    rejected = read_rejected(out / "rejected.jsonl")
    assert queue_doubtful(tmp_path, tmp_path / "data", rejected, config) == 1
    queue = ReviewQueue(tmp_path)
    (item,) = queue.pending()
    queue.decide(Decision(item.id, item.draft, "accept", by="Ana"))
    queue.close()
    batch, _ = add_batch(raw, pull(config, root=tmp_path, source="review"), licence="", who="tests")
    assert batch.pictures == 1

    prepare(raw, tmp_path / "data/golden.jsonl", out, config.prepare, tell=lambda _: None)
    files = [out / f"{split}.jsonl" for split in ("train", "validation", "test")]
    (taken,) = (row for file in files for row in read_examples(file) if row.answer == "no")
    assert MediaStore.read(out / "media")[taken.media[0]] == encoded(noise(99))


def test_a_preview_shows_a_picture_by_name_and_size(tmp_path) -> None:
    folder = folder_of(tmp_path / "data")
    (folder / "rows.jsonl").write_text(json.dumps({"images": ["images/a.png"], **talk("see <image>?")}))
    pulled = pull(Config(), path=str(folder / "rows.jsonl"))
    found = preview_rows(pulled.lines, Origin("x", "jsonl"), PrepareConfig(), None, pulled.media)
    assert as_plain(found)[0]["messages"][0]["content"] == f"see [picture {A[:12]}… 48×32]?"


def test_a_preview_by_tokens_shows_one_picture_for_all_its_tokens(tmp_path) -> None:
    folder = folder_of(tmp_path / "data")
    (folder / "rows.jsonl").write_text(json.dumps({"images": ["images/a.png"], **talk("see <image>?")}))
    pulled = pull(Config(), path=str(folder / "rows.jsonl"))
    chat = load_chat(make_llava(tmp_path / "model"), pulled.media)
    (row,) = preview_rows(pulled.lines, Origin("x", "jsonl"), PrepareConfig(), chat, pulled.media)
    assert row.tokens == len(chat.encode(row.example).ids)
    (told,) = as_plain([row])
    assert "".join(text for text, _ in told["tokens"]).startswith(
        f"<|user|>see [picture {A[:12]}… 48×32]?<|end|>"
    )
    assert sum(learned for _, learned in told["tokens"]) > 0


def test_masking_keeps_the_places_of_pictures() -> None:
    row = {"image": f"media:{A}", "question": "write to ana.lima@example.org: <image>", "answer": "done"}
    settings = PrepareConfig(personal_data="mask")
    checked = Validator(settings).check(msgspec.json.encode(row), Origin("x", "jsonl"))
    content = checked.example.messages[0].content
    assert content.endswith(MEDIA_MARK) and "example.org" not in content and checked.example.media == (A,)
