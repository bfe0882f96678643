"""List the settings with their values, and tell where each value comes from.

The params.yaml in git holds the keys that people often change. All others have a default in the code and are
listed in docs/params.md; a project adds those that it changes. DVC requires each key and section that
dvc.yaml names to be in the file; a changed default counts as a change of each stage's code.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel
from ruamel.yaml import YAML

from ratchet.config.docs import SURVEYED, section_of
from ratchet.config.params import Config, load_config


class Setting(NamedTuple):
    """A key with its value; `set_in` names the file that sets it, and is empty if it has its default."""

    key: str
    value: Any
    default: Any
    set_in: str


def read_settings(path: Path, *, everything: bool) -> list[Setting]:
    """Return the settings that people often change and those that are set, or `everything`.

    Raises ConfigError.
    """
    values, defaults = load_config(path).model_dump(mode="json"), Config().model_dump(mode="json")
    raw = YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {}
    found = (
        Setting(key, _at(values, key), _at(defaults, key), path.name if _stands_in(raw, key) else "")
        for key in keys_of(Config)
    )
    return [one for one in found if everything or one.set_in or one.key in SURVEYED]


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of params.yaml."""
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        yield from keys_of(section, f"{prefix}{name}.") if section else [prefix + name]


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _stands_in(raw: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(raw, dict) or part not in raw:
            return False
        raw = raw[part]
    return True
