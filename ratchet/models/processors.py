"""Turn pictures and recordings into a model's inputs with the model's own processor.

How many tokens stand for a picture or a recording is the model's affair: the processor is asked, and nothing
is computed here. Only Pillow decodes and resizes; torchvision, which computes slightly other pixels, is not
used. A recording that is longer than the model hears is refused, since its processor would cut it.
"""

from __future__ import annotations

import io
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from ratchet.errors import BaseModelError, DataError, MediaError
from ratchet.media.sounds import RATE, length_of, samples_at, write_flac

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Features = dict[str, torch.Tensor]

# Files beside a tokenizer that describe a processor; the tokenizer's own files are not among them.
FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
READS = FILES[:2]  # with one of these a base reads pictures or recordings
HEARS = ("feature_extractor", "feature_extractor_type")  # keys of these files
OF_TEXT = ("input_ids", "attention_mask")
OF_SEQUENCE = ("token_type_ids", "mm_token_type_ids")  # inputs with the shape of the ids
KNOWN = 1024  # pictures and recordings whose tokens are kept
HELD = 2**27  # bytes of inputs that are kept of the last media: those of requests on their way to a batch
PROBES = ((64, 64), (230, 60), (90, 200))  # sizes of pictures that differ in their tiles or patches
LASTS = (0.4, 1.3, 0.7)  # seconds of recordings that differ in their frames
CROSS = "cross_attention_mask"  # an input that belongs to a whole row at once
VIDEO = "video_processor"
REMEDY = "take a base that works here (docs/training.md), or leave pictures and recordings out of the rows"
WORDS = {False: "picture", True: "recording"}  # the key tells whether it is a recording
FLAC = b"fLaC"  # how a stored recording begins


class MediaToken(NamedTuple):
    """The token that stands for a picture, or for a recording.

    `placeholder` is what the chat template writes for one, `id` the id of the token whose embeddings the
    model replaces by its features. They are the same token in most models.
    """

    placeholder: str
    placeholder_id: int
    id: int


