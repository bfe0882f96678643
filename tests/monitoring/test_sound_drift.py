"""How recordings of the traffic sound, against those of the champion's rows."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from scipy.signal import lfilter

from ratchet.config.monitoring import MonitorConfig
from ratchet.config.params import Config
from ratchet.data.examples import MEDIA_MARK
from ratchet.media.sounds import RATE, write_flac
from ratchet.monitoring.drift import judge
from ratchet.monitoring.families import Answered, Reference
from ratchet.monitoring.novelty import Familiar
from ratchet.monitoring.pictures import Look
from ratchet.monitoring.request_records import Logged
from ratchet.monitoring.sounds import COLUMNS, sound_family, sound_of
from tasks.monitor import measure

CONFIG = Config(monitor=MonitorConfig(resamples=400, min_prompts=100))


def play(chance: np.random.Generator, *, telephone: bool = False) -> bytes:
    """Play syllables: bursts of coloured noise with pauses; through a telephone they lack the heights."""
    length = int(RATE * chance.uniform(0.4, 1.2))
    noise = chance.normal(0, 1, length)
    voice = lfilter([1.0], [1.0, -chance.uniform(0.2, 0.6)], noise)
    bursts = np.repeat(chance.random(length // 1600 + 1) < 0.7, 1600)[:length]
    samples = voice * (0.02 + bursts) * chance.uniform(0.05, 0.15)
    if telephone:
        samples = lfilter(np.ones(8) / 8, [1.0], samples)
    return write_flac(samples.astype(np.float32))


def name(seed: int, number: int) -> str:
    return f"{seed}-{number}.flac"


@cache
def heard(count: int, seed: int, *, telephone: bool = False) -> list[Look]:
    chance = np.random.default_rng(seed)
    return [sound_of(name(seed, number), play(chance, telephone=telephone)) for number in range(count)]


def test_figures_tell_what_they_are_called() -> None:
    def of(samples: np.ndarray) -> dict[str, float]:
        return dict(
            zip(COLUMNS, sound_of("x.flac", write_flac(samples.astype(np.float32))).figures, strict=True)
        )

    times = np.arange(RATE) / RATE
    tone = 0.5 * np.sin(2 * np.pi * 1000 * times)
    length, loudness, peak, pauses, brightness, bandwidth = COLUMNS
    one = of(tone)
    assert one[length] == 0 and of(tone[: RATE // 2])[length] == pytest.approx(np.log(0.5), abs=1e-3)
    assert one[loudness] == pytest.approx(20 * np.log10(0.5 / np.sqrt(2)), abs=0.01)
    assert of(tone / 10)[loudness] == pytest.approx(one[loudness] - 20, abs=0.1)
    assert one[peak] == pytest.approx(10 * np.log10(2), abs=0.01)
    assert one[pauses] == 0 and of(tone * (times < 0.25))[pauses] == pytest.approx(0.74, abs=0.03)
    assert np.exp(one[brightness]) == pytest.approx(1000, rel=0.01)
    assert np.exp(one[bandwidth]) == pytest.approx(1050, abs=60)
    assert of(np.random.default_rng(1).normal(0, 0.1, RATE))[bandwidth] > np.log(7000)


@pytest.mark.parametrize(
    "samples", [np.r_[0.0, 1.0, np.zeros(1600)], np.ones(1700), np.tile([1.0, -1.0], 900)]
)
def test_a_recording_of_any_kind_has_finite_figures(samples: np.ndarray) -> None:
    assert np.isfinite(sound_of("x.flac", write_flac(samples.astype(np.float32))).figures).all()


def alarms(windows: int, new: int, rate: float = 0.05) -> int:
    """Count the windows of 100 recordings, of them `new` through a telephone, that are called drift."""
    pool, other, chance, found = heard(700, 1), heard(60, 2, telephone=True), np.random.default_rng(3), 0
    for number in range(windows):
        order = chance.permutation(400)
        window = [pool[place] for place in order[: 100 - new]]
        window += [other[place] for place in chance.permutation(60)[:new]]
        family = sound_family(window, [pool[place] for place in order[100:]], pool[400:])
        assert family and not isinstance(family, str)
        found += judge([family], rate=rate, resamples=200, seed=number).drift
    return found


def test_windows_of_known_recordings_are_called_drift_no_more_often_than_the_rate() -> None:
    assert alarms(400, new=0) <= 31, "99 % limit of 400 windows at 5 %"


def test_a_tenth_through_a_telephone_is_found() -> None:
    assert alarms(20, new=10) >= 18


def asked(sounds: list[Look]) -> list[Logged]:
    """The same question about each recording."""
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
        for number, look in enumerate(sounds)
    ]


def reference() -> Reference:
    questions = [f"{MEDIA_MARK}What is it?"] * 300
    answers = [Answered(f"thing {number % 7}", None) for number in range(300)]
    known = {"sounds": heard(700, 1)[:300], "trained_sounds": heard(700, 1)[400:]}
    return Reference(Familiar(questions), questions, questions, answers, **known)


def test_one_question_about_many_recordings_is_many_questions_and_new_ones_are_drift() -> None:
    known = measure(asked(heard(700, 1)[300:400]), {}, [], reference(), CONFIG)
    assert (known.verdict, known.distinct) == ("no drift", 100)
    mixed = [*heard(700, 1)[300:380], *heard(60, 2, telephone=True)[:40]]
    verdict = measure(asked(mixed), {}, [], reference(), CONFIG)
    assert verdict.verdict == "drift" and verdict.moved == ["recordings"]
    assert {column.name for column in verdict.columns if column.family == "recordings"} >= set(COLUMNS)
    assert not [column for column in verdict.columns if column.family == "pictures"]


def test_too_few_recordings_are_told_and_pictures_are_passed_over() -> None:
    picture = Look("1" * 64 + ".png", (0.0,) * 6)
    assert sound_family([picture], [picture], [picture]) is None
    few = sound_family([*heard(700, 1)[:10], picture], heard(700, 1)[100:200], heard(700, 1)[400:])
    assert few == "recordings: 10 in this window and 100 to compare with; wanted 30"
