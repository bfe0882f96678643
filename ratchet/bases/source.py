"""Fetch the files of a base to this machine, once: from the hub, a folder, DVC or a URL.

Files from a URL stay in `.ratchet/bases` of the checkout, so that a later run works offline. No model is
loaded here. Not covered: subfolders; all files of a base are in one folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ratchet.bases.files import Source, find_weights
from ratchet.config.training import BaseConfig, BaseKind, kind_of_base
from ratchet.errors import BaseModelError, CommandError
from ratchet.files import read_json, require_space, write_json
from ratchet.pipeline.checkout import dvc
from ratchet.pipeline.dvc import configured_remote
from ratchet.pipeline.stage import say

DOWNLOADS = Path(".ratchet/bases")
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICEN[CS]E*", "COPYING*")
GGUF = ".gguf"


def find_base(config: BaseConfig, here: Path, checkout: Path) -> Source:
    """Return the base's place on this machine; fetch its files first if they are elsewhere.

    `here` is the repository in which the stage runs, `checkout` the user's, which may contain untracked
    folders; outside a workspace both are the same. Raises BaseModelError.
    """
    ways: dict[BaseKind, Callable[[], Source]] = {
        "hub": lambda: _find_on_hub(config),
        "path": lambda: _find_path(config.model, here, checkout),
        "url": lambda: _find_url(config.model, checkout),
    }
    return _only_file(ways[kind_of_base(config.model)]())


def _only_file(source: Source) -> Source:
    """Return the only GGUF file of a folder without safetensors, or the source unchanged.

    Raises BaseModelError: there are several GGUF files.
    """
    if not source.path.is_dir():
        return source
    files = sorted(source.path.glob(f"*{GGUF}"))
    if not files or any(source.path.glob("*.safetensors")):
        return source
    if len(files) > 1:
        raise BaseModelError(
            f"{source.told} holds {len(files)} GGUF files: {', '.join(path.name for path in files[:4])}",
            remedy=f"name one: `base.model: {source.told}/{files[0].name}`",
        )
    return source._replace(path=files[0])


# --- the hub ---


def _find_on_hub(config: BaseConfig) -> Source:
    name, _, file = config.model.partition(":")
    assert config.revision  # the config requires it for a hub id
    folder = _find_snapshot(name, config.revision, file)
    command = f"with network: hf download {name} {file} --revision {config.revision}".replace("  ", " ")
    told = f"{config.model}@{config.revision}"
    if file and not (folder / file).exists():
        raise BaseModelError(f"{told}: there is no {file}", remedy=command)
    return Source(folder / file if file else folder, told, command)


def _find_snapshot(name: str, revision: str, file: str) -> Path:
    """Return the folder of a hub revision: from the cache if it is complete there, else downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    settings: dict[str, Any] = {
        "repo_id": name,
        "revision": revision,
        "allow_patterns": [file] if file else list(WANTED),
    }
    cached = None
    with contextlib.suppress(LocalEntryNotFoundError):
        cached = Path(snapshot_download(**settings, local_files_only=True))
        weights, missing = ([cached / file], []) if file else find_weights(cached)
        if weights and not missing and weights[0].exists():
            return cached
    try:
        return Path(snapshot_download(**settings))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        if cached:
            return cached
        cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or "~/.cache/huggingface"
        raise BaseModelError(
            f"{name}@{revision} is not in the hub's cache ({cache})"
            f" and cannot be fetched: {str(error).splitlines()[0]}",
            remedy=f"with network: hf download {name} --revision {revision}; a gated model needs HF_TOKEN "
            "in the environment; or set `base.model: demo`",
        ) from None


# --- a folder or a file ---


def _find_path(text: str, here: Path, checkout: Path) -> Source:
    """Search the commit that the stage works on, then DVC, then the user's checkout.

    A workspace is a clone: it contains what git and DVC track, but no untracked folders.
    """
    path = Path(text).expanduser()
    if path.is_relative_to(checkout):
        path = path.relative_to(checkout)
    tracked = not path.is_absolute() and ".." not in path.parts and _is_tracked(here, path)
    if tracked and not _is_there(here / path):
        _pull(here, path)
    places = [here / path, checkout / path] if ".." not in path.parts else [checkout / path]
    for place in sorted(places, key=lambda place: not _is_there(place)):
        if place.exists():
            remedy = f"dvc pull {path}" if tracked else "copy the model again"
            return Source(place.resolve(), text, remedy, tracked=tracked)
    raise BaseModelError(
        f"`base.model` names {text}, which does not exist"
        + ("" if path.is_absolute() else f" in {checkout}"),
        remedy="a path counts from the repository's root; a hub id is `org/name` with `base.revision`",
    )


def _is_there(path: Path) -> bool:
    """Tell whether weights exist at `path`: git may track only the small files of a folder."""
    return path.is_file() or any(
        file.exists() for pattern in ("*.safetensors", f"*{GGUF}") for file in path.glob(pattern)
    )


def _is_tracked(here: Path, path: Path) -> bool:
    """Tell whether DVC tracks the path, a folder above it, or files in it."""
    above = [path, *path.parents[:-1]]
    return any((here / place).with_name(f"{place.name}.dvc").is_file() for place in above) or any(
        (here / path).glob("*.dvc")
    )


