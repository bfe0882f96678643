"""Make a version ready to serve: put adapter, template, tokenizer and settings of one commit into one folder.

The files come from the commit that made them (git and DVC), so serving and rollback work while MLflow is
down. They are kept in `.ratchet/serving`, completely or not at all; serving from there needs no service, and
no link leads out of it, so it serves on after `dvc gc` and when the checkout is moved.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from ruamel.yaml import YAML

from ratchet.errors import BaseModelError, CheckoutError, CommandError, RatchetError, ServiceError
from ratchet.files import own_files, read_json, to_json, whole_folder, write_bytes, write_json
from ratchet.models.loading import adapter_sha256
from ratchet.models.manifests import MANIFEST, read_base_manifest, read_trained_manifest
from ratchet.pipeline.checkout import git
from ratchet.pipeline.integrity import check_manifest
from ratchet.pipeline.workspace import require_output
from ratchet.storage.database import find_database
from ratchet.storage.documents import list_documents, remove_document, write_document

if TYPE_CHECKING:
    from ratchet.config.params import Config

SERVING = Path(".ratchet/serving")
STATE = SERVING / "state.json"
GATEWAYS = SERVING / "gateways"  # in the shared database
SAY_SECONDS, SILENT_SECONDS = 30.0, 120.0  # how often a gateway says how it is; after which it is gone
CARD = "serving.json"
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
OLD_LENGTH = 128  # tokens: the default of older releases, whose versions do not record their longest row
YOUNG_SECONDS = 600.0  # folders younger than this are not removed
FOLDER = re.compile(r"v(\d+)-[0-9a-f]+")
FETCHED_AGAIN = "remove it: it is fetched again, from DVC's cache or the hub"
log = logging.getLogger("ratchet.serving")


class Generation(NamedTuple):
    """The settings for what a client leaves open, the same as in the evaluation."""

    max_new_tokens: int
    temperature: float = 0.0


class Bundle(NamedTuple):
    """Everything that an engine needs to serve a version."""

    name: str
    version: int
    adapter: Path  # a PEFT folder, or a whole model's, with the tokenizer, its template and manifest.json
    base: Path
    max_length: int  # tokens of a prompt and its answer together, at most
    generation: Generation


class Card(msgspec.Struct, frozen=True):
    """The content of serving.json, for one version; `base` is a folder's name, lengths are in tokens."""

    commit: str
    base: str
    max_new_tokens: int
    max_length: int


class ServingState(msgspec.Struct, frozen=True):
    """The state that the gateway writes; `refused` maps "v3" to the reason, times are seconds since 1970."""

    champion: int | None = None
    challenger: int | None = None
    share: float = 0.0
    rollout: str = ""
    loaded: list[int] = []
    refused: dict[str, str] = {}
    refused_since: dict[str, float] = {}
    at: float = 0.0


def bundle_candidate(candidate: Path, base: Path, config: Config) -> Bundle:
    """Return a bundle of a candidate that was just trained, under the number 1."""
    length = read_base_manifest(base).context or read_trained_manifest(candidate).max_length or OLD_LENGTH
    settings = Generation(config.evaluate.max_new_tokens)
    return Bundle(config.project.name, 1, candidate, base, length, settings)


def make_bundle(root: Path, *, name: str, version: int, commit: str, adapter_sha256: str) -> Bundle:
    """Return the version's bundle; fetch its files if they are not there yet, or are damaged.

    The adapter and the base are read whole and hashed at each call. Raises CheckoutError: the commit or its
    files cannot be read; DamagedError: nor is there a good copy in DVC's cache; BaseModelError: the files are
    not those of the ledger.
    """
    folder = root / SERVING / f"v{version}-{adapter_sha256[:12]}"
    if not _is_whole(root, folder, adapter_sha256):
        _fetch_commit(root, commit)
        base = _fetch_base(root, commit)
        with whole_folder(folder) as filling:
            require_output(root, commit, "models/candidate", filling / "adapter")
            check_adapter(filling / "adapter", adapter_sha256)
            card = _read_settings(root, commit, base.name, filling / "adapter")
            write_json(filling / CARD, msgspec.to_builtins(card))
    bundle = _read_bundle(root, folder, name, version)
    own_files(bundle.adapter)  # DVC's cache may have given links, in earlier releases as well
    own_files(bundle.base)
    return bundle


def check_adapter(folder: Path, sha256: str) -> None:
    """Raise BaseModelError for pickled files, custom code, or bytes other than the ledger's.

    Raises DamagedError for files that are not those of the version's manifest.
    """
    check_harmless(folder)
    if (seen := adapter_sha256(folder)) != sha256:
        raise BaseModelError(
            f"the adapter has sha256 {seen[:12]}…, the ledger says {sha256[:12]}…",
            remedy="dvc pull; if it stays so, the cache is damaged",
        )
    check_manifest(folder, FETCHED_AGAIN)


