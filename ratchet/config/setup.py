"""Make params.yaml from the answers to five questions: base, data, metric, GPU, who promotes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from ratchet.config.docs import SURVEYED, render_params
from ratchet.config.edit import edit_params
from ratchet.config.params import Config, parse_config
from ratchet.config.training import kind_of_base
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


def check_base(model: str, root: Path) -> None:
    """Raise UserError for a base that names a place on this machine where none is; nothing is fetched.

    `model` is an answer to the question for the base, `root` the checkout, from which a relative path counts.
    """
    if PINNED.fullmatch(model):
        return
    kind, place = kind_of_base(model), root / Path(model).expanduser()
    if kind == "hub" and place.exists():
        raise UserError(
            f"{model} exists in {root}, but a name of that form is a hub's",
            remedy=f"to take what is there, write ./{model}; to take the hub's: {model}@COMMIT",
        )
    if kind != "path" or _is_tracked(place, root):
        return
    wanted = "a folder with *.safetensors or a *.gguf file, or such a file itself"
    if not place.exists():
        raise UserError(
            f"the base {model} does not exist" + ("" if Path(model).is_absolute() else f" in {root}"),
            remedy=f"wanted: {wanted}; a relative path counts from the repository's root, and a hub's model "
            "is org/name@COMMIT",
        )
    files = [place] if place.is_file() else list(place.iterdir())
    if not any(file.suffix in (".gguf", ".safetensors") for file in files if file.is_file()):
        raise UserError(f"the base {model} holds no weights", remedy=f"wanted: {wanted}")


def _is_tracked(place: Path, root: Path) -> bool:
    """Tell whether DVC tracks the path, a folder above it within `root`, or files in it."""
    above = [path for path in (place, *place.parents) if path.is_relative_to(root) and path != root]
    return any(path.with_name(f"{path.name}.dvc").is_file() for path in above) or any(place.glob("*.dvc"))


def write_params(path: Path, answers: Answers, *, force: bool = False) -> str:
    """Write params.yaml and return its text.

    Raises ConfigError if params.yaml cannot hold an answer, and UserError if the base is not on this machine
    where it is said to be, or the file was changed and `force` is false; in all cases nothing is written.
    """
    check_base(answers.base, path.parent)
    fresh = render_params(Config(), SURVEYED)
    changed = YAML(typ="safe").load(edit_params("", changes_for(answers)))
    text = render_params(parse_config(changed, path), SURVEYED)  # not edited, so that comments stay in line
    if not force and path.exists() and path.read_text(encoding="utf-8") not in (fresh, text):
        raise UserError(
            f"{path} was changed by hand or by an earlier `ratchet init`",
            remedy="edit it, or --force replaces it (git keeps what was committed)",
        )
    write_text(path, text)
    return text
