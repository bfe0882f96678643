"""Describe how pictures look, and compare those of the traffic with those of the champion's rows.

A new kind of picture, such as scans where photographs were, looks otherwise; new things that are photographed
alike are told by what the model sees (ratchet/monitoring/picture_features.py). The log has these figures and
the hash of the bytes; pictures themselves are kept only where `request_log.pictures` says so.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ratchet.data.examples import MEDIA_NAME
from ratchet.files import write_bytes
from ratchet.monitoring.drift import Family, Measure, higher, other
from ratchet.monitoring.picture_features import Vectors, sample, unpack
from ratchet.monitoring.topics import EXAMPLE_LENGTH, belongs
from ratchet.monitoring.verdicts import Picture, Topic

FOLDER = Path(".ratchet/pictures")
SIDE = 256  # pixels of the copy on which light, edges and colours are measured
DIGITS = 4  # of a figure in the log
FAMILY, CONTENT = "pictures", "what pictures show"  # names of the families
SHOWN = 3  # pictures that a topic, or drift of pictures, names
LEAST = 30  # pictures, or recordings, on each side that a family needs
COLUMNS = (
    "picture size (log pixels)",
    "picture shape (log of width by height)",
    "picture brightness",
    "picture contrast",
    "picture sharpness (log)",
    "picture colourfulness",
)


class Look(msgspec.Struct, frozen=True, array_like=True):
    """How a picture looks: one figure for each of COLUMNS; `name` is that of ratchet/media/names.py.

    `features` are what the model sees in it, as ratchet/monitoring/picture_features.py packs them; b"" where
    they are not known.
    """

    name: str
    figures: tuple[float, ...]
    features: bytes = b""


def look_of(name: str, picture: bytes) -> Look:
    """Measure a stored picture.

    Colourfulness is that of Hasler and Süsstrunk (SPIE 5007, 2003), sharpness the mean square of the
    differences of neighbouring pixels.
    """
    from PIL import Image

    with Image.open(io.BytesIO(picture), formats=("PNG", "JPEG")) as image:
        width, height = image.size
        image.thumbnail((SIDE, SIDE))
        pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255  # (height, width, 3)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    grey = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601
    edges = np.concatenate([np.diff(grey, axis=axis).ravel() for axis in (0, 1)])
    warm, cold = red - green, (red + green) / 2 - blue
    figures = (
        math.log(width * height),
        math.log(width / height),
        grey.mean(),
        grey.std(),
        math.log((edges**2).mean() + 1e-6) if edges.size else math.log(1e-6),
        math.hypot(warm.std(), cold.std()) + 0.3 * math.hypot(warm.mean(), cold.mean()),
    )
    return Look(name, tuple(round(float(value), DIGITS) for value in figures))


class KeptPictures(Mapping[str, bytes]):
    """The pictures and recordings of requests that a checkout keeps (`request_log.pictures`), by name."""

    def __init__(self, root: Path) -> None:
        self._folder = root / FOLDER

    def keep(self, pictures: Mapping[str, bytes]) -> None:
        """Write the pictures that are not there yet, in a folder for its owner alone.

        Raises DiskSpaceError, OSError.
        """
        for name, picture in pictures.items():
            path = self._folder / name
            if path.exists():
                path.touch()  # it is kept as long as its newest request
                continue
            self._folder.mkdir(parents=True, exist_ok=True)
            self._folder.chmod(0o700)
            write_bytes(path, [picture])

    def forget(self, before: float) -> None:
        """Remove pictures whose newest request is older; `before` is in seconds since 1970."""
        for name in self:
            path = self._folder / name
            if path.stat().st_mtime < before:
                path.unlink(missing_ok=True)

    def __getitem__(self, name: str) -> bytes:
        if name not in self:
            raise KeyError(name)
        return (self._folder / name).read_bytes()

    def __contains__(self, name: object) -> bool:
        known = isinstance(name, str) and MEDIA_NAME.fullmatch(name) is not None
        return known and (self._folder / str(name)).exists()

    def __iter__(self) -> Iterator[str]:
        names = (path.name for path in self._folder.iterdir()) if self._folder.exists() else ()
        return (name for name in sorted(names) if MEDIA_NAME.fullmatch(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def in_words(look: Look) -> str:
    """Say how a picture looks, for people who do not see it."""
    area, shape, brightness, contrast, _, colours = look.figures
    width, height = (round(math.exp((area + side * shape) / 2)) for side in (1, -1))
    light = "dark" if brightness < 0.35 else "bright" if brightness > 0.65 else "of middle brightness"
    said = [f"{width}x{height} pixels", light]
    said += ["of little contrast"] if contrast < 0.1 else []
    said.append("grey" if colours < 0.02 else "colourful" if colours > 0.3 else "with some colour")
    return ", ".join(said)


def show(topic: Topic, requests: Iterable[tuple[str, Sequence[Look]]]) -> Topic:
    """Add pictures of its requests, each (prompt, pictures), to a topic; those of its examples come first."""
    of_topic = [(prompt, looks) for prompt, looks in requests if looks and belongs(topic, prompt)]
    of_topic.sort(key=lambda request: not any(_is_example(request[0], text) for text in topic.examples))
    looks = {look.name: look for _, shown in of_topic for look in shown}
    return msgspec.structs.replace(topic, pictures=told(list(looks.values())[:SHOWN]))


def _is_example(prompt: str, example: str) -> bool:
    return prompt == example or (len(prompt) > EXAMPLE_LENGTH and example.startswith(prompt[:EXAMPLE_LENGTH]))


def told(looks: Iterable[Look]) -> list[Picture]:
    """Return pictures as a verdict names them."""
    return [Picture(look.name, in_words(look)) for look in looks]


def with_features(looks: Iterable[Look], features: Mapping[str, bytes]) -> tuple[Look, ...]:
    return tuple(
        msgspec.structs.replace(look, features=features.get(look.name, look.features)) for look in looks
    )


def look_at_all(pictures: Mapping[str, bytes], names: Iterable[str], most: int) -> list[Look]:
    return [look_of(name, pictures[name]) for name in sample(names, most)]


def picture_family(window: Iterable[Look], held_out: list[Look], trained: list[Look]) -> Family | str | None:
    """Compare the window's pictures with held-out ones, and the distance of both to those of the training.

    A picture counts once, however often it was asked about. Returns the reason where there are too few, and
    None where nobody shows any.
    """
    shown = list({look.name: look for look in window}.values())
    return form_family(FAMILY, "picture", COLUMNS, shown, held_out, trained)


def form_family(
    name: str,
    what: str,
    columns: Sequence[str],
    shown: Sequence[Look],
    held_out: Sequence[Look],
    trained: Sequence[Look],
) -> Family | str | None:
    """Compare the figures of pictures, or of recordings, and their distance to those of the training.

    `what` names one of them, `columns` the figures. Returns what `picture_family` does.
    """
    if not shown and not held_out:
        return None
    if min(len(shown), len(held_out)) < LEAST or not trained:
        return f"{name}: {len(shown)} in this window and {len(held_out)} to compare with; wanted {LEAST}"
    figures = _table([*shown, *held_out])
    measures = [other(column, figures[:, place], len(shown)) for place, column in enumerate(columns)]
    distance = _distances(figures, _table(trained))
    measures.append(higher(f"distance to the nearest {what} of the training", distance, len(shown)))
    return Family(name, len(shown), len(held_out), measures)


def content_family(
    window: Iterable[Look], held_out: Iterable[Look], trained: Iterable[Look]
) -> Family | str | None:
    """Compare how far what the window's pictures show is from what those of the training show.

    A picture counts once. Returns the reason where too few pictures have features, and None where nobody
    shows any.
    """
    shown, compared = {look.name: look for look in window}, {look.name: look for look in held_out}
    if not shown and not compared:
        return None
    mine, theirs = ([look.features for look in side.values() if look.features] for side in (shown, compared))
    known = [look.features for look in trained if look.features]
    if min(len(mine), len(theirs)) < LEAST or not known:
        return (
            f"{CONTENT}: features of {len(mine)} pictures in this window (request_log.picture_features, "
            f"engine `local`) and of {len(theirs)} to compare with (evaluate.picture_features); "
            f"wanted {LEAST}"
        )
    novelty = _novelty(unpack([*mine, *theirs]), unpack(known), len(mine))
    return Family(CONTENT, len(mine), len(theirs), [novelty])


def farthest(window: Iterable[Look], trained: Sequence[Look], most: int, *, by_content: bool) -> list[Look]:
    """Return the window's pictures that are the farthest from those of the training, the farthest first.

    `by_content` compares what they show, else how they look.
    """
    shown = {look.name: look for look in window if look.features or not by_content}
    known = [look for look in trained if look.features or not by_content]
    if not shown or not known:
        return []
    looks = list(shown.values())
    if by_content:
        distances = _apart(
            unpack([look.features for look in looks]), unpack([look.features for look in known])
        )
    else:
        distances = _distances(_table(looks), _table(known))
    return [looks[place] for place in np.argsort(-distances, kind="stable")[:most]]


def _apart(seen: NDArray[Any], known: NDArray[Any]) -> NDArray[np.float64]:
    """Return the distance of each row of `seen` to the nearest one of `known`."""
    from scipy.spatial import KDTree

    return np.asarray(KDTree(known).query(seen)[0], dtype=np.float64)


def _novelty(seen: Vectors, known: Vectors, window: int) -> Measure:
    return higher("distance to what pictures of the training show", _apart(seen, known), window)


def _table(looks: Sequence[Look]) -> NDArray[np.float64]:
    return np.array([look.figures for look in looks], dtype=np.float64)  # (looks, columns)


def _distances(figures: NDArray[np.float64], known: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the logarithm of each one's distance to the nearest known one, in standard deviations."""
    middle, spread = known.mean(axis=0), known.std(axis=0) + 1e-6
    return np.log(_apart((figures - middle) / spread, (known - middle) / spread) + 1e-3)
