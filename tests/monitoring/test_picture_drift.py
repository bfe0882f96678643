"""How pictures of the traffic look, against those of the champion's rows."""

from __future__ import annotations

import io
import os
import time
from functools import cache

import msgspec
import numpy as np
import pytest
from PIL import Image

from ratchet.config.monitoring import MonitorConfig
from ratchet.config.params import Config
from ratchet.data.examples import MEDIA_MARK
from ratchet.errors import DataError
from ratchet.monitoring.drift import Family, judge
from ratchet.monitoring.families import Answered, Reference
from ratchet.monitoring.novelty import Familiar
from ratchet.monitoring.picture_features import (
    DIMENSIONS,
    FILE,
    Features,
    pack,
    read_features,
    unpack,
    write_features,
)
from ratchet.monitoring.pictures import (
    COLUMNS,
    KeptPictures,
    Look,
    content_family,
    farthest,
    in_words,
    look_of,
    picture_family,
    show,
)
from ratchet.monitoring.request_log import open_log
from ratchet.monitoring.request_records import Logged
from ratchet.monitoring.verdicts import Topic
from tasks.monitor import measure

CONFIG = Config(monitor=MonitorConfig(resamples=400, min_prompts=100))


def draw(chance: np.random.Generator, *, scan: bool = False) -> bytes:
    """Draw a soft colour gradient with noise, like a photograph, or dark lines on white, like a scan."""
    height, width = (int(chance.integers(40, 90)) for _ in range(2))
    if scan:
        pixels = np.full((height, width, 3), 245.0)
        pixels[chance.random(height) < 0.3] = 20.0
    else:
        across = np.linspace(0, 1, width)[None, :, None]
        one, two = (chance.uniform(0, 200, 3) for _ in range(2))
        pixels = one + (two - one) * across + chance.normal(0, 12, (height, width, 3))
    stored = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stored, "PNG")
    return stored.getvalue()


@cache
def looks(count: int, seed: int, *, scan: bool = False) -> list[Look]:
    chance = np.random.default_rng(seed)
    return [look_of(f"{seed}-{number}", draw(chance, scan=scan)) for number in range(count)]


def test_figures_tell_what_they_are_called() -> None:
    def of(pixels: np.ndarray) -> dict[str, float]:
        stored = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(stored, "PNG")
        return dict(zip(COLUMNS, look_of("x", stored.getvalue()).figures, strict=True))

    grey = np.full((20, 40, 3), 128)
    board = np.indices((20, 40)).sum(axis=0)[..., None].repeat(3, axis=2) % 2 * 255
    red = np.full((20, 40, 3), [255, 0, 0])
    flat, sharp, bright = of(grey), of(board), of(red)
    size, shape, brightness, contrast, sharpness, colour = COLUMNS
    assert flat[size] == pytest.approx(np.log(800), abs=1e-4)
    assert flat[shape] == pytest.approx(np.log(2), abs=1e-4)
    assert flat[brightness] == pytest.approx(128 / 255, abs=1e-3) and flat[contrast] == 0
    assert sharp[contrast] == pytest.approx(0.5, abs=1e-3) and sharp[sharpness] > flat[sharpness] + 10
    assert bright[colour] > 0.3 > flat[colour] == sharp[colour] == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (700, 2)])
def test_a_picture_of_any_shape_has_finite_figures(size: tuple[int, int]) -> None:
    stored = io.BytesIO()
    Image.new("L", size, 7).save(stored, "PNG")
    assert np.isfinite(look_of("x", stored.getvalue()).figures).all()


def alarms(windows: int, scans: int, rate: float = 0.05) -> int:
    """Count the windows of 100 pictures, of them `scans` new ones, that are called drift."""
    pool, new, chance, found = looks(700, 1), looks(60, 2, scan=True), np.random.default_rng(3), 0
    for number in range(windows):
        order = chance.permutation(400)
        window = [pool[place] for place in order[: 100 - scans]]
        window += [new[place] for place in chance.permutation(60)[:scans]]
        family = picture_family(window, [pool[place] for place in order[100:]], pool[400:])
        assert family and not isinstance(family, str)
        found += judge([family], rate=rate, resamples=200, seed=number).drift
    return found


def test_windows_of_known_pictures_are_called_drift_no_more_often_than_the_rate() -> None:
    assert alarms(400, scans=0) <= 31, "99 % limit of 400 windows at 5 %"


def test_a_tenth_of_scans_among_photographs_is_found() -> None:
    assert alarms(20, scans=10) >= 18


