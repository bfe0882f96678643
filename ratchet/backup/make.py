"""Make a backup: git with all its branches and tags, the data that history names, and `.ratchet`.

Git is packed first and the registry last, so that the registry knows every version that git names. Services
run on meanwhile.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from ratchet.backup.archive import Manifest, Packer, Remote, packing
from ratchet.backup.data import (
    History,
    Output,
    Store,
    find_remote,
    objects_of,
    outputs_at,
    read_history,
    without_password,
)
from ratchet.backup.state import pack_state, secrets_of
from ratchet.config.params import Config
from ratchet.errors import CheckoutError, CommandError, ServiceError
from ratchet.models.manifests import read_base_manifest
from ratchet.monitoring.request_log import URL_VARIABLE as LOG_URL
from ratchet.pipeline.checkout import Say, git, locked
from ratchet.pipeline.integrity import manifest_hashes, object_path
from ratchet.promotion.champion import read_champion, read_ledger
from ratchet.storage.database import find_database

GIT = "git/repository.bundle"
DATA = "data"  # a folder as `.dvc/cache/files/md5`


class Stored(NamedTuple):
    """Where the objects are that history names."""

    here: set[str]
    remote: set[str]
    lost: dict[str, set[str]]  # objects that are nowhere → the outputs that need them


def back_up(root: Path, config: Config, file: Path, say: Say, *, whole: bool = False) -> Manifest:
    """Write a backup of the project at `root` to a new `file`. Return what is in it.

    Data that DVC's remote holds stay out, unless `whole`. Raises UserError: the file exists, the history is
    cut off, or the checkout is on no branch; DamagedError: data or a database are not as they were stored;
    DiskSpaceError.
    """
    branch = _require_history(root)
    with packing(file) as packer:
        with locked(root, "land"):  # no commit comes between the bundle and what is read of it
            git(root, "bundle", "create", "--quiet", str(packer.scratch / "bundle"), "--all")
            history, commit = read_history(root), git(root, "rev-parse", "HEAD").strip()
            ledger, champion = read_ledger(root), read_champion(root)
        packer.add(packer.scratch / "bundle", GIT)
        remote = find_remote(root)
        stored = _look_up(root, history, remote, say)
        away = set() if whole else stored.remote
        _pack_data(root, packer, stored.here - away)
        pack_state(root, packer)
        only_there = stored.remote - stored.here if whole else stored.remote
        missing = _tell_missing(root, history, stored, {f"v{one.version}": one.commit for _, one in ledger})
        manifest = packer.finish(
            Manifest(
                config.project.name,
                f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
                branch,
                commit,
                sorted({entry.version for _, entry in ledger}),
                champion.version if champion else None,
                _git_remotes(root),
                remote if only_there else None,
                [*_left_out(root, config), *_in_remote(remote, only_there)],
                missing,
            )
        )
    return manifest


def _require_history(root: Path) -> str:
    """Return the branch. Raises CheckoutError: none, or a history that is cut off."""
    try:
        branch = git(root, "symbolic-ref", "--short", "HEAD").strip()
        cut = git(root, "rev-parse", "--is-shallow-repository").strip() == "true"
        git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    except CommandError:
        raise CheckoutError(
            f"{root} is no git repository, is on no branch, or has no commit yet",
            remedy="git switch main, or commit once",
        ) from None
    if cut:
        raise CheckoutError(
            f"the history of {root} is cut off, so older versions would be lost",
            remedy="git fetch --unshallow, then run again",
        )
    return branch


def _look_up(root: Path, history: History, remote: Remote | None, say: Say) -> Stored:
    """Look for every object in the cache and in the remote; one that does not answer holds nothing."""
    store, needed = None, dict[str, set[str]]()
    try:
        store = Store(root, remote.name) if remote else None
        needed = _needed(root, history, store)
        held = store.held(needed) if store else set()
    except ServiceError as error:
        say(f"{error}\n  all data that are on this machine are packed")
        needed, held = _needed(root, history, None), set()
    here = {digest for digest in needed if object_path(root, digest).exists()}
    lost = {digest: paths for digest, paths in needed.items() if digest not in here | held}
    return Stored(here, held, lost)


def _needed(root: Path, history: History, store: Store | None) -> dict[str, set[str]]:
    found = dict[str, set[str]]()
    for output in {output for outputs in history.outputs.values() for output in outputs}:
        for digest in objects_of(root, output, store):
            found.setdefault(digest, set()).add(output.path)
    return {
        digest: paths
        for digest, paths in found.items()
        if paths - history.elsewhere or object_path(root, digest).exists()
    }


def _pack_data(root: Path, packer: Packer, digests: set[str]) -> None:
    for digest in sorted(digests):
        name = f"{DATA}/{digest[:2]}/{digest[2:]}"
        packer.add(object_path(root, digest), name, md5=digest.removesuffix(".dir"))


def _tell_missing(root: Path, history: History, stored: Stored, versions: dict[str, str]) -> list[str]:
    """Say which versions cannot be restored whole, and then what else is lost."""
    if not stored.lost:
        return []
    lost_paths = {path for paths in stored.lost.values() for path in paths} - history.elsewhere
    told = []
    for name, commit in {"HEAD": "HEAD", **versions}.items():
        paths = _lost_at(root, history, stored, outputs_at(root, history, commit))
        told += [f"{name}: {', '.join(sorted(paths))}"] if paths else []
    return [*told, f"{len(stored.lost)} objects of all commits ({', '.join(sorted(lost_paths))})"]


def _lost_at(root: Path, history: History, stored: Stored, outputs: list[Output]) -> set[str]:
    return {
        output.path
        for output in outputs
        if output.path not in history.elsewhere and objects_of(root, output, None) & stored.lost.keys()
    }


def _git_remotes(root: Path) -> dict[str, str]:
    names = git(root, "remote").split()
    urls = {name: git(root, "remote", "get-url", name).strip() for name in names}
    return {name: without_password(url) for name, url in urls.items()}


def _left_out(root: Path, config: Config) -> list[str]:
    """Say what a person has to keep apart."""
    told = [f"{name}: a secret, keep it apart" for name in secrets_of(root)]
    if changed := git(root, "status", "--porcelain").splitlines():
        named = ", ".join(line[3:] for line in changed[:5]) + (" …" if len(changed) > 5 else "")
        told.append(f"changes that are in no commit: {named}")
    if (root / ".dvc/config.local").exists():
        told.append(".dvc/config.local: this machine's settings of DVC, with the remote's passwords")
    if find_database(root) is not None:
        told.append("the database of storage.url: pg_dump")
    if os.environ.get(LOG_URL) or config.request_log.url:
        told.append("the database of request_log.url: pg_dump")
    if os.environ.get("MLFLOW_TRACKING_URI"):
        told.append("MLflow at MLFLOW_TRACKING_URI: its database and artifacts")
    base = root / "models/base"
    if any(Path(name).is_absolute() for name in manifest_hashes(base)):
        told.append(f"the base's weights, {read_base_manifest(base).told}: the hub's cache has them")
    return told


def _in_remote(remote: Remote | None, digests: set[str]) -> list[str]:
    if not remote or not digests:
        return []
    return [f"{len(digests)} objects that DVC's remote {remote.name!r} holds, at {remote.url}"]
