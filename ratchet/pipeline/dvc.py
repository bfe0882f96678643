"""Run DVC in a workspace: stages, what is stale, the shared cache, the remote."""

from __future__ import annotations

import configparser
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from ratchet.errors import StageError
from ratchet.pipeline.checkout import Say, child_environment, dvc, git
from ratchet.pipeline.dag import KEYS, write_keys

EXITED = re.compile(r"exited with (-?\d+)")
TORCHRUN = re.compile(
    r"[EW]\d{4} \S+ \d+ torch/distributed/elastic/"
)  # begins its own report, which stands behind what a process said, and is long
CACHE_TYPES = "reflink,symlink,hardlink,copy"
# DVC's advice for people at a prompt; the flow does these things itself.
CHATTER = (
    ">",
    "Use `dvc push`",
    "To track the changes",
    "To enable auto staging",
    "\tgit add",
    "\tdvc config",
    "Updating lock file",
    "Generating lock file",
    "WARNING: 'data/golden.jsonl' is empty",
    "WARNING: 'data/forgotten.jsonl' is empty",
    "Running stage",
)


class Workspace(NamedTuple):
    """A clone at `path` of the checkout at `root`, on `branch`."""

    root: Path
    path: Path
    branch: str

    def git(self, *arguments: str) -> str:
        return git(self.path, *arguments)

    def dvc(self, *arguments: str) -> str:
        return dvc(self.path, *arguments)


def run_stage(workspace: Workspace, stage: str, say: Say) -> bool:
    """Run one stage in its own process, its lines passed to `say`. Whether its outputs were made or fetched anew (False: unchanged). Raises StageError."""
    write_keys(workspace.path)
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", stage]
    lines, code = _stream(command, workspace, say)
    if code:
        codes = EXITED.findall("\n".join(lines))  # DVC's own word comes last
        told = [
            line
            for line in without_torchrun(lines)
            if line and not line.startswith(("ERROR: failed to reproduce", "Verifying", *CHATTER))
        ]
        if codes and codes[-1].startswith("-"):
            told.append(
                f"its process was killed by signal {codes[-1][1:]}"
                + ("; the same command goes on from the newest checkpoint" if stage == "train" else "")
            )
        raise StageError(
            f"stage {stage} failed:\n" + "\n".join(told[-12:] or lines[-3:]),
            exit_code=2 if codes[-1:] == ["2"] else 1,
        )
    return not any(line.startswith(f"Stage '{stage}' didn't change") for line in lines)


def without_torchrun(lines: list[str]) -> list[str]:
    """What the processes themselves said, their own tracebacks included."""
    first = next((place for place, line in enumerate(lines) if TORCHRUN.match(line)), len(lines))
    return lines[:first] or lines


def _stream(command: list[str], workspace: Workspace, say: Say) -> tuple[list[str], int]:
    """Lines and exit code of a command. A signal to us ends its whole process group: DVC does not pass one on to the stage."""
    lines: list[str] = []
    environment = {
        **child_environment(),
        "RATCHET_ROOT": str(workspace.root.resolve()),
    }  # where a training's checkpoints outlive the workspace
    with subprocess.Popen(
        command,
        cwd=workspace.path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            for line in process.stdout or []:
                lines.append(line.rstrip())
                if line.strip() and not line.startswith(CHATTER):
                    say(line.rstrip())
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    return lines, process.returncode


def stale_stages(workspace: Workspace) -> set[str]:
    """Ask DVC which stages' inputs, code, params or outputs changed since they last ran, none downstream.

    `code` is none of them: DVC calls it changed at all times.
    """
    write_keys(workspace.path)
    found = json.loads(workspace.dvc("status", "--json"))
    return {name.rpartition(":")[2] for name in found if not name.endswith(".dvc")} - {KEYS.name}


def check_out(workspace: Workspace) -> None:
    """Bring what the last run made into the clone, from the shared cache or the remote. A file that is nowhere is made anew by its stage."""
    has_remote = bool(configured_remote(workspace.root))
    workspace.dvc(
        *(
            ["pull", "--quiet", "--allow-missing"]
            if has_remote
            else ["checkout", "--quiet", "--allow-missing"]
        )
    )


def configured_remote(root: Path) -> str | None:
    return next(
        (
            found
            for name in ("config.local", "config")
            if (found := _dvc_config(root, name).get("core", "remote", fallback=None))
        ),
        None,
    )


def push_data(workspace: Workspace, say: Say) -> None:
    """`dvc push` where there is a remote; a warning where there is none."""
    if configured_remote(workspace.root) is None:
        say("no DVC remote is configured: the data stay on this machine (dvc remote add --default NAME URL)")
        return
    workspace.dvc("push", "--quiet")


def _share_cache(root: Path, path: Path) -> None:
    """What `dvc cache dir --local` and `dvc config --local` would write, without their second of start-up."""
    config, committed = _dvc_config(root, "config.local"), _dvc_config(root, "config")
    for section in ("core", "cache"):
        if not config.has_section(section):
            config.add_section(section)
    known = config.get("cache", "dir", fallback=committed.get("cache", "dir", fallback="cache")).strip("\"'")
    # Quoted: DVC reads an unquoted comma as the end of a list's item.
    config.set("cache", "dir", f'"{(root / ".dvc" / known).resolve()}"')
    config.set("cache", "type", f'"{CACHE_TYPES}"')
    # DVC's own notes about a clone would otherwise outlive it under /var/tmp.
    config.set("core", "site_cache_dir", f'"{path / ".dvc" / "tmp" / "site"}"')
    _keep_remotes(root, config, committed)
    local = path / ".dvc" / "config.local"
    local.touch(mode=0o600)  # it may hold a remote's password
    with local.open("w", encoding="utf-8") as out:
        config.write(out)


def _keep_remotes(
    root: Path, config: configparser.ConfigParser, committed: configparser.ConfigParser
) -> None:
    """DVC reads a remote's relative path from the folder of the configuration, which is another one in the clone."""
    for section in {*config.sections(), *committed.sections()}:
        url = config.get(section, "url", fallback=committed.get(section, "url", fallback="")).strip("\"'")
        if section.startswith("'remote ") and url and "://" not in url and not url.startswith(("/", "~")):
            if not config.has_section(section):
                config.add_section(section)
            config.set(section, "url", f'"{(root / ".dvc" / url).resolve()}"')


def _dvc_config(root: Path, name: str) -> configparser.ConfigParser:
    config = configparser.ConfigParser(interpolation=None)
    config.read(root / ".dvc" / name, encoding="utf-8")
    return config
