"""Find the version to export: its files as they are served, and its test rows, all from its own commit."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ratchet.data.examples import Example, read_examples
from ratchet.errors import RatchetError, UserError
from ratchet.files import read_json
from ratchet.media.store import FOLDER as MEDIA
from ratchet.media.store import MediaStore
from ratchet.pipeline.checkout import git
from ratchet.pipeline.workspace import require_output
from ratchet.promotion.champion import last_entry, read_champion
from ratchet.promotion.verdict import Verdict, decode_verdict
from ratchet.serving.bundle import Bundle, make_bundle


class Source(NamedTuple):
    """A version with its test rows and its reports."""

    label: str  # "v3" or "candidate"
    commit: str
    bundle: Bundle
    rows: list[Example]  # its test split
    metrics: Any  # the JSON of reports/evaluation/metrics.json
    decision: Verdict
    media: Mapping[str, bytes] = MappingProxyType({})  # the rows' pictures by name


def find_source(root: Path, name: str, which: str) -> Source:
    """Return the version that `which` names: `candidate` (of the newest commit), `champion`, or `vN`.

    Raises UserError: there is none; CheckoutError: its files cannot be read.
    """
    label, commit, sha256 = _find(root, name, which)
    version = int(label[1:]) if label != "candidate" else 0
    bundle = make_bundle(root, name=name, version=version, commit=commit, adapter_sha256=sha256)
    with tempfile.TemporaryDirectory() as scratch:
        for path in ("data/prepared/test.jsonl", "reports/evaluation/metrics.json"):
            require_output(root, commit, path, Path(scratch) / Path(path).name)
        rows = list(read_examples(Path(scratch) / "test.jsonl"))
        metrics = read_json(Path(scratch) / "metrics.json")
        media: dict[str, bytes] = {}
        if names := {name for row in rows for name in row.media}:
            require_output(root, commit, f"data/prepared/{MEDIA}", Path(scratch) / MEDIA)
            store = MediaStore.read(Path(scratch) / MEDIA)
            media = {name: store[name] for name in names}
    decision = decode_verdict(json.loads(git(root, "show", f"{commit}:reports/gate.json")))
    return Source(label, commit, bundle, rows, metrics, decision, media)


def _find(root: Path, name: str, which: str) -> tuple[str, str, str]:
    """Return (label, commit, sha256 of the weights)."""
    if which == "candidate":
        try:
            raw = git(root, "show", "HEAD:reports/gate.json")
        except RatchetError:
            raise UserError("there is no candidate yet", remedy="`ratchet retrain` makes one") from None
        commit = git(root, "rev-parse", "HEAD").strip()
        return "candidate", commit, decode_verdict(json.loads(raw)).candidate.adapter_sha256
    if which == "champion":
        champion = read_champion(root)
        if champion is None:
            raise UserError(
                "there is no champion yet",
                remedy="`ratchet retrain` makes a candidate, which `ratchet export candidate` takes",
            )
        return f"v{champion.version}", champion.commit, champion.adapter_sha256
    numbered = re.fullmatch(r"v?([1-9]\d*)", which)
    if not numbered:
        raise UserError(
            f"{which!r} is no version", remedy="wanted `champion`, `candidate` or a number, such as v3"
        )
    return _numbered(root, name, int(numbered[1]))


def _numbered(root: Path, name: str, number: int) -> tuple[str, str, str]:
    """Look a version up in the ledger, which needs no service, then in MLflow: most were never promoted."""
    if entry := last_entry(root, number):
        return f"v{number}", entry.commit, entry.adapter_sha256
    from ratchet.promotion.gate_tags import read_tags
    from ratchet.tracking.registry import get_version

    version = get_version(name, number)
    if version is None:
        raise UserError(f"{name} has no v{number}", remedy="`ratchet status` shows the versions")
    read_tags(version)  # raises when one of the two is missing
    return f"v{number}", version.tags["git_commit"], version.tags["adapter_sha256"]