def asked(pictures: list[Look]) -> list[Logged]:
    """The same question about each picture."""
    return [
        Logged(
            f"r{number}",
            float(number),
            "",
            "champion",
            1,
            messages=(("user", f"{MEDIA_MARK}What is it?"),),
            answer=f"thing {number % 7}",
            pictures=(look,),
        )
        for number, look in enumerate(pictures)
    ]


def reference() -> Reference:
    questions = [f"{MEDIA_MARK}What is it?"] * 300
    answers = [Answered(f"thing {number % 7}", None) for number in range(300)]
    return Reference(
        Familiar(questions), questions, questions, answers, looks(700, 1)[:300], looks(700, 1)[400:]
    )


def test_one_question_about_many_pictures_is_many_questions_and_new_pictures_are_drift() -> None:
    known = measure(asked(looks(700, 1)[300:400]), {}, [], reference(), CONFIG)
    assert (known.verdict, known.distinct) == ("no drift", 100)
    verdict = measure(
        asked([*looks(700, 1)[300:380], *looks(60, 2, scan=True)[:40]]), {}, [], reference(), CONFIG
    )
    assert verdict.verdict == "drift" and verdict.moved == ["pictures"]
    assert {column.name for column in verdict.columns if column.family == "pictures"} >= set(COLUMNS)


def test_too_few_pictures_are_told_and_text_alone_tells_nothing_of_pictures() -> None:
    assert picture_family([], [], []) is None
    few = picture_family(looks(700, 1)[:10], looks(700, 1)[100:200], looks(700, 1)[400:])
    assert few == "pictures: 10 in this window and 100 to compare with; wanted 30"


def test_pictures_of_requests_are_kept_for_their_owner_as_long_as_their_newest_request(tmp_path) -> None:
    kept = KeptPictures(tmp_path)
    one, two = draw(np.random.default_rng(1)), draw(np.random.default_rng(2))
    names = f"{'1' * 64}.png", f"{'2' * 64}.png"
    kept.keep(dict(zip(names, (one, two), strict=True)))
    (tmp_path / ".ratchet/pictures/notes.txt").write_text("of a user's own")
    assert dict(kept) == {names[0]: one, names[1]: two}
    assert (tmp_path / ".ratchet/pictures").stat().st_mode & 0o077 == 0
    for name in names:
        os.utime(tmp_path / ".ratchet/pictures" / name, (1000.0, 1000.0))
    kept.keep({names[1]: two})
    kept.forget(before=2000.0)
    assert list(kept) == [names[1]] and (tmp_path / ".ratchet/pictures/notes.txt").exists()
    assert "../requests.db" not in kept and names[0] not in kept


@pytest.mark.parametrize("settings", [{}, {"pictures": True, "texts": False}])
def test_no_picture_is_kept_unless_the_log_keeps_texts_and_pictures(tmp_path, settings) -> None:
    log = open_log(tmp_path, Config.model_validate({"request_log": settings}))
    log.keep_pictures({f"{'1' * 64}.png": b"x"})
    log.close()
    assert not (tmp_path / ".ratchet/pictures").exists()


def seen(count: int, seed: int, *, kinds: int = 5, new: bool = False) -> list[Look]:
    """Pictures that all look alike, of things that a model sees as clusters of vectors."""
    chance = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(0, 1, (kinds + 1, 32))
    chosen = [kinds] * count if new else chance.integers(kinds, size=count)
    vectors = centres[chosen] + chance.normal(0, 0.5, (count, 32))
    return [Look(f"{seed}-{place}", (0.0,) * 6, pack(vector)) for place, vector in enumerate(vectors)]


def content_alarms(windows: int, size: int, new_ones: int, rate: float = 0.05) -> int:
    known, new, found = seen(3 * size, 1), seen(60, 2, new=True), 0
    held_out, trained = known[: 2 * size], known[2 * size :]
    for number in range(windows):
        chance = np.random.default_rng(number)
        order = chance.permutation(2 * size)
        window = [held_out[place] for place in order[: size - new_ones]]
        window += [new[place] for place in chance.permutation(60)[:new_ones]]
        family = content_family(window, [held_out[place] for place in order[size - new_ones :]], trained)
        assert isinstance(family, Family)
        found += judge([family], rate=rate, resamples=200, seed=number).drift
    return found


def test_known_things_in_new_pictures_are_called_drift_no_more_often_than_the_rate() -> None:
    assert content_alarms(400, size=100, new_ones=0) <= 31, "99 % limit of 400 windows at 5 %"


def test_a_tenth_of_new_things_among_pictures_that_look_alike_is_found() -> None:
    assert content_alarms(20, size=500, new_ones=50) >= 18


