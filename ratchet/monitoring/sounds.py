"""Describe how recordings sound, and compare those of the traffic with those of the champion's rows.

What is said or played is not compared, only its form: another microphone, music where speech was.
The figures are kept as those of pictures are (`Look`), and a recording's name tells which they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from ratchet.media.names import is_sound
from ratchet.media.sounds import RATE, samples_of
from ratchet.monitoring.drift import Family
from ratchet.monitoring.pictures import DIGITS, Look, form_family, look_of

FRAME = RATE // 50  # samples of 20 ms, over which loudness and pitch are measured
QUIET = 40.0  # decibels under the loudest frame, below which a frame is a pause
FLOOR = 1e-10  # power of a sample of 16 bits that is nearly always zero
COLUMNS = (
    "recording length (log seconds)",
    "recording loudness (dB of full scale)",
    "recording peak above its loudness (dB)",
    "recording pauses (share of its frames)",
    "recording brightness (log hertz of the spectrum's centre)",
    "recording bandwidth (log hertz, below which is 95 % of its power)",
)


def sound_of(name: str, sound: bytes) -> Look:
    """Measure a stored recording: one figure for each of COLUMNS.

    The centre of a spectrum is the mean of its frequencies, weighed by power. The bandwidth also tells the
    rate at which a recording was made, since what is above half of it is missing.
    """
    samples = samples_of(sound).astype(np.float64)
    whole = np.pad(samples, (0, -len(samples) % FRAME)).reshape(-1, FRAME)  # (frames, FRAME)
    power = (whole**2).mean(1) + FLOOR
    spectrum = (np.abs(np.fft.rfft(whole * np.hanning(FRAME), axis=1)) ** 2).sum(0) + FLOOR
    pitches = np.fft.rfftfreq(FRAME, 1 / RATE)  # hertz
    share = np.cumsum(spectrum) / spectrum.sum()
    loudness = 10 * math.log10(float((samples**2).mean()) + FLOOR)
    figures = (
        math.log(len(samples) / RATE),
        loudness,
        20 * math.log10(float(np.abs(samples).max()) + math.sqrt(FLOOR)) - loudness,
        float((10 * np.log10(power / power.max()) < -QUIET).mean()),
        math.log(float((spectrum * pitches).sum() / spectrum.sum()) + 1),
        math.log(float(pitches[int((share >= 0.95).argmax())]) + 1),
    )
    return Look(name, tuple(round(float(value), DIGITS) for value in figures))


def describe(name: str, medium: bytes) -> Look:
    """Measure a stored picture or recording."""
    return sound_of(name, medium) if is_sound(name) else look_of(name, medium)


def hear_all(media: Mapping[str, bytes], names: Iterable[str], most: int) -> list[Look]:
    """Measure the `most` recordings with the smallest names; names are hashes, so this is a random sample."""
    return [sound_of(name, media[name]) for name in sorted(set(filter(is_sound, names)))[:most]]


def sound_family(
    window: Iterable[Look], held_out: Iterable[Look], trained: Iterable[Look]
) -> Family | str | None:
    """Compare the window's recordings with held-out ones, and the distance of both to those of the training.

    Looks of pictures are passed over. A recording counts once, however often it was asked about. Returns the
    reason where there are too few, and None where nobody has any.
    """
    heard, known, learned = (
        list({look.name: look for look in looks if is_sound(look.name)}.values())
        for looks in (window, held_out, trained)
    )
    return form_family("recordings", "recording", COLUMNS, heard, known, learned)
