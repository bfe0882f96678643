"""Recordings of rows: check and normalise their bytes, and read their samples.

Stored recordings are FLAC, mono, RATE samples a second of 16 bits, and without titles, artists or pictures.
libsndfile (https://libsndfile.github.io/libsndfile/) decodes; what it takes too leniently, such as a file
that was cut off, is checked here.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from typing import NamedTuple

import numpy as np
import soundfile
from numpy.typing import NDArray

from ratchet.config.data import MediaConfig
from ratchet.errors import DataError, RowError
from ratchet.media.names import SOUND, name_type

RATE = 16_000  # samples a second: what Whisper's features, and with them most models, are made from
FORMATS = ("WAV", "FLAC", "OGG", "MP3")
RATES = (4_000, 192_000)  # samples a second that are taken
MOST_CHANNELS = 8
LEAST_SECONDS = 0.1  # a shorter click gives a model fewer than two vectors
BLOCK = 2**16  # frames that are decoded at a time, of all channels
UNKNOWN = 2**62  # frames that libsndfile names where a head says none
STEP = 2.0**-15  # of one sample of 16 bits; what moves by less is silence
CUT = "the recording is cut off: "
# What is no recording that is taken, by its first bytes after blanks.
OTHERS = {
    b"%PDF": "a PDF",
    b"<svg": "an SVG",
    b"<": "a page (HTML) or another XML file",
    b"PK": "an archive (zip)",
    b"\x1f\x8b": "an archive (gzip)",
    b"Rar!": "an archive (rar)",
    b"7z\xbc\xaf": "an archive (7z)",
    b"\x89PNG": "a picture (PNG)",
    b"\xff\xd8\xff": "a picture (JPEG)",
    b"GIF8": "a picture (GIF)",
    b"\x1a\x45\xdf\xa3": "a video or sound in Matroska (MKV, WebM)",
    b"FLV": "a video (Flash)",
    b"\x30\x26\xb2\x75": "a Windows Media file (WMA, WMV)",
    b"#!AMR": "a recording in AMR",
    b"MThd": "notes (MIDI), no recording",
    b"FORM": "a recording in AIFF",
    b".snd": "a recording in AU",
    b"caff": "a recording in CAF",
}
BOXES = {b"M4A ": "M4A (AAC)", b"M4B ": "M4B (AAC)", b"qt  ": "QuickTime", b"heic": "HEIC", b"avif": "AVIF"}
RIFFS = {b"AVI ": "a video (AVI)", b"WEBP": "a picture (WebP)"}
SOUND_MAGIC = re.compile(rb"RIFF.{4}WAVE|RF64.{4}WAVE|fLaC|OggS|ID3", re.DOTALL)
OGG_PAGE, OGG_HEAD = b"OggS", 27  # of a page (RFC 3533): its mark, and the bytes of its head
OGG_FIRST, OGG_LAST = 2, 4  # flags of the first and the last page of a stream
UNSIZED = (0, 2**32 - 1)  # what programs that write into a pipe say of the data's size


class Sound(NamedTuple):
    """A recording as it is stored.

    `changed`: what was changed, as codes to count (`channels`, `rate`, `depth`, `metadata`, …).
    """

    name: str
    data: bytes
    seconds: float
    changed: tuple[str, ...] = ()


def read_sound(data: bytes, limits: MediaConfig) -> Sound:
    """Check and normalise a recording, whatever its file is called.

    Raises RowError: `media_type`, `media_size`, `media_broken`, `media_silent`.
    """
    if not data:
        raise RowError("media_broken", "the recording has no bytes")
    if len(data) > limits.max_bytes:
        raise RowError(
            "media_size",
            f"the recording has {len(data)} bytes; `ingest.media.max_bytes` is {limits.max_bytes}",
        )
    _check_type(data)
    _check_end(data)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as opened:
            _check_head(opened, limits)
            samples = _read(opened, limits)
            changed = _notes(opened, data)
            rate = int(opened.samplerate)
    except RowError:
        raise
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        said = str(error).partition("\n")[0][:120] or type(error).__name__
        raise RowError("media_broken", f"the recording is cut off or broken: {said}") from None
    _check_samples(samples, rate)
    if rate != RATE:
        samples = _resample(samples, rate, RATE)
        changed.append("rate")
    if np.abs(samples).max() > 1:
        changed.append("clipped")
    stored = write_flac(samples)
    name = hashlib.sha256(stored).hexdigest() + SOUND
    return Sound(name, stored, len(samples) / RATE, tuple(changed))


def write_flac(samples: NDArray[np.float32]) -> bytes:
    """Return samples of RATE between -1 and 1, (samples,), as a stored recording."""
    whole = np.clip(np.rint(samples * 2.0**15), -(2**15), 2**15 - 1).astype(np.int16)
    out = io.BytesIO()
    soundfile.write(out, whole, RATE, format="FLAC", subtype="PCM_16")
    return out.getvalue()


def write_wav(samples: NDArray[np.float32], rate: int) -> bytes:
    """Return samples, (samples,) or (samples, channels), as a WAV file of floats."""
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format="WAV", subtype="FLOAT")
    return out.getvalue()


def to_wav(sound: bytes) -> bytes:
    """Return a stored recording as a WAV file of 16 bits, which every player and server reads."""
    samples, rate = soundfile.read(io.BytesIO(sound), dtype="int16")
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format="WAV", subtype="PCM_16")
    return out.getvalue()


def samples_of(sound: bytes) -> NDArray[np.float32]:
    """Return the samples of a stored recording, (samples,), RATE a second, between -1 and 1.

    Raises DataError for bytes that are no recording.
    """
    try:
        samples, rate = soundfile.read(io.BytesIO(sound), dtype="float32")
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        raise _unreadable(str(error)) from None
    if rate != RATE or samples.ndim != 1:
        raise _unreadable(f"{rate} samples a second, {samples.shape}")
    return np.asarray(samples, dtype=np.float32)


def samples_at(sound: bytes, rate: int) -> NDArray[np.float32]:
    """Return the samples of a stored recording at another rate, (samples,). Raises DataError."""
    samples = samples_of(sound)
    return samples if rate == RATE else _resample(samples, RATE, rate)


def length_of(sound: bytes) -> float:
    """Return the length of a stored recording in seconds. Raises DataError."""
    try:
        return float(soundfile.info(io.BytesIO(sound)).duration)
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        raise _unreadable(str(error)) from None


def hash_of_samples(sound: bytes) -> bytes:
    """Return the hash of a stored recording's samples: FLAC's head has their MD5 (RFC 9639, section 8.2).

    Two encoders write other bytes for the same samples. Raises DataError.
    """
    if sound[:4] != b"fLaC" or len(sound) < 42 or not any(sound[26:42]):
        raise _unreadable("it is no FLAC file, or one without a hash")
    return sound[26:42]


def _unreadable(what: str) -> DataError:
    return DataError(f"a stored recording cannot be read: {what[:120]}", remedy="ingest the rows again")


# --- checks -------------------------------------------------------------------------------------------------


def _check_type(data: bytes) -> None:
    """Raise RowError for what is no recording of FORMATS, by its first bytes."""
    if SOUND_MAGIC.match(data) or _is_mp3(data):
        return
    raise RowError(
        "media_type", f"{_tell_type(data)} in place of a recording; wanted {', '.join(FORMATS)} (convert it)"
    )


def _is_mp3(data: bytes) -> bool:
    """Tell whether MPEG audio begins here: a frame's sync bits, and a layer; AAC has none."""
    return len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0 and data[1] & 0x06 != 0