def test_what_pictures_show_is_compared_only_where_the_model_told_it() -> None:
    told, untold = seen(200, 1), looks(700, 1)
    assert content_family([], [], []) is None
    for window, held_out, trained in (
        (untold, told, told),
        (told, untold, told),
        (told, told, untold),
        (told[:29], told[100:], told[:100]),
    ):
        reason = content_family(window, held_out, trained)
        assert isinstance(reason, str) and "wanted 30" in reason


def test_new_things_in_pictures_that_look_alike_are_drift_of_what_pictures_show() -> None:
    known = seen(900, 1)
    questions = [f"{MEDIA_MARK}What is it?"] * 300
    answers = [Answered(f"thing {number % 7}", None) for number in range(300)]
    compared = Reference(Familiar(questions), questions, questions, answers, known[:300], known[300:600])
    assert measure(asked(known[600:800]), {}, [], compared, CONFIG).verdict == "no drift"
    verdict = measure(asked([*known[600:780], *seen(30, 2, new=True)]), {}, [], compared, CONFIG)
    assert (verdict.verdict, verdict.moved) == ("drift", ["what pictures show"])


def test_features_survive_the_file_and_the_log_and_are_few_numbers(tmp_path) -> None:
    wide = pack(np.random.default_rng(1).normal(0, 1, 2000).astype(np.float32))
    again = pack(np.random.default_rng(1).normal(0, 1, 2000).astype(np.float32))
    assert len(wide) == 2 * DIMENSIONS and wide == again
    assert pack(np.full(8, np.nan, np.float32)) == pack(np.zeros(8, np.float32)) == b""
    features = Features({"a.png": wide}, {})
    write_features(tmp_path / FILE, features)
    assert read_features(tmp_path / FILE) == features
    assert read_features(tmp_path / "none") == Features()
    (tmp_path / "broken").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(DataError, match="features of pictures"):
        read_features(tmp_path / "broken")
    log = open_log(tmp_path, Config())
    (record,) = asked([Look("a.png", (0.0,) * 6, wide)])
    log.put(msgspec.structs.replace(record, at=time.time()))
    assert log.flush()
    assert [one.pictures for one in log.window(limit=9)] == [record.pictures]
    log.close()


def test_projection_keeps_near_pictures_near() -> None:
    chance = np.random.default_rng(2)
    vectors = chance.normal(0, 1, (40, 900)).astype(np.float32)
    vectors[20:] = vectors[:20] + chance.normal(0, 0.1, (20, 900))
    packed = unpack([pack(vector) for vector in vectors])
    nearest = np.linalg.norm(packed[:20, None] - packed[None, 20:], axis=-1).argmin(axis=1)
    assert nearest.tolist() == list(range(20))


def test_a_verdict_names_the_pictures_that_are_the_farthest_from_the_training() -> None:
    known, new = seen(400, 1), seen(30, 2, new=True)
    told_by_content = farthest([*known[:100], *new], known[100:], 3, by_content=True)
    assert {look.name for look in told_by_content} <= {look.name for look in new}
    photographs, scans = looks(700, 1), looks(60, 2, scan=True)
    told_by_looks = farthest([*photographs[:100], *scans], photographs[400:], 3, by_content=False)
    assert {look.name for look in told_by_looks} <= {look.name for look in scans}
    assert farthest(photographs[:100], photographs[400:], 3, by_content=True) == []
    compared = Reference(*reference()[:4], known[:300], known[100:])
    verdict = measure(asked([*known[300:380], *new]), {}, [], compared, CONFIG)
    assert verdict.pictures[0].name in {look.name for look in new}
    assert measure(asked(known[300:400]), {}, [], compared, CONFIG).pictures == []


def test_a_topic_names_pictures_of_its_own_requests_those_of_its_examples_first() -> None:
    topic = Topic("kiln", ["kiln"], 0.1, 0.0, ["which kiln is hot?"])
    one, two, three, four, other = looks(700, 1)[:5]
    requests = [
        ("is the kiln new?", [one]),
        ("which kiln is hot?", [two, three]),
        ("a boat?", [other]),
        ("kiln or kiln?", [four]),
        ("a kiln without a picture", []),
    ]
    shown = show(topic, requests)
    assert [picture.name for picture in shown.pictures] == [two.name, three.name, one.name]
    assert shown.pictures[0].looks == in_words(two)


def test_words_tell_size_light_and_colour() -> None:
    stored = io.BytesIO()
    Image.new("RGB", (640, 480), (20, 20, 20)).save(stored, "PNG")
    assert in_words(look_of("x", stored.getvalue())) == "640x480 pixels, dark, of little contrast, grey"
    assert in_words(look_of("x", draw(np.random.default_rng(1)))).endswith("colourful")
