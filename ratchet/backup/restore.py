"""Restore a backup at any path: everything is checked and put together beside it, then takes its place."""

from __future__ import annotations

import configparser
from pathlib import Path

from pydantic import ValidationError

from ratchet.backup.archive import Manifest, Remote, Unpacked, unpacking
from ratchet.backup.make import DATA, GIT
from ratchet.backup.state import HOME, STATE
from ratchet.config.data import ProjectConfig
from ratchet.errors import CommandError, DamagedError, UserError
from ratchet.pipeline.checkout import Say, dvc, git
from ratchet.pipeline.integrity import cache_folder
from ratchet.pipeline.workspace import LANDING


def restore(file: Path, into: Path | None, say: Say) -> tuple[Path, Manifest]:
    """Restore a backup to `into`, an empty folder or none yet; else to a new folder of the project's name.

    Returns the folder and the backup's manifest. Raises UserError: the folder holds something, or the file
    is none; DamagedError: the archive is not as it was written; DiskSpaceError.
    """
    if into is not None:
        _require_empty(into)
        into.parent.mkdir(parents=True, exist_ok=True)
    with unpacking(file, into or Path.cwd() / file.name) as unpacked:
        place = into or Path.cwd() / _project_name(unpacked.manifest)
        made = _put_together(unpacked)
        _require_empty(place)
        made.rename(place)  # replaces an empty folder
    _bring_data(place, unpacked.manifest, say)
    return place, unpacked.manifest


def _require_empty(into: Path) -> None:
    if into.is_symlink() or (into.exists() and not (into.is_dir() and not any(into.iterdir()))):
        raise UserError(
            f"{into} is not empty", remedy="name a folder that is empty or does not exist: --into FOLDER"
        )


def _project_name(manifest: Manifest) -> str:
    try:
        return ProjectConfig(name=manifest.project).name
    except ValidationError:
        raise DamagedError(
            f"the archive's project {manifest.project!r} is no name of one", remedy="--into FOLDER names one"
        ) from None


def _put_together(unpacked: Unpacked) -> Path:
    project, manifest = unpacked.scratch / "project", unpacked.manifest
    _restore_git(unpacked.folder / GIT, project, manifest)
    if (unpacked.folder / STATE).exists():
        (unpacked.folder / STATE).rename(project / HOME)
    cache = project / ".dvc/cache"
    if (unpacked.folder / DATA).exists():
        (cache / "files").mkdir(parents=True)
        (unpacked.folder / DATA).rename(cache / "files/md5")
    _write_dvc_settings(project, cache, manifest.data_remote)
    (project / HOME).mkdir(exist_ok=True)
    (project / LANDING).write_text("restored\n")  # if we are killed, the next command brings the data
    return project


def _restore_git(bundle: Path, project: Path, manifest: Manifest) -> None:
    project.mkdir()
    try:
        git(project, "init", "--quiet", "--initial-branch", manifest.branch)
        git(project, "fetch", "--quiet", "--update-head-ok", str(bundle), "+refs/*:refs/*")
        git(project, "reset", "--quiet", "--hard", manifest.commit)
        for name, url in manifest.git_remotes.items():
            git(project, "remote", "add", "--", name, url)
    except CommandError as error:
        raise DamagedError(
            f"the archive's git repository cannot be restored: {error}", remedy="take another backup"
        ) from None


def _write_dvc_settings(project: Path, cache: Path, remote: Remote | None) -> None:
    """Name the cache, where the project's settings have it elsewhere, and the remote.

    DVC reads the settings of a version's own commit, which may be older than the remote; those of
    config.local hold for every commit.
    """
    config = configparser.ConfigParser(interpolation=None)
    if cache_folder(project) != cache.resolve():
        config["cache"] = {"dir": f'"{cache.name}"'}
    if remote and remote.url:
        config["core"] = {"remote": remote.name}
        config[f"'remote \"{remote.name}\"'"] = {"url": f'"{remote.url}"'}
    if config.sections():
        local = project / ".dvc/config.local"
        local.touch(mode=0o600)
        with local.open("w", encoding="utf-8") as out:
            config.write(out)


def _bring_data(place: Path, manifest: Manifest, say: Say) -> None:
    """Put the newest commit's data in place, from the cache that was packed and from the remote."""
    command = "pull" if manifest.data_remote else "checkout"
    try:
        dvc(place, command, "--quiet", "--allow-missing")
    except CommandError as error:
        say(f"the data are not in place yet: {' '.join(str(error).split())[:300]}\n  → dvc {command}")
        return
    (place / LANDING).unlink(missing_ok=True)