def _tell_type(data: bytes) -> str:
    if data[4:8] == b"ftyp":
        return f"a file of type {BOXES.get(data[8:12], 'MP4 (AAC, or a video)')}"
    if data[:4] == b"RIFF":
        return RIFFS.get(data[8:12], "a RIFF file without sound")
    if len(data) > 1 and data[0] == 0xFF and data[1] & 0xF6 == 0xF0:
        return "a recording in AAC"
    head = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    known = (what for magic, what in OTHERS.items() if head.lower().startswith(magic.lower()))
    return next(known, "") or name_type(data)


def _check_end(data: bytes) -> None:
    """Raise RowError for a WAV or Ogg file that lacks its end, which libsndfile takes as it is."""
    if data[:4] == b"RIFF":
        _check_wav_end(data)
    elif data[:4] == OGG_PAGE:
        _check_ogg_end(data)


def _check_wav_end(data: bytes) -> None:
    at = 12
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if kind == b"data":
            if size not in UNSIZED and at + 8 + size > len(data):
                raise RowError(
                    "media_broken", f"{CUT}{len(data) - at - 8} of {size} bytes of samples are there"
                )
            return
        at += 8 + size + size % 2
    raise RowError("media_broken", f"{CUT}the WAV file holds no samples")


def _check_ogg_end(data: bytes) -> None:
    at, flags, streams = 0, 0, 0
    while data[at : at + 4] == OGG_PAGE:
        head = data[at : at + OGG_HEAD]
        sizes = data[at + OGG_HEAD : at + OGG_HEAD + head[26]] if len(head) == OGG_HEAD else b""
        whole = len(head) == OGG_HEAD and len(sizes) == head[26]
        at += OGG_HEAD + len(sizes) + sum(sizes)
        if not whole or at > len(data):
            raise RowError("media_broken", f"{CUT}its last page is not whole")
        flags = head[5]
        streams += bool(flags & OGG_FIRST)
    if streams > 1:
        raise RowError("media_type", f"an Ogg file of {streams} streams, a film or an album; wanted one")
    if not flags & OGG_LAST:
        raise RowError("media_broken", f"{CUT}its last page is not the end of the stream")