def _pull(here: Path, path: Path) -> None:
    command = "pull" if configured_remote(here) else "checkout"
    inside = [str(file.relative_to(here)) for file in sorted((here / path).glob("*.dvc"))]
    try:
        dvc(here, command, "--quiet", *(inside or [str(path)]))
    except CommandError as error:
        raise BaseModelError(
            f"`base.model` names {path}, which DVC tracks and cannot bring here: {str(error)[-300:]}",
            remedy="dvc push where the model is, with a remote that both know; then run again",
        ) from None


# --- a URL ---


def _find_url(url: str, checkout: Path) -> Source:
    """Download a folder or a GGUF file; use an earlier download while the remote listing is unchanged."""
    files, name = _file_system(url)
    told = _plain(url)
    home = checkout / DOWNLOADS / hashlib.sha256(url.encode()).hexdigest()[:16]
    whole = home.with_name(f"{home.name}.json")  # written last: if it exists, all files are complete
    try:
        listing = _list_remote(files, name)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        if not whole.exists():
            raise BaseModelError(
                f"`base.model` {told} cannot be read: {type(error).__name__}: {_plain(str(error))[:300]}",
                remedy="check the address and the credentials in the environment, "
                "or copy the model into a folder",
            ) from None
        listing = read_json(whole)
        say(f"base: {told} cannot be read ({type(error).__name__}); what was downloaded before is taken")
    if not whole.exists() or read_json(whole) != listing:
        whole.unlink(missing_ok=True)
        _download(files, listing, home, told)
        write_json(whole, listing)
    file = home / Path(_plain(name)).name
    return Source(file if file.suffix == GGUF else home, told, f"rm -r {home}* (it is downloaded again)")


def _plain(url: str) -> str:
    """Return the URL without its query, which may contain a signature and must not be logged."""
    return url.partition("?")[0]


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    try:
        files, name = url_to_fs(url)
    except ImportError as error:
        known = known_implementations.get(url.partition("://")[0], {})
        package = known.get("class", "").partition(".")[0]
        install = f"pip install {package}" if package not in ("", "fsspec") else str(error)
        raise BaseModelError(f"`base.model` {_plain(url)} needs a package: {error}", remedy=install) from None
    except ValueError as error:
        raise BaseModelError(
            f"`base.model` {_plain(url)} is no URL that fsspec reads: {error}",
            remedy="wanted a protocol such as s3://, gs://, https:// or file://",
        ) from None
    return files, str(name).rstrip("/")


def _list_remote(files: Any, name: str) -> dict[str, list[Any]]:
    """Return path → [size in bytes, checksum or time] of the files that make up a base.

    Raises FileNotFoundError, BaseModelError, and the errors of the file system.
    """
    files.invalidate_cache()
    single = _plain(name).endswith(GGUF)
    found = (
        [files.info(name)]
        if single
        else [info for info in files.ls(name, detail=True) if info["type"] == "file"]
    )
    wanted = {
        str(info["name"]): [info.get("size"), _mark(files, info)]
        for info in found
        if single or any(Path(info["name"]).match(pattern) for pattern in (*WANTED, f"*{GGUF}"))
    }
    if not single and not any(path.endswith((".safetensors", GGUF)) for path in wanted):
        names = sorted(Path(info["name"]).name for info in found)
        raise BaseModelError(
            f"`base.model` {name} holds no safetensors and no GGUF file "
            f"(found {', '.join(names[:8]) or 'nothing'})",
            remedy="name the folder that holds the weights; pickles are never loaded",
        )
    return wanted


def _mark(files: Any, info: dict[str, Any]) -> str:
    """Return a value that changes with a file's content: its checksum if there is one, else its time."""
    found = next(
        (
            info[key]
            for key in ("ETag", "md5Hash", "etag", "content_md5", "mtime", "created")
            if info.get(key)
        ),
        "",
    )
    return str(found)


def _download(files: Any, listing: dict[str, list[Any]], home: Path, url: str) -> None:
    """Download each file completely; files from an earlier try are kept, so a broken connection costs one."""
    marks = home.with_name(f"{home.name}.part.json")
    kept = read_json(marks) if marks.exists() else {}
    home.mkdir(parents=True, exist_ok=True)
    for left in home.iterdir():
        if left.name not in {Path(_plain(path)).name for path in kept}:
            left.unlink()
    require_space(home, sum(size or 0 for size, _ in listing.values()) + 2**20, f"the base {url}")
    for path, said in sorted(listing.items()):
        target, size = home / Path(_plain(path)).name, said[0]
        if target.exists() and kept.get(path) == said:
            continue
        part = target.with_name(f".{target.name}.part")
        try:
            files.get_file(path, str(part))
        except (OSError, RuntimeError, ValueError) as error:
            part.unlink(missing_ok=True)
            raise BaseModelError(
                f"{target.name} of {url} did not arrive: {type(error).__name__}: {_plain(str(error))[:300]}",
                remedy="run it again: the files that are here are kept",
            ) from None
        if size is not None and (got := part.stat().st_size) != size:
            part.unlink()
            raise BaseModelError(
                f"{target.name} of {url} came with {got:,} bytes, wanted {size:,}",
                remedy="run it again: the files that are here are kept",
            )
        part.replace(target)
        kept[path] = said
        write_json(marks, kept)
    marks.unlink(missing_ok=True)
