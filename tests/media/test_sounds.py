"""Recordings, from files to prepared rows: each bad case by its number, each form, each kind of change.

The numbers go on from those of pictures (`test_media.py`).
"""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from media_models import make_llava, make_qwen2_audio, make_rows, name_of, sound, write_prepared
from pyarrow import parquet

from ratchet.config.data import MediaConfig, PrepareConfig
from ratchet.config.params import Config
from ratchet.config.training import BaseConfig
from ratchet.data.batches import read_manifest
from ratchet.data.dedup import Gallery
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
from ratchet.data.validation import Origin
from ratchet.errors import DataError, MediaError
from ratchet.files import read_json
from ratchet.media.sounds import (
    RATE,
    hash_of_samples,
    length_of,
    read_sound,
    samples_at,
    samples_of,
    to_wav,
    write_flac,
)
from ratchet.media.store import MediaStore
from ratchet.models.loading import load_chat
from ratchet.models.processors import kinds_read
from ratchet.sources.preview import as_plain, preview_rows
from tasks.base import make_base
from tasks.ingest import add_batch, pull
from tasks.prepare import prepare
from tasks.tokenize import tokenize
from tests.media.test_media import batch_of, encoded, made, noise, question, talk, verdict_of

LIMITS = MediaConfig()


def tone(seconds: float = 0.5, pitch: float = 440.0, rate: int = 44_100, channels: int = 1) -> np.ndarray:
    """Return a tone, (samples,) or (samples, channels), the later channels softer."""
    times = np.arange(int(seconds * rate)) / rate
    mono = 0.4 * np.sin(2 * np.pi * pitch * times)
    return mono if channels == 1 else np.stack([mono / (1 + n) for n in range(channels)], axis=1)


def stored(samples: np.ndarray, rate: int = 44_100, form: str = "WAV", subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=form, subtype=subtype)
    return out.getvalue()


WAV, FLAC, OGG, MP3 = (stored(tone(), form=form) for form in ("WAV", "FLAC", "OGG", "MP3"))
OPUS = stored(tone(rate=48_000), 48_000, "OGG", "OPUS")
HALF_NAN = tone().copy()
HALF_NAN[1000] = np.nan


class Refused(NamedTuple):
    number: int
    data: bytes
    reason: str
    said: str