def _check_head(opened: soundfile.SoundFile, limits: MediaConfig) -> None:
    """Raise RowError for a recording that is not taken, by what its head says."""
    low, high = RATES
    if not low <= opened.samplerate <= high or not 1 <= opened.channels <= MOST_CHANNELS:
        raise RowError(
            "media_type",
            f"the recording has {opened.channels} channels and {opened.samplerate} samples a second; "
            f"wanted at most {MOST_CHANNELS} channels and {low} to {high} samples a second",
        )
    if opened.frames < UNKNOWN:
        _check_length(opened.frames / opened.samplerate, limits)


def _check_length(seconds: float, limits: MediaConfig) -> None:
    if seconds > limits.max_seconds:
        raise RowError(
            "media_size",
            f"the recording is {seconds:.1f} s long; `ingest.media.max_seconds` is {limits.max_seconds:g}: "
            "cut it into pieces",
        )


def _read(opened: soundfile.SoundFile, limits: MediaConfig) -> NDArray[np.float32]:
    """Return the mean of the channels, (samples,). Raises RowError, and what soundfile raises."""
    most = math.floor(limits.max_seconds * opened.samplerate)
    parts, count = list[NDArray[np.float32]](), 0
    while len(block := opened.read(BLOCK // opened.channels, dtype="float32", always_2d=True)):
        parts.append(block.mean(axis=1, dtype=np.float32))
        count += len(block)
        if count > most:  # its head said less
            _check_length(count / opened.samplerate, limits)
    if count < opened.frames < UNKNOWN:
        raise RowError("media_broken", f"{CUT}{count} of {opened.frames} samples are there")
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def _check_samples(samples: NDArray[np.float32], rate: int) -> None:
    if not len(samples):
        raise RowError("media_broken", "the recording holds no samples")
    if len(samples) < LEAST_SECONDS * rate:
        raise RowError(
            "media_size",
            f"the recording is {len(samples) / rate:.3f} s long; wanted at least {LEAST_SECONDS:g} s",
        )
    if not np.isfinite(samples).all():
        raise RowError("media_broken", "the recording has samples that are no numbers (NaN, infinity)")
    if samples.max() - samples.min() < STEP:
        raise RowError(
            "media_silent", "the recording is silent from beginning to end, or its channels cancel each other"
        )


def _resample(samples: NDArray[np.float32], rate: int, wanted: int) -> NDArray[np.float32]:
    """Return samples of `rate` a second as `wanted` a second, by a polyphase filter against aliases."""
    from scipy.signal import resample_poly

    shared = math.gcd(wanted, rate)
    made = resample_poly(samples.astype(np.float64), wanted // shared, rate // shared)
    return np.asarray(made, dtype=np.float32)


def _notes(opened: soundfile.SoundFile, data: bytes) -> list[str]:
    changed = [] if opened.format in ("FLAC", "WAV", "WAVEX") else [str(opened.format).lower()]
    changed += ["channels"] * (opened.channels > 1)
    changed += ["depth"] * (opened.format in ("FLAC", "WAV", "WAVEX") and opened.subtype != "PCM_16")
    tagged = data[:3] == b"ID3" or bool(set(opened.copy_metadata()) - {"software"})
    return changed + ["metadata"] * tagged
