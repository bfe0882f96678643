"""Turn pictures into a model's inputs with the model's own processor: placeholder tokens and pixel values.

How many tokens stand for a picture is the model's affair: the processor is asked, and nothing is computed
here. Only Pillow decodes and resizes; torchvision, which computes slightly other pixels, is not used.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any

import xxhash

from ratchet.errors import BaseModelError

if TYPE_CHECKING:
    import torch

# Files beside a tokenizer that describe a processor; the tokenizer's own files are not among them.
FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
READS = FILES[:2]  # with one of these a base reads pictures
OF_TEXT = ("input_ids", "attention_mask")
OF_SEQUENCE = ("token_type_ids", "mm_token_type_ids")  # inputs with the shape of the ids
KNOWN = 1024  # pictures whose tokens are kept
CROSS = "cross_attention_mask"  # an input that belongs to a whole row at once
VIDEO = "video_processor"
REMEDY = "take a base whose pictures work here (docs/training.md), or leave the pictures out of the rows"


class MediaProcessor:
    """A model's own processor of pictures.

    `placeholder` is the token that the chat template writes for a picture, `image_id` the id of the token
    whose embeddings the model replaces by a picture's features. They are equal in most models.
    """

    def __init__(self, processor: Any) -> None:
        """Take the tokens of `processor`. Raises BaseModelError: it names none."""
        self.processor = processor
        self.placeholder = str(getattr(processor, "image_token", None) or "")
        tokenizer = processor.tokenizer
        known = self.placeholder in tokenizer.get_vocab()
        self.placeholder_id = int(tokenizer.convert_tokens_to_ids(self.placeholder)) if known else -1
        ids = {int(id) for id in getattr(processor, "image_token_ids", []) if id is not None}
        read = {self.placeholder_id} & ids or ids  # InternVL names the tokens around a picture, too
        if not known or len(read) != 1:
            raise BaseModelError(
                f"{type(processor).__name__} names no single token that stands for a picture "
                f"(its image token is {self.placeholder!r}, ids {sorted(ids)})",
                remedy=REMEDY,
            )
        self.image_id = read.pop()
        self._known: dict[bytes, list[int]] = {}
        self._sequence_names: list[str] | None = None

    def expand(self, ids: Sequence[int], pictures: Sequence[bytes]) -> list[int]:
        """Replace the n-th placeholder in `ids` by the tokens that the processor writes for picture n.

        Raises BaseModelError: there are not as many placeholders as pictures, or not as many tokens of a
        picture as the model has features.
        """
        return [token for piece in self.pieces(ids, pictures) for token in piece]

    def pieces(self, ids: Sequence[int], pictures: Sequence[bytes]) -> list[list[int]]:
        """Return, for each id, the ids that stand in its place (see `expand`)."""
        places = sum(id == self.placeholder_id for id in ids)
        if places != len(pictures):
            raise BaseModelError(
                f"the chat template writes {places} places for {len(pictures)} pictures",
                remedy="name a template in `base.chat_template` that writes "
                f"{self.placeholder!r} once for each part of type image",
            )
        written = iter(pictures)
        return [self.tokens_of(next(written)) if id == self.placeholder_id else [id] for id in ids]

    def tokens_of(self, picture: bytes) -> list[int]:
        """Return the ids that the processor writes for one picture. Raises BaseModelError."""
        key = xxhash.xxh3_128_digest(picture)  # a row is measured and encoded several times
        if key not in self._known:
            if len(self._known) >= KNOWN:
                self._known.clear()
            self._known[key] = self._ask(picture)
        return list(self._known[key])

    def _ask(self, picture: bytes) -> list[int]:
        found = self._call([[picture]])
        ids: list[int] = found["input_ids"][0].tolist()
        if ids and ids[0] == self.processor.tokenizer.bos_token_id:
            ids = ids[1:]
        tokens, features = ids.count(self.image_id), self._count_features(found)
        if tokens == 0 or features not in (None, tokens):
            raise BaseModelError(
                f"{type(self.processor).__name__} writes {tokens} tokens for a picture, "
                f"and the model reads {features} features",
                remedy="the processor's files belong to another model than the weights; " + REMEDY,
            )
        return ids

    def features(self, rows: Sequence[Sequence[bytes]]) -> dict[str, torch.Tensor]:
        """Return the model's extra inputs for the pictures of a batch of rows; {} if no row shows any.

        Rows without pictures take no part: models find the places of features by the ids.
        """
        shown = [row for row in rows if row]
        if not shown:
            return {}
        return {
            name: value for name, value in self._call(shown).items() if name not in (*OF_TEXT, *OF_SEQUENCE)
        }

    def alone(self, pictures: Sequence[bytes]) -> dict[str, torch.Tensor]:
        """Return the model's inputs, ids and mask among them, for rows of one picture each and no text."""
        return self._call([[picture] for picture in pictures])

    def sequence_features(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the inputs that tell tokens of pictures from others, (batch, seq); {} if there are none."""
        import torch

        if self._sequence_names is None:
            self._sequence_names = [name for name in OF_SEQUENCE if name in self._call([[_blank()]])]
        if not self._sequence_names:
            return {}
        kinds = torch.tensor(self.processor.create_mm_token_type_ids(ids.tolist()), device=ids.device)
        return dict.fromkeys(self._sequence_names, kinds)

    def _call(self, rows: Sequence[Sequence[bytes]]) -> dict[str, Any]:
        pictures = [[_open(picture) for picture in row] for row in rows]
        try:
            found = dict(
                self.processor(
                    images=pictures,
                    text=[self.placeholder * len(row) for row in rows],
                    return_tensors="pt",
                    padding=True,
                    add_special_tokens=False,
                )
            )
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError) as error:
            raise BaseModelError(
                f"{type(self.processor).__name__} cannot read a picture: {type(error).__name__}: "
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

    def _count_features(self, found: dict[str, Any]) -> int | None:
        """Return the number of features of one picture, if its inputs tell; None: only the model knows."""
        images = self.processor.image_processor
        if "image_grid_thw" in found and (merged := getattr(images, "merge_size", None)):
            return int(found["image_grid_thw"].prod(-1).sum()) // int(merged) ** 2
        for name in ("image_seq_len", "image_seq_length"):
            if length := getattr(self.processor, name, None):
                return int(length) * _tiles(found["pixel_values"])
        return None


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


def reads_pictures(folder: Path) -> bool:
    """Tell whether the base or version in `folder` has a processor of pictures."""
    return any((folder / name).exists() for name in READS)


def copy_processor(source: Path, folder: Path) -> None:
    """Copy the processor's files, so that a version is served with those of its training."""
    for name in FILES:
        if (source / name).exists() and (source / name).resolve() != (folder / name).resolve():
            copyfile(source / name, folder / name)


def load_processor(folder: Path) -> MediaProcessor | None:
    """Load the processor of the base or version in `folder`; None: it reads text only.

    Raises BaseModelError: the processor needs what is not installed, or is unknown to transformers.
    """
    if not reads_pictures(folder):
        return None
    settings: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "backend": "pil"}
    try:
        processor = _load(folder, settings)
    except (ImportError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(
            f"transformers cannot load the processor of pictures: {type(error).__name__}: "
            f"{(str(error).strip() or 'no message').splitlines()[0]}",
            remedy=REMEDY,
        ) from None
    if not hasattr(processor, "image_processor"):
        raise BaseModelError(
            f"the processor's files give a {type(processor).__name__}, which reads no pictures",
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