class MediaProcessor:
    """A model's own processor of pictures, of recordings, or of both.

    `tokens` has a token for each kind that it reads; the key tells whether that is recordings.
    """

    def __init__(self, processor: Any) -> None:
        """Take the tokens of `processor`. Raises BaseModelError: it names none."""
        self.processor = processor
        self.tokens: dict[bool, MediaToken] = {}
        if getattr(processor, "image_processor", None) is not None:
            self.tokens[False] = _token_of(processor, "image")
        hears = getattr(processor, "feature_extractor", None) is not None
        if hears and (not self.tokens or getattr(processor, "audio_token", None)):
            self.tokens[True] = _token_of(processor, "audio")
        self._known: dict[bytes, list[int]] = {}
        self._held = Held(HELD)
        self._sequence_names: list[str] | None = None

    @property
    def placeholder(self) -> str:
        """What the chat template writes for a picture; of a base that only hears, for a recording."""
        return self._first.placeholder

    @property
    def placeholder_id(self) -> int:
        return self._first.placeholder_id

    @property
    def image_id(self) -> int:
        """The id of the token whose embeddings are replaced by features; of pictures, where it reads both."""
        return self._first.id

    @property
    def _first(self) -> MediaToken:
        return self.tokens[min(self.tokens)]

    @property
    def kinds(self) -> str:
        """What it reads, as words for people."""
        return " and ".join(f"{WORDS[sound]}s" for sound in sorted(self.tokens))

    def expand(self, ids: Sequence[int], media: Sequence[bytes]) -> list[int]:
        """Replace the n-th placeholder in `ids` by the tokens that the processor writes for medium n.

        Raises BaseModelError: there are not as many placeholders as media, or not as many tokens of one as
        the model has features; MediaError: the model does not read such a medium, or not all of it.
        """
        return [token for piece in self.pieces(ids, media) for token in piece]

    def pieces(self, ids: Sequence[int], media: Sequence[bytes]) -> list[list[int]]:
        """Return, for each id, the ids that stand in its place (see `expand`)."""
        kinds = {token.placeholder_id: sound for sound, token in self.tokens.items()}
        places, given = [kinds[id] for id in ids if id in kinds], [is_recording(one) for one in media]
        for number, sound in enumerate(given):
            if sound not in self.tokens:
                raise MediaError(
                    f"a {WORDS[sound]} is given, and the base reads {self.kinds} only",
                    remedy=REMEDY,
                    medium=number,
                )
        if places != given:
            raise BaseModelError(
                f"the chat template writes {len(places)} places for {len(given)} {self.kinds}"
                + (" in another order" if sorted(places) == sorted(given) else ""),
                remedy="name a template in `base.chat_template` that writes "
                f"{self.placeholder!r} once for each part of type {'audio' if True in given else 'image'}",
            )
        written = iter(enumerate(media))
        return [self._tokens_at(*next(written)) if id in kinds else [id] for id in ids]

    def _tokens_at(self, number: int, medium: bytes) -> list[int]:
        try:
            return self.tokens_of(medium)
        except MediaError as error:
            error.medium = number
            raise

    def tokens_of(self, medium: bytes) -> list[int]:
        """Return the ids that the processor writes for one picture or recording. Raises BaseModelError."""
        key = xxhash.xxh3_128_digest(medium)  # a row is measured and encoded several times
        if key not in self._known:
            if len(self._known) >= KNOWN:
                self._known.clear()
            self._known[key] = self._ask(medium, key)
        return list(self._known[key])

    def _ask(self, medium: bytes, key: bytes) -> list[int]:
        sound = is_recording(medium)
        if sound:
            self._check_length(medium)
        found = self._call([[medium]])
        self._held.add(key, _only_features(found))
        ids: list[int] = found["input_ids"][0].tolist()
        if ids and ids[0] == self.processor.tokenizer.bos_token_id:
            ids = ids[1:]
        tokens = ids.count(self.tokens[sound].id)
        features = None if sound else self._count_features(found)  # of a recording only the model knows
        if tokens == 0 or features not in (None, tokens):
            raise BaseModelError(
                f"{type(self.processor).__name__} writes {tokens} tokens for a {WORDS[sound]}, "
                f"and the model reads {features if features is not None else 'more'} features",
                remedy="the processor's files belong to another model than the weights; " + REMEDY,
            )
        return ids

    def _check_length(self, sound: bytes) -> None:
        """Raise MediaError for a recording that the processor would cut."""
        extractor = self.processor.feature_extractor
        most = getattr(extractor, "n_samples", None)
        if most is None:
            return
        longest = int(most) / int(extractor.sampling_rate)
        if (seconds := length_of(sound)) > longest:
            raise MediaError(
                f"a recording is {seconds:.1f} s long, and the base hears {longest:g} s at most",
                remedy=f"cut the recordings, or set `ingest.media.max_seconds` to {longest:g}",
            )

    def features(self, rows: Sequence[Sequence[bytes]]) -> dict[str, torch.Tensor]:
        """Return the model's extra inputs for the media of a batch of rows; {} if no row has any.

        Rows without take no part: models find the places of features by the ids. What `tokens_of` has
        processed is not processed again while its inputs are held.
        """
        shown = [row for row in rows if row]
        if not shown:
            return {}
        if self._row_axis is None:
            return _only_features(self._call(shown))
        parts = [_join([self._inputs_of(medium) for medium in row], self._row_axis) for row in shown]
        return _join(parts, 0)

    def _inputs_of(self, medium: bytes) -> Features:
        key = xxhash.xxh3_128_digest(medium)
        found = self._held.get(key)
        if found is None:
            self._held.add(key, found := _only_features(self._call([[medium]])))
        return found

    @cached_property
    def _row_axis(self) -> int | None:
        """The axis along which the inputs of a row's media are joined; those of rows are along axis 0.

        It is found by a trial, since each processor decides for itself. None: joined inputs are not what the
        processor makes of the media together, so it always gets all media of a batch.
        """
        if len(self.tokens) > 1:  # inputs of pictures and of recordings have other names
            return None
        first, second, third = map(_rising, LASTS) if True in self.tokens else map(_striped, PROBES)
        rows = [[first, second], [third], [second, third, first]]
        wanted = _only_features(self._call(rows))
        alone = {medium: _only_features(self._call([[medium]])) for medium in (first, second, third)}
        if not all(hasattr(value, "shape") for part in (wanted, *alone.values()) for value in part.values()):
            return None
        for axis in (0, 1):
            made = _join([_join([alone[medium] for medium in row], axis) for row in rows], 0)
            if _are_equal(made, wanted):
                return axis
        return None

    def alone(self, pictures: Sequence[bytes]) -> dict[str, torch.Tensor]:
        """Return the model's inputs, ids and mask among them, for rows of one picture each and no text."""
        return self._call([[picture] for picture in pictures])

    def sequence_features(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the inputs that tell tokens of media from others, (batch, seq); {} if there are none."""
        import torch

        if self._sequence_names is None:
            found = self._call([[_silence() if min(self.tokens) else _blank()]])
            self._sequence_names = [name for name in OF_SEQUENCE if name in found]
        if not self._sequence_names:
            return {}
        kinds = torch.tensor(self.processor.create_mm_token_type_ids(ids.tolist()), device=ids.device)
        return dict.fromkeys(self._sequence_names, kinds)

    def _call(self, rows: Sequence[Sequence[bytes]]) -> dict[str, Any]:
        pictures = [[_open(one) for one in row if not is_recording(one)] for row in rows]
        sounds = [self._hear(one) for row in rows for one in row if is_recording(one)]
        given: dict[str, Any] = {"images": pictures} if any(pictures) else {}
        if sounds:
            rate = int(self.processor.feature_extractor.sampling_rate)
            given |= {"audio": sounds, "sampling_rate": rate}
        text = ["".join(self.tokens[is_recording(one)].placeholder for one in row) for row in rows]
        what = self.kinds if len(given) > 1 and pictures else WORDS[bool(sounds)]
        try:
            found = dict(
                self.processor(
                    **given, text=text, return_tensors="pt", padding=True, add_special_tokens=False
                )
            )
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError) as error:
            raise BaseModelError(
                f"{type(self.processor).__name__} cannot read a {what}: {type(error).__name__}: "
                f"{(str(error).strip() or 'no message').splitlines()[0]}",
                remedy=REMEDY,
            ) from None
        if CROSS in found:
            raise BaseModelError(
                f"{type(self.processor).__name__} is of a model that reads pictures by cross-attention, not "
                "in the place of tokens",
                remedy=REMEDY,
            )
        return found

    def _hear(self, sound: bytes) -> NDArray[np.float32]:
        """Return a recording's samples at the rate that the model was trained with, (samples,)."""
        try:
            return samples_at(sound, int(self.processor.feature_extractor.sampling_rate))
        except DataError as error:
            raise BaseModelError(
                f"a recording of {len(sound):,} bytes cannot be decoded: {str(error).splitlines()[0]}",
                remedy=error.remedy,
            ) from None

    def _count_features(self, found: dict[str, Any]) -> int | None:
        """Return the number of features of one picture, if its inputs tell; None: only the model knows."""
        images = self.processor.image_processor
        if "image_grid_thw" in found and (merged := getattr(images, "merge_size", None)):
            return int(found["image_grid_thw"].prod(-1).sum()) // int(merged) ** 2
        for name in ("image_seq_len", "image_seq_length"):
            if length := getattr(self.processor, name, None):
                return int(length) * _tiles(found["pixel_values"])
        return None


class Held:
    """The inputs of the media that were used last, up to `most` bytes; threads may share it."""

    def __init__(self, most: int) -> None:
        self._most, self._bytes = most, 0
        self._found: OrderedDict[bytes, Features] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Features | None:
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
            return self._found.get(key)

    def add(self, key: bytes, features: Features) -> None:
        with self._lock:
            if key in self._found:
                return
            self._found[key] = features
            self._bytes += _size(features)
            while self._bytes > self._most:
                self._bytes -= _size(self._found.popitem(last=False)[1])


def _size(features: Features) -> int:
    return sum(getattr(value, "nbytes", 0) for value in features.values())


def _only_features(found: dict[str, Any]) -> Features:
    return {name: value for name, value in found.items() if name not in (*OF_TEXT, *OF_SEQUENCE)}


def _join(parts: Sequence[Features], axis: int) -> Features:
    """Join inputs of the same names along an axis; the others are padded with zeros at their ends."""
    import torch
    from torch.nn.functional import pad

    joined: Features = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        along = min(axis, values[0].ndim - 1)
        most = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
        for place, value in enumerate(values):
            short = [0 if at == along else most[at] - size for at, size in enumerate(value.shape)]
            if any(short):
                values[place] = pad(value, [edge for size in reversed(short) for edge in (0, size)])
        joined[name] = torch.cat(values, dim=along)
    return joined


def _are_equal(one: Features, other: Features) -> bool:
    import torch

    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _token_of(processor: Any, kind: str) -> MediaToken:
    """Return the token that stands for a kind of media. Raises BaseModelError: there is none."""
    placeholder = str(getattr(processor, f"{kind}_token", None) or "")
    tokenizer = processor.tokenizer
    known = placeholder in tokenizer.get_vocab()
    placeholder_id = int(tokenizer.convert_tokens_to_ids(placeholder)) if known else -1
    ids = {int(id) for id in getattr(processor, f"{kind}_token_ids", []) if id is not None}
    read = {placeholder_id} & ids or ids  # InternVL names the tokens around a picture, too
    if not known or len(read) != 1:
        raise BaseModelError(
            f"{type(processor).__name__} names no single token that stands for a "
            f"{WORDS[kind == 'audio']} (its {kind} token is {placeholder!r}, ids {sorted(ids)})",
            remedy=REMEDY,
        )
    return MediaToken(placeholder, placeholder_id, read.pop())


def is_recording(medium: bytes) -> bool:
    """Tell whether stored bytes are a recording, by how they begin."""
    return medium[:4] == FLAC


def _tiles(pixels: torch.Tensor) -> int:
    """Count the tiles of one picture: (tiles, channels, height, width), or with a batch in front."""
    return math.prod(pixels.shape[:-3])


def _open(picture: bytes) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(picture)) as opened:
            return opened.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise BaseModelError(
            f"a picture of {len(picture):,} bytes cannot be decoded: {error}",
            remedy="run `dvc repro prepare`, which normalises pictures, or ingest the batch again",
        ) from None


