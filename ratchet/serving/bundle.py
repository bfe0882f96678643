"""A version made ready to serve: adapter, template, tokenizer, base and generation settings of one commit, in one folder.

Fetched from the commit that made it (git and DVC), so that serving and rollback work with MLflow down. Kept in
`.ratchet/serving`, whole or not at all; what is there is served without asking anybody.
"""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from ratchet.errors import BaseModelError, CheckoutError, RatchetError
from ratchet.files import read_json, whole_folder, write_json
from ratchet.models.loading import adapter_sha256
from ratchet.pipeline.checkout import git
from ratchet.pipeline.workspace import require_output

SERVING = Path(".ratchet/serving")
STATE = SERVING / "state.json"
CARD = "serving.json"
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
YOUNG_SECONDS = 600.0
FOLDER = re.compile(r"v(\d+)-[0-9a-f]+")


class Generation(NamedTuple):
    """How a version answers when the client does not say: the settings under which it was evaluated."""

    max_new_tokens: int
    temperature: float = 0.0


class Bundle(NamedTuple):
    name: str
    version: int
    adapter: Path  # a PEFT folder, or a whole model's, with the tokenizer, its template and manifest.json
    base: Path
    max_length: int  # tokens of a prompt and its answer together, at most
    generation: Generation


def make_bundle(root: Path, *, name: str, version: int, commit: str, adapter_sha256: str) -> Bundle:
    """What is there already is returned at once. Raises CheckoutError: the commit or its files cannot be had; BaseModelError: they are not what the ledger says."""
    folder = root / SERVING / f"v{version}-{adapter_sha256[:12]}"
    if not _is_whole(root, folder):
        base = _fetch_base(root, commit)
        with whole_folder(folder) as filling:
            require_output(root, commit, "models/candidate", filling / "adapter")
            check_adapter(filling / "adapter", adapter_sha256)
            write_json(filling / CARD, {"commit": commit, "base": base.name, **_settings(root, commit)})
    return _read_bundle(root, folder, name, version)


def check_adapter(folder: Path, sha256: str) -> None:
    """Raises BaseModelError: pickled files, code of its own, other bytes than the ledger's."""
    check_harmless(folder)
    if (seen := adapter_sha256(folder)) != sha256:
        raise BaseModelError(
            f"the adapter has sha256 {seen[:12]}…, the ledger says {sha256[:12]}…",
            remedy="dvc pull; if it stays so, the cache is damaged",
        )


def check_harmless(folder: Path) -> None:
    """Raises BaseModelError: pickled files, or code of its own."""
    paths = sorted(folder.rglob("*"))
    if pickled := [path.name for path in paths if path.name.lower().endswith(PICKLED)]:
        raise BaseModelError(
            f"{folder.name} brings pickled files ({', '.join(pickled)})",
            remedy="only safetensors are loaded: unpickling runs code",
        )
    for path in paths:
        if path.suffix == ".json" and isinstance(found := read_json(path), dict) and "auto_map" in found:
            raise BaseModelError(
                f"{path.name} names code of its own (`auto_map`)",
                remedy="take it out: no code that comes with a model is run",
            )


def forget_bundles(root: Path, keep: set[int], *, older_than: float = YOUNG_SECONDS) -> None:
    """Remove all other versions, what a killed process left half, and bases that no kept version needs; younger ones may be wanted by somebody who has not said so yet."""
    folders = {
        path: int(named[1]) for path in (root / SERVING).glob("v*") if (named := FOLDER.fullmatch(path.name))
    }
    needed = {
        read_json(path / CARD)["base"]
        for path, version in folders.items()
        if version in keep and (path / CARD).exists()
    }
    forgotten = [path for path, version in folders.items() if version not in keep]
    forgotten += [path for path in (root / SERVING / "bases").glob("*") if path.name not in needed]
    for path in [*forgotten, *(root / SERVING).glob(".v*.tmp")]:
        if time.time() - path.stat().st_mtime >= older_than:
            shutil.rmtree(path, ignore_errors=True)


def read_state(root: Path) -> dict[str, Any] | None:
    """What the gateway last said of itself: {champion, challenger, share, rollout, loaded, refused: {"v3": reason}, at (seconds since 1970)}. None before its first start."""
    path = root / STATE
    return read_json(path) if path.exists() else None


def write_state(root: Path, state: dict[str, Any]) -> None:
    write_json(root / STATE, state)


def base_hash(root: Path, commit: str) -> str | None:
    """DVC's hash of models/base at a commit."""
    lock = YAML(typ="safe").load(git(root, "show", f"{commit}:dvc.lock"))
    return next(
        (
            out["md5"]
            for out in lock["stages"].get("base", {}).get("outs", [])
            if out["path"] == "models/base"
        ),
        None,
    )


def _is_whole(root: Path, folder: Path) -> bool:
    """Or somebody removed parts of it."""
    return (folder / CARD).exists() and (
        root / SERVING / "bases" / str(read_json(folder / CARD).get("base")) / "manifest.json"
    ).exists()


def _read_bundle(root: Path, folder: Path, name: str, version: int) -> Bundle:
    card = read_json(folder / CARD)
    base = root / SERVING / "bases" / card["base"]
    context = read_json(base / "manifest.json").get("context")
    return Bundle(
        name,
        version,
        folder / "adapter",
        base,
        int(context or card["max_length"]),
        Generation(card["max_new_tokens"]),
    )


def _fetch_base(root: Path, commit: str) -> Path:
    try:
        digest = base_hash(root, commit)
    except RatchetError as error:
        raise CheckoutError(
            f"the commit {commit[:8]} cannot be read: {error}",
            remedy="git fetch --unshallow, if the history is cut off",
        ) from None
    if not digest:
        raise CheckoutError(
            f"dvc.lock at {commit[:8]} has no models/base",
            remedy="only a commit of a whole retraining can be served",
        )
    base = root / SERVING / "bases" / digest.replace(".", "-")
    if not base.exists():
        with whole_folder(base) as filling:
            filling.rmdir()
            require_output(root, commit, "models/base", filling)
            check_harmless(filling)
    return base


def _settings(root: Path, commit: str) -> dict[str, Any]:
    """Of that commit's params.yaml, read loosely: an older version must stay servable when today's keys are others."""
    from ratchet.config.params import Config

    defaults = Config()
    params = YAML(typ="safe").load(git(root, "show", f"{commit}:params.yaml")) or {}
    return {
        "max_new_tokens": int(
            (params.get("evaluate") or {}).get("max_new_tokens", defaults.evaluate.max_new_tokens)
        ),
        "max_length": int((params.get("tokenize") or {}).get("max_length", defaults.tokenize.max_length)),
    }
