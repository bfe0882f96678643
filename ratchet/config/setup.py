"""Make params.yaml from the answers to five questions: base, data, metric, GPU, who promotes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from ratchet.config.docs import SURVEYED, render_params
from ratchet.config.edit import edit_params
from ratchet.config.params import Config, parse_config
from ratchet.errors import UserError
from ratchet.files import write_text

PINNED = re.compile(r"(?P<model>.+)@(?P<revision>[0-9a-f]{40})")
NOT_ALONE = ("exact_match", "answer_nll")  # always computed, so they need no entry in evaluate.metrics


class Answers(NamedTuple):
    """Answers to the five questions; the defaults are those of the built-in example."""

    base: str = "demo"  # a value of `base.model`; a hub id includes its commit: `org/name@<40 hex digits>`
    data: str = "pydoc"  # `pydoc`, or a file, glob or URL for `ingest.jsonl.path`
    metric: str = "exact_match"
    gpu: bool = False
    promotion: str = "rollout"


def changes_for(answers: Answers) -> dict[str, Any]:
    """Return the dotted keys of params.yaml that the answers change, with their values."""
    changes: dict[str, Any] = {"promotion": answers.promotion, "gate.metric": answers.metric}
    pinned = PINNED.fullmatch(answers.base)
    changes["base.model"] = pinned["model"] if pinned else answers.base
    if pinned:
        changes["base.revision"] = pinned["revision"]
    if answers.data != "pydoc":
        changes |= {"ingest.source": "jsonl", "ingest.jsonl.path": answers.data}
    known = Config().evaluate.metrics
    if answers.metric not in (*known, *NOT_ALONE):
        changes["evaluate.metrics"] = [*known, answers.metric]
    if answers.gpu:
        changes["adapter.method"] = "qlora"
    return changes


def write_params(path: Path, answers: Answers, *, force: bool = False) -> str:
    """Write params.yaml and return its text.

    Raises ConfigError if params.yaml cannot hold an answer, and UserError if the file was changed and `force`
    is false; in both cases nothing is written.
    """
    fresh = render_params(Config(), SURVEYED)
    text = edit_params(fresh, changes_for(answers))
    parse_config(YAML(typ="safe").load(text), path)
    if not force and path.exists() and path.read_text(encoding="utf-8") not in (fresh, text):
        raise UserError(
            f"{path} was changed by hand or by an earlier `ratchet init`",
            remedy="edit it, or --force replaces it (git keeps what was committed)",
        )
    write_text(path, text)
    return text