def _blank() -> bytes:
    from PIL import Image

    stored = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stored, "PNG")
    return stored.getvalue()


def _striped(size: tuple[int, int]) -> bytes:
    """Return a picture in which no two places look alike, as a PNG."""
    from PIL import Image

    stored = io.BytesIO()
    across = Image.linear_gradient("L").resize(size)
    Image.merge("RGB", (across, across.transpose(Image.Transpose.FLIP_TOP_BOTTOM), across.rotate(180))).save(
        stored, "PNG"
    )
    return stored.getvalue()


def _rising(seconds: float) -> bytes:
    """Return a recording in which no two moments sound alike."""
    import numpy as np

    times = np.arange(int(seconds * RATE)) / RATE
    return write_flac((0.5 * np.sin(2000 * times**2)).astype(np.float32))


def _silence() -> bytes:
    import numpy as np

    return write_flac(np.zeros(RATE // 2, dtype=np.float32))


def reads_media(folder: Path) -> bool:
    """Tell whether the base or version in `folder` has a processor of pictures or recordings."""
    return any((folder / name).exists() for name in READS)


def kinds_read(folder: Path) -> tuple[str, ...]:
    """Return what the base or version in `folder` reads besides text: `image`, `audio`, both or nothing."""
    from ratchet.files import read_json

    keys = {key for name in READS if (folder / name).exists() for key in read_json(folder / name)}
    found = {"image": ("image_processor", "image_processor_type"), "audio": HEARS}
    return tuple(kind for kind, named in found.items() if keys.intersection(named))


def copy_processor(source: Path, folder: Path) -> None:
    """Copy the processor's files, so that a version is served with those of its training."""
    for name in FILES:
        if (source / name).exists() and (source / name).resolve() != (folder / name).resolve():
            copyfile(source / name, folder / name)


def load_processor(folder: Path) -> MediaProcessor | None:
    """Load the processor of the base or version in `folder`; None: it reads text only.

    Raises BaseModelError: the processor needs what is not installed, or is unknown to transformers.
    """
    if not reads_media(folder):
        return None
    settings: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "backend": "pil"}
    try:
        processor = _load(folder, settings)
    except (ImportError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(
            f"transformers cannot load the processor of pictures or recordings: {type(error).__name__}: "
            f"{(str(error).strip() or 'no message').splitlines()[0]}",
            remedy=REMEDY,
        ) from None
    if not hasattr(processor, "image_processor") and not hasattr(processor, "feature_extractor"):
        raise BaseModelError(
            f"the processor's files give a {type(processor).__name__}, which reads no pictures and no sound",
            remedy="take the processor's files from the model's own folder",
        )
    return MediaProcessor(processor)


def _load(folder: Path, settings: dict[str, Any]) -> Any:
    """Load the processor; one of pictures and videos without its part for videos, which needs torchvision."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import processor_class_from_name

    load: Any = AutoProcessor.from_pretrained  # its class has no annotations
    kind: Any = processor_class_from_name(_class_name(folder))
    if kind is None or VIDEO not in kind.get_attributes():
        return load(folder, **settings)

    class Still(kind):  # type: ignore[misc]  # the class is known only here
        """The processor without videos."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == VIDEO and argument is None:
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    Still.__name__ = kind.__name__
    images: Any = AutoImageProcessor
    parts = {
        "image_processor": images.from_pretrained(folder, **settings),
        "tokenizer": AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
        VIDEO: None,
    }
    said, _ = kind.get_processor_dict(folder)
    return Still.from_args_and_dict([parts[name] for name in kind.get_attributes()], said)


def _class_name(folder: Path) -> str:
    from ratchet.files import read_json

    names: Iterable[Any] = (
        read_json(folder / name).get("processor_class")
        for name in (*READS, "tokenizer_config.json")
        if (folder / name).exists()
    )
    return str(next(filter(None, names), ""))
