"""Read the files that a base model comes as, and refuse what cannot be used."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from ratchet.errors import BaseModelError
from ratchet.files import read_json


def read_settings(snapshot: Path, name: str) -> Any:
    """Read the text model's config.

    Raises BaseModelError: the model brings code of its own, which is never run, or transformers does not know
    it.
    """
    from transformers import AutoConfig

    for path in (snapshot / "config.json", snapshot / "tokenizer_config.json"):
        if path.exists() and "auto_map" in read_json(path):
            raise BaseModelError(
                f"{name} wants to run its own code (auto_map in {path.name})",
                remedy="take a model whose architecture transformers knows; remote code is never run",
            )
    try:
        return AutoConfig.from_pretrained(
            snapshot, trust_remote_code=False, local_files_only=True
        ).get_text_config()
    except (ValueError, OSError, KeyError) as error:
        raise BaseModelError(
            f"{name} has a config.json that transformers {version('transformers')} cannot read:"
            f" {str(error).splitlines()[0]}",
            remedy="take another model",
        ) from None


def find_weights(snapshot: Path) -> tuple[list[Path], list[str]]:
    """Return the safetensors that are there, and the names of those that the index lists and are not."""
    there = sorted(snapshot.glob("*.safetensors"))
    index = snapshot / "model.safetensors.index.json"
    listed = set(read_json(index)["weight_map"].values()) if index.exists() else set()
    return there, sorted(listed - {path.name for path in there})