def check_harmless(folder: Path) -> None:
    """Raise BaseModelError for pickled files and for custom code."""
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
    """Remove the versions that are not in `keep`, half-made folders, and bases that no kept version needs.

    Folders younger than `older_than` seconds stay: a process may be about to use them.
    """
    folders = {
        path: int(named[1]) for path in (root / SERVING).glob("v*") if (named := FOLDER.fullmatch(path.name))
    }
    needed = {
        _read_card(path).base
        for path, version in folders.items()
        if version in keep and (path / CARD).exists()
    }
    forgotten = [path for path, version in folders.items() if version not in keep]
    forgotten += [path for path in (root / SERVING / "bases").glob("*") if path.name not in needed]
    for path in [*forgotten, *(root / SERVING).glob(".v*.tmp")]:
        if time.time() - path.stat().st_mtime >= older_than:
            shutil.rmtree(path, ignore_errors=True)


def read_state(root: Path) -> ServingState | None:
    """Return what the gateway last wrote about itself, or None before its first start."""
    path = root / STATE
    return msgspec.json.decode(path.read_bytes(), type=ServingState) if path.exists() else None


def read_states(root: Path) -> list[ServingState]:
    """Return what the gateways wrote about themselves: this checkout's, or all that share its database."""
    if find_database(root) is None:
        return [state for state in [read_state(root)] if state]
    since = time.time() - SILENT_SECONDS
    states = [
        msgspec.json.decode(content, type=ServingState) for content in list_documents(root, GATEWAYS).values()
    ]
    return [state for state in states if state.at >= since]


def write_state(root: Path, state: ServingState, gateway: str = "") -> None:
    """Write what a gateway says about itself; `gateway` is its name in the shared database.

    Raises ServiceError.
    """
    content = to_json(msgspec.to_builtins(state))
    write_bytes(root / STATE, [content])
    if gateway and find_database(root) is not None:
        write_document(root, GATEWAYS / f"{gateway}.json", content)


def drop_state(root: Path, gateway: str) -> None:
    """Tell those who share the database that a gateway ended; while that is down it goes by the clock."""
    with suppress(ServiceError):
        if find_database(root) is not None:
            remove_document(root, GATEWAYS / f"{gateway}.json")


def base_hash(root: Path, commit: str) -> str | None:
    """Return DVC's hash of models/base at a commit, or None."""
    lock = YAML(typ="safe").load(git(root, "show", f"{commit}:dvc.lock"))
    outs = lock["stages"].get("base", {}).get("outs", [])
    return next((out["md5"] for out in outs if out["path"] == "models/base"), None)


def _is_whole(root: Path, folder: Path, sha256: str) -> bool:
    """Return whether the version and its base are both there with the bytes that were fetched.

    A user may have removed one, and a damaged one is fetched again.
    """
    if not (folder / CARD).exists():
        return False
    base = root / SERVING / "bases" / _read_card(folder).base
    return _is_good(folder, lambda: check_adapter(folder / "adapter", sha256)) and _is_good_base(base)


def _is_good_base(base: Path) -> bool:
    return (base / MANIFEST).exists() and _is_good(base, lambda: check_manifest(base, FETCHED_AGAIN))


def _is_good(folder: Path, check: Callable[[], None]) -> bool:
    try:
        check()
    except (RatchetError, OSError) as error:  # such as a link to a file that is gone
        log.warning("%s is fetched again: %s", folder.name, " ".join(str(error).split()))
        return False
    return True


def _read_card(folder: Path) -> Card:
    try:
        return msgspec.convert(read_json(folder / CARD), Card)
    except msgspec.ValidationError as error:
        raise BaseModelError(
            f"{folder / CARD} cannot be read: {error}",
            remedy="remove .ratchet/serving; it is fetched again",
        ) from None


def _read_bundle(root: Path, folder: Path, name: str, version: int) -> Bundle:
    card = _read_card(folder)
    base = root / SERVING / "bases" / card.base
    length = read_base_manifest(base).context or card.max_length
    return Bundle(name, version, folder / "adapter", base, length, Generation(card.max_new_tokens))


def _fetch_commit(root: Path, commit: str) -> None:
    """Fetch from the clone's origin if the commit is not here yet, as where another machine promotes."""
    try:
        git(root, "cat-file", "-e", f"{commit}^{{commit}}")
    except CommandError:
        with suppress(CommandError):  # reading the commit says what is missing
            git(root, "fetch", "--quiet", "origin")


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
    if not _is_good_base(base):
        with whole_folder(base) as filling:
            filling.rmdir()  # `dvc get` would put its output inside a folder that exists
            require_output(root, commit, "models/base", filling)
            check_harmless(filling)
            check_manifest(filling, FETCHED_AGAIN)  # weights in the hub's cache did not come with it
    return base


def _read_settings(root: Path, commit: str, base: str, adapter: Path) -> Card:
    """Read the settings from the commit's params.yaml, and the longest row from the adapter's manifest.

    Unknown keys are ignored, so that older versions can be served after keys were renamed.
    """
    from ratchet.config.params import Config

    defaults = Config()
    trained = read_trained_manifest(adapter).max_length if (adapter / MANIFEST).exists() else None
    params = YAML(typ="safe").load(git(root, "show", f"{commit}:params.yaml")) or {}
    evaluate, tokenize = params.get("evaluate") or {}, params.get("tokenize") or {}
    return Card(
        commit,
        base,
        max_new_tokens=int(evaluate.get("max_new_tokens", defaults.evaluate.max_new_tokens)),
        max_length=trained or int(tokenize.get("max_length", OLD_LENGTH)),
    )
