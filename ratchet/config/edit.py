"""Edit keys of params.yaml and keep everything else as people wrote it: comments, order, quotes."""

from __future__ import annotations

import difflib
import io
import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from ratchet.config.docs import yaml_value


def edit_params(text: str, changes: dict[str, Any]) -> str:
    """Return `text` with each dotted key of `changes` set; a missing section is added at the end."""
    if not changes:
        return text
    yaml = _round_trip(text)
    document = yaml.load(text) or CommentedMap()
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = document
        for section in sections:
            if place.get(section) is None:
                place[section] = CommentedMap()
            place = place[section]
        wanted = yaml.load(yaml_value(value))  # so that numbers have the same form as the others in the file
        if (
            last not in place
            or place[last] != wanted
            or isinstance(place[last], bool) != isinstance(wanted, bool)
        ):
            place[last] = wanted
    out = io.StringIO()
    yaml.dump(document, out)
    return out.getvalue()


def diff_params(before: str, after: str) -> str:
    """Return a unified diff; it is empty if nothing changes."""
    return "".join(
        difflib.unified_diff(
            before.splitlines(keepends=True),
            after.splitlines(keepends=True),
            "a/params.yaml",
            "b/params.yaml",
            n=1,
        )
    )


# Matches a list whose items are not indented below their key; the generated file indents them by two.
FLUSH_LIST = re.compile(r"^( *)[\w.-]+:[^\n]*\n(?: *#[^\n]*\n)*\1- ", re.MULTILINE)


def _round_trip(text: str) -> YAML:
    yaml = YAML(typ="rt")
    if not FLUSH_LIST.search(text):
        yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.preserve_quotes = True
    yaml.width = 10_000  # so that long lines are not wrapped

    def write_null(representer: Any, value: None) -> Any:
        return representer.represent_scalar("tag:yaml.org,2002:null", "null")

    yaml.representer.add_representer(type(None), write_null)
    return yaml
