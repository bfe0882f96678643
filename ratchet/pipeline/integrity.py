"""Compare bytes with the hashes that DVC and the manifests hold for them, before anything is made of them.

DVC hashes a file when it is stored and trusts it afterwards, as long as its time, its size or its mode 0444
stay. A bit that flips on the disk changes none of these, so it is found by reading alone: no result is
remembered, and every start of a stage and every load of a version reads its inputs once.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ruamel.yaml import YAML

from ratchet.errors import DamagedError

MANIFEST, PROFILE = "manifest.json", "profile.json"
THREADS = 4  # hashing releases Python's lock; more than this read no faster from one disk
SHOWN = 3  # damaged files named in a message
GONE = "not there"
AGAIN = (
    "`dvc pull` brings a remote's copy, and without a remote the stage that made it makes it again. Rows and "
    "other data that no stage makes come back from a remote or a backup only"
)

Hashes = dict[str, str]  # name of a file, relative to the folder ("" for a file itself) → "md5:…", "sha256:…"
Read = Callable[[str], str | None]  # name of a file of the repository → its text, or None


class Damage(NamedTuple):
    """A file whose bytes are not those that were stored: hashes as `algorithm:digest`, or GONE."""

    path: Path
    seen: str
    wanted: str


def check_inputs(repository: Path, names: list[str]) -> None:
    """Check outputs of DVC in the working tree, given relative to it, and folders with a manifest.

    A path that neither DVC nor a manifest describes is passed over. Raises DamagedError.
    """
    read = _reader(repository)
    for name in names:
        path = repository / name
        hashes = tracked_hashes(repository, Path(os.path.normpath(name)), read) or {}
        found = find_damage(path, hashes | manifest_hashes(path)) if path.exists() else []
        if found:
            raise DamagedError(_tell(found), remedy=_remedy(repository, found, hashes, path))


def check_manifest(folder: Path, remedy: str) -> None:
    """Check a folder's files against the sha256 in its own manifest. Raises DamagedError."""
    check_files(folder, manifest_hashes(folder), remedy)


def is_whole(folder: Path) -> bool:
    """Return whether a folder has a manifest, which is written last, and its files have those bytes."""
    return (folder / MANIFEST).exists() and not find_damage(folder, manifest_hashes(folder))


def check_files(folder: Path, hashes: Mapping[str, str], remedy: str) -> None:
    """Check a folder's files. Raises DamagedError."""
    if found := find_damage(folder, hashes):
        raise DamagedError(_tell(found), remedy=remedy)


def check_fetched(repository: Path, path: str, out: Path, read: Read) -> None:
    """Check what was fetched to `out` as `path` of the commit whose dvc.lock and .dvc files `read` returns.

    Raises DamagedError.
    """
    hashes = tracked_hashes(repository, Path(path), read) or {}
    if found := find_damage(out, hashes):
        raise DamagedError(_tell(found), remedy=_remedy(repository, found, hashes, out))


def find_damage(folder: Path, hashes: Mapping[str, str]) -> list[Damage]:
    """Read all the files once, in threads, and return those that are not as `hashes` says, by name."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        seen = pool.map(lambda item: _hash(folder / item[0], item[1].partition(":")[0]), hashes.items())
        pairs = list(zip(hashes.items(), seen, strict=True))
    return sorted(Damage(folder / name, found, wanted) for (name, wanted), found in pairs if found != wanted)


def manifest_hashes(folder: Path) -> Hashes:
    """Return the sha256 that a folder keeps of its own files: a base's, a version's, packed tokens'.

    The weights of a base from the hub are in the hub's cache, so their names are absolute.
    """
    manifest = _read_object(folder / MANIFEST)
    files = manifest.get("files")
    windows = _read_object(folder / PROFILE).get("sha256")
    return {
        **({name: f"sha256:{digest}" for name, digest in files.items()} if isinstance(files, dict) else {}),
        **(
            {f"{split}.arrow": f"sha256:{digest}" for split, digest in windows.items()}
            if isinstance(windows, dict)
            else {}
        ),
        **_hub_hashes(manifest),
    }


def _hub_hashes(manifest: dict[str, object]) -> Hashes:
    model, revision, weights = (manifest.get(key) for key in ("model", "revision", "weights"))
    if not (isinstance(model, str) and isinstance(revision, str) and isinstance(weights, dict)):
        return {}
    from huggingface_hub import try_to_load_from_cache

    found = {name: try_to_load_from_cache(model, name, revision=revision) for name in weights}
    return {path: f"sha256:{weights[name]}" for name, path in found.items() if isinstance(path, str)}


def tracked_hashes(repository: Path, path: Path, read: Read) -> Hashes | None:
    """Return the md5 of each file of `path` as DVC tracks it; None if it does not, or keeps no list here."""
    for whole in (path, *path.parents):
        if digest := _digest(whole, read):
            break
    else:
        return None
    if not digest.endswith(".dir"):
        return {"": f"md5:{digest}"}
    listing = object_path(repository, digest)
    if not listing.exists():  # another machine's data, which DVC verifies while it pulls them
        return None
    content = listing.read_bytes()
    if (seen := hashlib.md5(content, usedforsecurity=False).hexdigest()) != digest.removesuffix(".dir"):
        raise DamagedError(
            _tell([Damage(listing, f"md5:{seen}", f"md5:{digest.removesuffix('.dir')}")]),
            remedy=_replace(listing),
        )
    inside = path.relative_to(whole)
    return {
        str(name.relative_to(inside)) if name != inside else "": f"md5:{entry['md5']}"
        for entry in json.loads(content)
        if (name := Path(entry["relpath"])).is_relative_to(inside)
    }


def object_path(repository: Path, digest: str) -> Path:
    """Return where DVC's cache keeps the object with this md5 (`….dir` for a folder's list of files)."""
    return cache_folder(repository) / "files" / "md5" / digest[:2] / digest[2:]


def cache_folder(repository: Path) -> Path:
    """Return DVC's cache of a repository; its local configuration overrides the committed one."""
    known = [
        config.get("cache", "dir")
        for name in ("config.local", "config")
        if (config := read_dvc_config(repository, name)).has_option("cache", "dir")
    ]
    return (repository / ".dvc" / (known[0].strip("\"'") if known else "cache")).resolve()


