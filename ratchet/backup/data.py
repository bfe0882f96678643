"""Find the data that any commit names, in DVC's cache and in its remote.

`dvc push --all-commits` says "up to date" without versions from before the remote was added: for each commit
it reads that commit's own `.dvc/config`. So the remote is asked here for every object by its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ratchet.backup.archive import Remote
from ratchet.errors import ServiceError
from ratchet.pipeline.checkout import git
from ratchet.pipeline.dvc import configured_remote
from ratchet.pipeline.integrity import object_path, read_dvc_config
from ratchet.tracking.mlflow import PASSWORD

USER_PASSWORD = re.compile(r"//([^/@:\s]*):[^/@\s]*@")
LOCK, STAGES = "dvc.lock", "dvc.yaml"


class Output(NamedTuple):
    """A file or folder that a commit names; `digest` is DVC's md5, `….dir` for a folder."""

    path: str
    digest: str


class History(NamedTuple):
    """What all commits of all branches and tags name."""

    outputs: dict[str, list[Output]]  # of each dvc.lock and .dvc file, by git's id of its content
    elsewhere: set[str]  # paths that git keeps, or that no cache does


class Store:
    """DVC's remote, asked for objects by name."""

    def __init__(self, root: Path, name: str) -> None:
        """Open the remote. Raises ServiceError."""
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        self._name, self._faults = name, (DvcException, OSError)
        try:
            with Repo(str(root)) as repository:
                self._objects: Any = repository.cloud.get_remote_odb(name)
        except self._faults as error:
            raise self._fault(error) from None

    def held(self, digests: Iterable[str]) -> set[str]:
        """Return those that the remote holds. Raises ServiceError."""
        try:
            return set(self._objects.oids_exist(list(digests)))
        except self._faults as error:
            raise self._fault(error) from None

    def read(self, digest: str) -> bytes:
        """Return an object's content, empty where there is none. Raises ServiceError."""
        try:
            return bytes(self._objects.fs.cat_file(self._objects.oid_to_path(digest)))
        except FileNotFoundError:
            return b""
        except self._faults as error:
            raise self._fault(error) from None

    def _fault(self, error: BaseException) -> ServiceError:
        told = PASSWORD.sub("//", " ".join(str(error).split()))[:300]
        return ServiceError(
            f"DVC's remote {self._name!r} cannot be asked: {told}", remedy="dvc remote list; dvc push"
        )


def read_history(root: Path) -> History:
    """Read every version of dvc.lock, dvc.yaml and the .dvc files that git holds. Raises CommandError."""
    listed = [line.partition(" ") for line in git(root, "rev-list", "--objects", "--all").splitlines()]
    outputs, elsewhere = {}, {path for _, _, path in listed if path}
    for blob, _, path in listed:
        if Path(path).name == STAGES:
            elsewhere |= set(_uncached(_parse(git(root, "cat-file", "blob", blob))))
        elif Path(path).name == LOCK or Path(path).suffix == ".dvc":
            outputs[blob] = list(_outputs(Path(path), _parse(git(root, "cat-file", "blob", blob))))
    return History(outputs, elsewhere)


def outputs_at(root: Path, history: History, commit: str) -> list[Output]:
    """Return what one commit names."""
    blobs = [line.split()[2] for line in git(root, "ls-tree", "-r", commit).splitlines()]
    return [output for blob in blobs for output in history.outputs.get(blob, [])]


def objects_of(root: Path, output: Output, store: Store | None) -> set[str]:
    """Return the names of the objects that an output consists of; a folder's list of files is one of them.

    Raises ServiceError.
    """
    if not output.digest.endswith(".dir"):
        return {output.digest}
    listing = object_path(root, output.digest)
    content = listing.read_bytes() if listing.exists() else store.read(output.digest) if store else b""
    files = json.loads(content) if content else []
    return {output.digest, *(entry["md5"] for entry in files)}


def find_remote(root: Path) -> Remote | None:
    """Return DVC's default remote; a relative path is made absolute, and a password is removed."""
    name = configured_remote(root)
    if name is None:
        return None
    section = f"'remote \"{name}\"'"
    known = (
        read_dvc_config(root, config).get(section, "url", fallback="")
        for config in ("config.local", "config")
    )
    url = next(filter(None, known), "").strip("\"'")
    if url and "://" not in url and not url.startswith(("/", "~")):
        url = str((root / ".dvc" / url).resolve())
    return Remote(name, without_password(url))


def without_password(url: str) -> str:
    """Return a URL without what lets one in: in https a name alone may be a token, in ssh it is none."""
    if url.startswith("ssh://"):
        return USER_PASSWORD.sub(r"//\1@", url)
    return PASSWORD.sub("//", url)


def _parse(text: str) -> dict[str, Any]:
    try:
        found = YAML(typ="safe").load(text)
    except YAMLError:  # no run has ever read it either
        return {}
    return found if isinstance(found, dict) else {}


def _outputs(path: Path, parsed: dict[str, Any]) -> Iterator[Output]:
    if path.name == LOCK:
        outs = [out for stage in (parsed.get("stages") or {}).values() for out in stage.get("outs", [])]
    else:
        outs = parsed.get("outs") or []
    for out in outs:
        if isinstance(out.get("md5"), str):
            yield Output((path.parent / out["path"]).as_posix(), out["md5"])


def _uncached(parsed: dict[str, Any]) -> Iterator[str]:
    for stage in (parsed.get("stages") or {}).values():
        for out in [*stage.get("outs", []), *stage.get("metrics", [])]:
            if isinstance(out, dict):
                yield from (path for path, how in out.items() if how and how.get("cache") is False)