REFUSED = [
    Refused(111, b"", "media_broken", "no bytes"),
    Refused(111, stored(np.zeros(0)), "media_broken", "no samples"),
    Refused(112, WAV[: len(WAV) // 2], "media_broken", "of 44100 bytes of samples are there"),
    Refused(112, WAV[:30], "media_broken", "holds no samples"),
    Refused(112, FLAC[: len(FLAC) // 2], "media_broken", "cut off or broken"),
    Refused(112, OGG[: len(OGG) // 2], "media_broken", "last page is not whole"),
    Refused(112, OPUS[:-40], "media_broken", "last page is not whole"),
    Refused(112, OPUS[: OPUS.rindex(b"OggS")], "media_broken", "not the end of the stream"),
    Refused(112, MP3[: len(MP3) // 2], "media_broken", "samples are there"),
    Refused(113, stored(np.zeros(8000)), "media_silent", "silent"),
    Refused(113, stored(np.full(8000, 0.25)), "media_silent", "silent"),
    Refused(113, stored(np.stack([tone(), -tone()], axis=1)), "media_silent", "channels cancel"),
    Refused(114, stored(HALF_NAN, subtype="FLOAT"), "media_broken", "no numbers"),
    Refused(114, stored(np.full(9000, np.inf), subtype="FLOAT"), "media_broken", "no numbers"),
    Refused(
        115, stored(tone(30.1, rate=8000), 8000), "media_size", "30.1 s long; `ingest.media.max_seconds`"
    ),
    Refused(115, stored(tone(40, rate=8000), 8000, "MP3"), "media_size", "cut it into pieces"),
    Refused(115, stored(tone(0.05)), "media_size", "at least 0.1 s"),
    Refused(116, b"\x00\x00\x00\x20ftypM4A " + bytes(100), "media_type", "M4A (AAC)"),
    Refused(116, b"\x00\x00\x00\x20ftypisom" + bytes(100), "media_type", "MP4"),
    Refused(116, b"\xff\xf1\x50\x80" + bytes(100), "media_type", "AAC"),
    Refused(117, b"\x1a\x45\xdf\xa3" + bytes(100), "media_type", "WebM"),
    Refused(117, b"RIFF\x00\x01\x00\x00AVI LIST", "media_type", "video (AVI)"),
    Refused(118, b"<!doctype html><title>login</title>", "media_type", "page (HTML)"),
    Refused(118, encoded(noise()), "media_type", "a picture (PNG)"),
    Refused(118, b"PK\x03\x04" + bytes(100), "media_type", "archive (zip)"),
    Refused(118, b"MThd" + bytes(100), "media_type", "MIDI"),
    Refused(118, stored(tone(), form="AIFF"), "media_type", "AIFF"),
    Refused(117, OGG + OGG, "media_type", "Ogg file of 2 streams"),
    Refused(118, b"no sound at all", "media_type", "a file in place of a recording"),
    Refused(118, b"sounds/a.wav", "media_type", "the path 'sounds/a.wav' in place of a recording"),
    Refused(119, stored(tone(rate=2000), 2000), "media_type", "2000 samples a second"),
    Refused(119, stored(tone(channels=9), 44_100), "media_type", "9 channels"),
    Refused(119, b"RIFF" + bytes(4) + b"WAVE" + bytes(40), "media_broken", "cut off"),
    Refused(119, b"fLaC" + bytes(100), "media_broken", "cut off or broken"),
    Refused(119, b"ID3" + bytes(100), "media_broken", "cut off or broken"),
]


@pytest.mark.parametrize("case", REFUSED, ids=[f"{one.number}-{at}" for at, one in enumerate(REFUSED)])
def test_what_cannot_be_heard_is_refused_with_the_reason(case: Refused) -> None:
    with pytest.raises(RowError) as refused:
        read_sound(case.data, LIMITS)
    assert refused.value.reason == case.reason
    assert case.said in str(refused.value)


@pytest.mark.parametrize(
    ("data", "changed"),
    [
        (stored(tone(rate=RATE), RATE), ()),
        (stored(tone(rate=RATE), RATE, "FLAC"), ()),
        (stored(tone(channels=2, rate=RATE), RATE), ("channels",)),
        (stored(tone(rate=RATE), RATE, subtype="PCM_24"), ("depth",)),
        (stored(tone(rate=RATE), RATE, subtype="ULAW"), ("depth",)),
        (stored(3 * tone(rate=RATE), RATE, subtype="FLOAT"), ("depth", "clipped")),
        (stored(tone(rate=8000), 8000), ("rate",)),
        (MP3, ("mp3", "rate")),
        (OGG, ("ogg", "rate")),
        (OPUS, ("ogg", "rate")),
    ],
)
def test_what_is_heard_is_stored_in_one_form(data: bytes, changed: tuple[str, ...]) -> None:
    found = read_sound(data, LIMITS)
    head = soundfile.info(io.BytesIO(found.data))
    assert (head.format, head.subtype, head.channels, head.samplerate) == ("FLAC", "PCM_16", 1, RATE)
    assert found.changed == changed
    assert found.name == name_of(found.data)
    assert found.seconds == length_of(found.data) == pytest.approx(0.5, abs=0.06)
    assert read_sound(found.data, LIMITS).data == found.data  # what is stored stays as it is
    assert read_sound(to_wav(found.data), LIMITS).name == found.name
    spectrum = np.abs(np.fft.rfft(samples_of(found.data)))
    assert spectrum.argmax() / found.seconds == pytest.approx(440, abs=3)


def test_titles_artists_and_what_follows_the_sound_are_left_out() -> None:
    path = io.BytesIO()
    with soundfile.SoundFile(path, "w", RATE, 1, format="FLAC") as file:
        file.artist, file.comment = "Ana Lima", "at home, 48.8567 N"
        file.write(tone(rate=RATE))
    found = read_sound(path.getvalue(), LIMITS)
    assert found.changed == ("metadata",)
    assert b"Lima" in path.getvalue()
    assert b"Lima" not in found.data
    assert b"48.8567" not in found.data
    assert b"secret" not in read_sound(stored(tone(rate=RATE), RATE) + b"secret", LIMITS).data


def test_a_stream_whose_head_knows_no_length_is_taken_as_far_as_it_goes() -> None:
    data = bytearray(stored(tone(rate=RATE), RATE))
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    assert read_sound(bytes(data), LIMITS).seconds == 0.5


def test_no_bytes_break_it_and_what_is_stored_stays_as_it_is() -> None:
    chance = random.Random(1)
    for data in (WAV, FLAC, OGG, OPUS, MP3):
        for _ in range(12):
            bad = bytearray(data)
            for _ in range(chance.randrange(1, 5)):
                bad[chance.randrange(len(bad))] = chance.randrange(256)
            try:
                found = read_sound(bytes(bad[: len(bad) - chance.choice((0, 0, 9))]), LIMITS)
            except RowError as error:
                assert error.reason in ("media_broken", "media_type", "media_size", "media_silent")
            else:
                assert read_sound(found.data, LIMITS).data == found.data


def test_a_recording_at_another_rate_keeps_its_length_and_pitch() -> None:
    found = samples_at(read_sound(WAV, LIMITS).data, 24_000)
    assert len(found) == 12_000
    assert np.abs(np.fft.rfft(found)).argmax() * 2 == pytest.approx(440, abs=3)


def test_bytes_that_are_no_stored_recording_are_named() -> None:
    for read in (samples_of, length_of, hash_of_samples):
        with pytest.raises(DataError, match="stored recording cannot be read"):
            read(b"no recording")


# --- references ---------------------------------------------------------------------------------------------


def heard(data: bytes, form: str = "wav") -> dict[str, Any]:
    return {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(data).decode(), "format": form},
    }


def folder_of(path: Path) -> Path:
    (path / "sounds").mkdir(parents=True)
    (path / "sounds/a.wav").write_bytes(WAV)
    (path / "sounds/b.mp3").write_bytes(stored(tone(pitch=880), form="MP3"))
    (path / "sounds/half.wav").write_bytes(WAV[:900])
    (path / "sounds/a.png").write_bytes(encoded(noise()))
    return path


A, B = (read_sound(data, LIMITS).name for data in (WAV, stored(tone(pitch=880), form="MP3")))
ASKED = {"prompt": "What is it?", "completion": "a tone"}
TURNS = {"from": "human", "value": "<audio>\nso?"}
# A row, and the contents of the user's turns, with # for a recording.
FORMS: list[tuple[dict[str, Any], list[str]]] = [
    (talk([heard(WAV), {"type": "text", "text": "What is it?"}]), ["#What is it?"]),
    (talk([{"type": "text", "text": "What"}, heard(WAV), {"type": "text", "text": "is?"}]), ["What#is?"]),
    (talk([{"type": "audio", "audio": "sounds/a.wav"}, {"type": "text", "text": "so?"}]), ["#so?"]),
    (talk([{"type": "audio", "path": "sounds/a.wav"}, {"type": "text", "text": "so?"}]), ["#so?"]),
    (talk([{"type": "audio_url", "audio_url": {"url": "sounds/a.wav"}}]), ["#"]),
    (talk([{"type": "audio_url", "audio_url": f"data:audio/wav;base64,{base64.b64encode(WAV).decode()}"}]),
     ["#"]),
    (talk("first?", [{"type": "audio", "audio": "sounds/a.wav"}, {"type": "audio", "audio": "sounds/b.mp3"}]),
     ["first?", "##"]),
    ({"audio": "sounds/a.wav", "question": "What is it?", "answer": "a tone"}, ["#What is it?"]),
    ({"audio_path": "sounds/a.wav", **ASKED}, ["#What is it?"]),
    ({"audio": {"bytes": None, "path": "sounds/a.wav"}, **ASKED}, ["#What is it?"]),
    ({"audio": {"array": tone().tolist(), "sampling_rate": 44_100, "path": None}, **ASKED}, ["#What is it?"]),
    ({"audios": ["sounds/a.wav", "sounds/b.mp3"], **ASKED}, ["##What is it?"]),
    ({"audios": ["sounds/a.wav", "sounds/b.mp3"], **talk("<audio>\nfirst", "then <audio>?")},
     ["#\nfirst", "then #?"]),
    ({"audios": ["sounds/a.wav"], **talk([{"type": "audio"}, {"type": "text", "text": "so?"}])}, ["#so?"]),
    ({"audio": "sounds/a.wav", "conversations": [TURNS, {"from": "gpt", "value": "a tone"}]}, ["#\nso?"]),
    ({"audio": "sounds/a.wav", "text": "a tone of 440 hertz"}, ["#"]),
    ({"file_name": "sounds/a.wav", "text": "a tone of 440 hertz"}, ["#"]),
    ({"messages": [{"role": "user", "content": "so?", "audios": ["sounds/a.wav"]},
                   {"role": "assistant", "content": "a tone", "audio": {"id": "audio_1"}}]}, ["#so?"]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "asked"), FORMS)
def test_every_form_that_people_have_plays_its_recordings_where_they_stood(tmp_path, row, asked) -> None:
    found, example = verdict_of(folder_of(tmp_path / "data"), row)
    assert found == "taken" and example is not None
    users = [message for message in example.messages if message.role == "user"]
    assert [message.content.replace(MEDIA_MARK, "#") for message in users] == asked
    count = sum(text.count("#") for text in asked)
    assert len(example.media) == count and ("array" in str(row) or example.media == (A, B)[:count])
    assert set(MediaStore.read(tmp_path / "data/prepared/media")) == set(example.media)


ROWS: list[tuple[int, dict[str, Any], str]] = [
    (120, question(1000, audio="sounds/half.wav"), "media_broken"),
    (120, question(1000, audio="sounds/none.wav"), "media_missing"),
    (120, question(1000, audio="../outside.wav"), "media_path"),
    (120, question(1000, audio="https://example.org/a.wav"), "media_url"),
    (120, question(1000, audio="sounds/a.png"), "media_type"),
    (120, question(1000, image="sounds/a.wav"), "media_type"),
    (121, talk([heard(WAV[:2000])]), "media_broken"),
    (121, talk([{"type": "input_audio", "input_audio": {"data": "?!", "format": "wav"}}]), "media_broken"),
    (121, question(1000, audio={"array": ["x"], "sampling_rate": 16_000}), "media_broken"),
    (121, question(1000, audio={"array": [0.0] * 9000, "sampling_rate": 16_000}), "media_silent"),
    (122, {"audios": ["sounds/a.wav"], **talk("<audio> and <audio>?")}, "media_place"),
    (122, talk([{"type": "audio"}]), "media_missing"),
    (121, question(1000, audio=base64.b64encode(b"\xff\xf1\x50\x80" * 30).decode()), "media_url"),
    (122, {"images": ["sounds/a.png"], **talk([{"type": "audio"}])}, "media_place"),
    (122, talk("sing", answer=[{"type": "audio", "audio": "sounds/a.wav"}]), "media_place"),  # type: ignore[arg-type]
    (123, question(1000, image="sounds/a.png", audio="sounds/a.wav"), "taken"),
]


@pytest.mark.parametrize(("number", "row", "verdict"), ROWS, ids=[f"{n}-{v}" for n, _, v in ROWS])
def test_a_reference_gets_its_verdict_and_no_row_vanishes(tmp_path, number, row, verdict) -> None:
    found, example = verdict_of(folder_of(tmp_path / "data"), row)
    assert found == verdict
    assert (example is not None) == (verdict == "taken")


def test_pictures_and_recordings_of_one_row_stand_where_their_marks_stand() -> None:
    names = {"image": "1" * 64 + ".png", "audio": "2" * 64 + ".flac"}
    row = {key: f"media:{name}" for key, name in names.items()}
    (turn, _) = read_conversation(
        row | {"prompt": "hear <audio>, then see <image>", "completion": "so"}
    ).messages
    assert (turn.content, turn.media) == (
        f"hear {MEDIA_MARK}, then see {MEDIA_MARK}",
        (names["audio"], names["image"]),
    )
    (turn, _) = read_conversation(row | {"prompt": "see <image>", "completion": "so"}).messages
    assert turn.content == f"{MEDIA_MARK}see {MEDIA_MARK}" and turn.media == (names["audio"], names["image"])


def test_what_is_written_is_read_back_equal() -> None:
    turns = [Message("user", f"{MEDIA_MARK}a", media=(A,)), Message("assistant", "yes")]
    example = make_example(turns, {"kind": "x"})
    row = json.loads(json.dumps(make_raw_row(example.messages, example.meta)))
    assert read_conversation(row).example(row["meta"]) == example
    (part, _) = to_openai(turns[:1], {A: read_sound(WAV, LIMITS).data})[0]["content"]
    assert part["type"] == "input_audio" and part["input_audio"]["format"] == "wav"
    assert read_sound(base64.b64decode(part["input_audio"]["data"]), LIMITS).name == A


# --- files, batches and splits ------------------------------------------------------------------------------


def test_bytes_of_parquet_become_rows(tmp_path) -> None:
    count = 20
    cells = [{"bytes": stored(tone(0.2, 200 + 30 * n)), "path": f"{n}.wav"} for n in range(count)]
    texts = {"question": ["What is it?"] * count, "answer": [str(number) for number in range(count)]}
    parquet.write_table(pa.table({"audio": cells, **texts}), tmp_path / "rows.parquet")
    batch, rows = made(tmp_path / "rows.parquet")
    assert len(rows) == count == batch.sounds and batch.pictures == 0
    columns = {
        "recordings": [[cell["bytes"]] for cell in cells],
        "audio": [{"array": tone(0.2, 200 + 30 * n), "sampling_rate": 44_100} for n in range(count)],
    }
    for key, column in columns.items():
        parquet.write_table(pa.table({key: column, **texts}), tmp_path / f"{key}.parquet")
        pulled = pull(Config(), path=str(tmp_path / f"{key}.parquet"))
        assert len(pulled.media) == count and not any("not taken" in said for said in pulled.said)


def test_the_ingest_tells_what_became_of_the_recordings(tmp_path) -> None:
    folder = folder_of(tmp_path / "data")
    names = ("a.wav", "b.mp3", "none.wav", "half.wav")
    rows = [question(number, audio=f"sounds/{name}") for number, name in enumerate(names)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, question(9, audio=None)])))
    (said,) = pull(Config(), path=str(folder / "rows.jsonl")).said
    for told in (
        "recordings: 2 different recordings of 0.5 to 0.5 s",
        "mp3 1, rate 2",
        "media_missing 1",
        "media_broken 1",
        "1 rows have a column for one and nothing in it",
    ):
        assert told in said


def test_the_same_recording_stands_in_one_split_whatever_file_it_came_in(tmp_path) -> None:
    folder = folder_of(tmp_path / "data")
    rows = []
    for number in range(40):
        samples = (2**15 * tone(pitch=200 + 20 * number, rate=RATE)).astype(np.int16)
        for kind in ("wav", "flac"):
            soundfile.write(folder / f"sounds/{number}.{kind}", samples, RATE)
            rows.append(question(number + 100 * (kind == "wav"), audio=f"sounds/{number}.{kind}"))
    raw = batch_of(folder, rows)
    (batch,) = read_manifest(raw)
    assert batch.sounds == 40
    settings = PrepareConfig(min_rows=1, test_share=0.3)
    prepare(raw, folder / "golden.jsonl", folder / "out", settings, tell=lambda _: None)
    sides: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        for row in read_examples(folder / f"out/{split}.jsonl"):
            sides.setdefault(row.media[0], set()).add(split)
    assert len(sides) == 40 and all(len(side) == 1 for side in sides.values())
    assert len(set().union(*sides.values())) == 3


def test_a_forgotten_row_leaves_no_recording_behind(tmp_path) -> None:
    """Neither where rows are prepared, nor in the batch that is ingested again without it to purge it."""

    def given(number: int) -> str:
        return f"data:audio/flac;base64,{base64.b64encode(sound(number)).decode()}"

    rows = [question(at, audio=given(at)) for at in range(30)]
    raw = batch_of(tmp_path, [*rows, question(30, audio=given(7))])
    (batch,) = read_manifest(raw)
    lines = (raw / batch.name).read_bytes().splitlines(keepends=True)
    gone, shared = (json.loads(lines[at])["audio"].removeprefix("media:") for at in (4, 7))
    data = MediaStore.read(raw)[gone]
    entries = [Entry([], batch.name, line, "ticket", "tests", "2026-01-01T00:00:00Z") for line in (5, 8)]
    settings, out = PrepareConfig(min_rows=1), tmp_path / "out"
    forgotten = Forgotten(entries)
    prepare(raw, tmp_path / "golden.jsonl", out, settings, forgotten=forgotten, tell=lambda _: None)
    store = MediaStore.read(out / "media")
    assert len(store) == 29 and gone not in store and shared in store, "the last row has it as well"
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "kept.jsonl").write_bytes(b"".join(lines[:4] + lines[5:]))
    shutil.copy(raw / batch.shard, kept / "kept.tar")
    add_batch(tmp_path / "again", pull(Config(), path=str(kept / "kept.jsonl")), licence="", who="tests")
    assert len(MediaStore.read(tmp_path / "again")) == 29
    files = [path for folder in (out, tmp_path / "again") for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 6
    assert [path for path in files if data in path.read_bytes() or gone in path.read_text("latin-1")] == []


def test_recordings_count_as_the_same_by_their_samples() -> None:
    one = write_flac(tone(rate=RATE).astype(np.float32))
    other = stored(np.asarray(samples_of(one)), RATE, "FLAC", "PCM_16")
    gallery = Gallery(4)
    for name, data in (("a.flac", one), ("b.flac", other), ("c.flac", sound(3))):
        gallery.hear(name, hash_of_samples(data))
    first, same, third = gallery.groups(["a.flac", "b.flac", "c.flac"])
    assert first == same != third
    gallery.hang([first], "row", "train")
    assert gallery.sides([same]) == [("row", "train")] and gallery.sides([third]) == []


# --- bases --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hearing")
    make_base(folder / "base", Config(base=BaseConfig(model=str(make_qwen2_audio(folder / "model")))))
    return folder / "base"


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("seeing") / "model")


PICTURE = encoded(noise())
SOUND = sound(1)
BOTH = {name_of(PICTURE): PICTURE, name_of(SOUND): SOUND}


def asking(*media: bytes) -> Example:
    asked = Message("user", MEDIA_MARK * len(media) + "so?", media=tuple(map(name_of, media)))
    return make_example([asked, Message("assistant", "yes")], {"batch": "b1.jsonl", "source": "made"})


def test_a_row_with_what_the_base_cannot_take_is_refused_with_the_reason(hearing, seeing, tiny_base) -> None:
    for base, row, number, said in (
        (seeing, asking(SOUND), 0, "a recording is given, and the base reads pictures only"),
        (hearing, asking(PICTURE), 0, "a picture is given, and the base reads recordings only"),
        (hearing, asking(SOUND, PICTURE), 1, "a picture is given, and the base reads recordings only"),
        (tiny_base, asking(SOUND), 0, "a recording is given, and the base reads text only"),
    ):
        with pytest.raises(MediaError, match=said) as refused:
            load_chat(base, BOTH).encode(row)
        assert refused.value.medium == number
        assert not load_chat(base, BOTH).fits(row, 4096)


def test_a_recording_longer_than_the_base_hears_is_not_cut_but_refused(hearing, tmp_path, nobody) -> None:
    long, whole = sound(5, 2.2), sound(6, 2.0)
    media = {name_of(data): data for data in (long, whole)}
    chat = load_chat(hearing, media)
    assert chat.processor and chat.encode(asking(whole)).ids.count(chat.processor.image_id) == 50
    with pytest.raises(MediaError, match=r"2\.2 s long, and the base hears 2 s at most") as refused:
        chat.encode(asking(whole, long))
    assert refused.value.medium == 1
    rows, sounds = make_rows(60, sounds=True)
    both = asking(PICTURE, whole)
    prepared = write_prepared(
        tmp_path / "prepared", [*rows, *rows[:2], asking(long), both], sounds | media | BOTH
    )
    tokenize(prepared, hearing, nobody, tmp_path / "tokens", Config())
    lines = (tmp_path / "tokens/rejected.jsonl").read_text().splitlines()
    reasons = {row["id"]: row["reason"] for row in map(json.loads, lines)}
    assert reasons == {asking(long).id: "media_base", both.id: "media_base"}


def test_the_preview_tells_a_recording_by_its_length(hearing) -> None:
    line = json.dumps({"audio": f"media:{name_of(SOUND)}", "question": "so?", "answer": "yes"}).encode()
    rows = preview_rows([line], Origin("b", "s"), PrepareConfig(), load_chat(hearing, BOTH), BOTH)
    (row,) = as_plain(rows)
    told = f"[recording {name_of(SOUND)[:12]}… 0.5 s]"
    assert row["messages"][0]["content"] == f"{told}so?"
    said = "".join(text for text, _ in row["tokens"])
    assert said == f"<|user|><|audio_bos|>{told}<|audio_eos|>so?<|end|><|assistant|>yes<|end|>"


def test_the_proof_of_a_base_tells_how_many_tokens_a_recording_has(hearing) -> None:
    manifest = read_json(hearing / "manifest.json")
    assert "processor_config.json" in manifest["files"]
    found = load_chat(hearing)
    assert found.reads == ("recordings",)
    assert kinds_read(hearing) == ("audio",)