def read_dvc_config(repository: Path, name: str) -> configparser.ConfigParser:
    config = configparser.ConfigParser(interpolation=None)
    config.read(repository / ".dvc" / name, encoding="utf-8")
    return config


def _reader(repository: Path) -> Read:
    def read(name: str) -> str | None:
        path = repository / name
        return path.read_text(encoding="utf-8") if path.is_file() else None

    return read


def _digest(path: Path, read: Read) -> str | None:
    """Return DVC's md5 of an output: from its .dvc file, or from the stage that made it."""
    if path == Path() or path.is_absolute():
        return None
    parsed = YAML(typ="safe").load(read(f"{path}.dvc") or "") or {}
    outs = [{**out, "path": str(path)} for out in parsed.get("outs", [])]
    if not outs:
        stages = (YAML(typ="safe").load(read("dvc.lock") or "") or {}).get("stages", {})
        outs = [out for stage in stages.values() for out in stage.get("outs", [])]
    return next((out.get("md5") for out in outs if out.get("path") == str(path)), None)


def _hash(path: Path, algorithm: str) -> str:
    try:
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, lambda: hashlib.new(algorithm, usedforsecurity=False))
    except OSError:  # missing, a broken link, or a sector that cannot be read
        return GONE
    return f"{algorithm}:{digest.hexdigest()}"


def _read_object(path: Path) -> dict[str, object]:
    """Return a JSON object, empty where there is none; a damaged one is found by its own hash."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _tell(found: list[Damage]) -> str:
    named = [f"{one.path}: {one.seen[:19]}…, wanted {one.wanted[:19]}…" for one in found[:SHOWN]]
    named += [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    count = f"{len(found)} files" if len(found) > 1 else "a file"
    return f"the bytes of {count} are not those that were stored: {'; '.join(named)}"


def _remedy(repository: Path, found: list[Damage], hashes: Hashes, folder: Path) -> str:
    """Say which copy is the damaged one: the cache's, the hub's, or only the one here."""
    if outside := [one.path.resolve() for one in found if not one.path.is_relative_to(folder)]:
        files = " ".join(map(str, outside))
        return f"rm -f {files} (in the hub's cache), then dvc repro --force --single-item base"
    damaged, absent = [], False
    for one in found:
        name = str(one.path.relative_to(folder)) if one.path != folder else ""
        algorithm, _, digest = hashes.get(name, "").partition(":")
        stored = object_path(repository, digest)
        if not digest or not stored.exists():
            absent = True
        elif _hash(stored, algorithm) != hashes[name]:
            damaged.append(stored)
    if damaged:
        return _replace(*damaged)
    here = f"rm -f {' '.join(str(one.path) for one in found[:SHOWN])}"
    if absent:
        return f"{here}; DVC's cache holds no other copy: {AGAIN}"
    return f"DVC's cache holds good ones: {here}; dvc checkout. If you changed them on purpose: dvc commit"


def _replace(*objects: Path) -> str:
    return f"rm -f {' '.join(map(str, objects))} (the damaged copy in DVC's cache), then run again: {AGAIN}"
