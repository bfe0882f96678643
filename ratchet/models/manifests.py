"""Read manifest.json: what a base or a trained version says about itself.

The manifest is written last, so a folder that has one is whole. Keys that are not read here are ignored, and
keys that an older manifest lacks have defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from ratchet.errors import BaseModelError
from ratchet.files import read_json

MANIFEST = "manifest.json"


class NewToken(msgspec.Struct, frozen=True):
    """Hold a word of `base.new_tokens`: its token, and the tokens that it was before."""

    id: int
    pieces: list[int]


class BaseManifest(msgspec.Struct, frozen=True):
    """Describe a base; `context` is in tokens, None where the base names no limit."""

    model: str | None = None  # a hub id, or "demo"
    revision: str | None = None
    context: int | None = None
    new_tokens: list[NewToken] = []


class BaseName(msgspec.Struct, frozen=True):
    """Name the base that a version was trained on."""

    model: str | None = None
    revision: str | None = None
    context: int | None = None


class AdapterRecord(msgspec.Struct, frozen=True):
    """Hold the section `adapter` of params.yaml as a training used it; defaults as in AdapterConfig."""

    method: str = "lora"
    quantisation: str = "nf4"
    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    bias: str = "none"
    modules_to_save: list[str] = []
    virtual_tokens: int = 16


class Inputs(msgspec.Struct, frozen=True):
    """Name what a training started from: "base", or the sha256 of the champion's adapter."""

    start: str = "base"


class TrainedManifest(msgspec.Struct, frozen=True):
    """Describe a trained version; `files` maps names to sha256."""

    adapter: AdapterRecord = AdapterRecord()
    base: BaseName = BaseName()
    adapter_sha256: str = ""
    files: dict[str, str] = {}
    run_key: str = ""
    batches: list[str] = []
    inputs: Inputs = Inputs()


Manifest = TypeVar("Manifest", BaseManifest, TrainedManifest)


def read_base_manifest(folder: Path) -> BaseManifest:
    """Return what the base in `folder` is. Raises RatchetError."""
    return _read(folder, BaseManifest)


def read_trained_manifest(folder: Path) -> TrainedManifest:
    """Return what the trained version in `folder` is. Raises RatchetError."""
    return _read(folder, TrainedManifest)


def _read(folder: Path, kind: type[Manifest]) -> Manifest:
    try:
        return msgspec.convert(read_json(folder / MANIFEST), kind)
    except msgspec.ValidationError as error:
        raise BaseModelError(
            f"{folder / MANIFEST} is no manifest: {error}",
            remedy="dvc pull, or `ratchet retrain` makes it anew",
        ) from None
