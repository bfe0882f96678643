"""Run DVC in a workspace: stages, stale stages, the shared cache, the remote."""

from __future__ import annotations

import configparser
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from ratchet.errors import CheckoutError, CommandError, StageError
from ratchet.exhaustion import LESS_MEMORY, lacks_memory
from ratchet.pipeline.checkout import Say, child_environment, dvc, git
from ratchet.pipeline.dag import KEYS, STAGES, write_keys
from ratchet.pipeline.integrity import cache_folder, read_dvc_config

EXITED = re.compile(r"exited with (-?\d+)")
# The first line of torchrun's own report, which is long and follows the output of the process that failed.
TORCHRUN = re.compile(r"[EW]\d{4} \S+ \d+ torch/distributed/elastic/")
CACHE_TYPES = "reflink,symlink,hardlink,copy"  # DVC takes the first one that the filesystem supports
# Lines that are not shown: DVC's advice for interactive use (the flow does these things itself).
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
    """A clone at `path` of the checkout at `root`, on `branch`. `landing` is that of params.yaml."""

    root: Path
    path: Path
    branch: str
    landing: str = "checkout"

    def git(self, *arguments: str) -> str:
        return git(self.path, *arguments)

    def dvc(self, *arguments: str) -> str:
        return dvc(self.path, *arguments)


MISSING = (
    "Is your cache up to date"  # part of DVC's error for data that are neither in the cache nor in the remote
)


def run_stage(workspace: Workspace, stage: str, say: Say) -> bool:
    """Run one stage in its own process and pass its lines to `say`; return False if it was unchanged.

    Raises StageError with the last lines.
    """
    write_keys(workspace.path)
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", stage]
    lines, code = _stream(command, workspace, say)
    if code:
        codes = EXITED.findall("\n".join(lines))  # the last is DVC's own
        told = [
            line
            for line in without_torchrun(lines)
            if line and not line.startswith(("ERROR: failed to reproduce", "Verifying", *CHATTER))
        ]
        if codes and codes[-1].startswith("-"):
            told.append(
                f"its process was killed by signal {codes[-1][1:]}"
                + ("; the same command resumes from the newest checkpoint" if stage == "train" else "")
            )
            if codes[-1] == f"-{signal.SIGKILL:d}" or any(map(lacks_memory, told)):
                told.append(f"most likely memory ran out\n  → {LESS_MEMORY}")
        raise StageError(
            f"stage {stage} failed:\n" + "\n".join(told[-12:] or lines[-3:]),
            exit_code=2 if codes[-1:] == ["2"] else 1,
            killed=codes[-1:] != [] and codes[-1].startswith("-"),
        )
    return not any(line.startswith(f"Stage '{stage}' didn't change") for line in lines)


def run_module(workspace: Workspace, module: str, arguments: list[str], say: Say) -> None:
    """Run a stage's module on other paths than the DAG's; nothing of it is in DVC or MLflow.

    Raises StageError with the last lines.
    """
    lines, code = _stream([sys.executable, "-m", module, *arguments], workspace, say, tracked=False)
    if code:
        told = "\n".join(without_torchrun(lines)[-12:])
        raise StageError(f"{module} failed:\n{told}", exit_code=2 if code == 2 else 1)


def without_torchrun(lines: list[str]) -> list[str]:
    """Return the lines of the processes themselves, without torchrun's report."""
    first = next((place for place, line in enumerate(lines) if TORCHRUN.match(line)), len(lines))
    return lines[:first] or lines


def _stream(
    command: list[str], workspace: Workspace, say: Say, *, tracked: bool = True
) -> tuple[list[str], int]:
    """Run a command and return its lines and exit code; it does not see MLflow unless `tracked`.

    An exception here, such as one that a signal raises, ends the whole process group, because DVC does not
    pass a signal on to the stage.
    """
    lines: list[str] = []
    # Checkpoints are stored in the checkout, because the workspace may be deleted.
    environment = {**child_environment(), "RATCHET_ROOT": str(workspace.root.resolve())}
    if not tracked:
        environment.pop("MLFLOW_TRACKING_URI", None)
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
    """Return the stages whose inputs, code, params or outputs changed since their last run, by DVC's status.

    Stages downstream of a stale one are not included, nor is `code`, which DVC always calls changed.
    """
    write_keys(workspace.path)
    found = json.loads(workspace.dvc("status", "--json"))
    return {name.rpartition(":")[2] for name in found if not name.endswith(".dvc")} - {KEYS.name}


def changed_stages(workspace: Workspace) -> list[str]:
    """List the stages whose inputs, params or code differ from those of dvc.lock, whatever data are missing.

    `stale_stages` needs every input and output in place; this needs only those that git tracks and data/raw,
    so a pull request is judged without models. A stage that dvc.lock lacks counts as changed.
    """
    write_keys(workspace.path)
    status: dict[str, list[Any]] = json.loads(workspace.dvc("status", "--json"))
    found = {
        name
        for name, changes in status.items()
        for change in changes
        if change in ("changed command", "always changed")
        or (isinstance(change, dict) and _differs(change.get("changed deps", {})))
    }
    return [stage for stage in STAGES if stage in found]


def _differs(deps: dict[str, Any]) -> bool:
    """Return whether any input changed; one that is only missing (`deleted`) did not."""
    return any(isinstance(how, dict) or how != "deleted" for how in deps.values())


def downstream(path: Path, stages: Collection[str]) -> list[str]:
    """List, in their order, the stages that read what `stages` write, or what those stages write in turn.

    `path` is the folder of dvc.yaml. DVC leaves out the ones among them whose inputs come out unchanged.
    """
    written, found = set[str](), list[str]()
    for name, stage in read_stages(path).items():
        if name in stages or written & set(stage.get("deps", [])):
            outputs = [*stage.get("outs", []), *stage.get("metrics", [])]
            written |= {out if isinstance(out, str) else next(iter(out)) for out in outputs}
            found += [] if name in stages else [name]
    return found


def read_stages(path: Path) -> dict[str, Any]:
    """Return the stages of the folder's dvc.yaml."""
    from ruamel.yaml import YAML

    found: dict[str, Any] = YAML(typ="safe").load((path / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return found


def check_out(workspace: Workspace) -> None:
    """Bring the tracked data into the clone, from the remote or the shared cache.

    A missing output of a stage is no fault, since the stage makes it again. Raises CheckoutError for missing
    data that no stage makes, such as rows.
    """
    command = "pull" if configured_remote(workspace.root) else "checkout"
    workspace.dvc(command, "--quiet", "--allow-missing")
    for name in workspace.git("ls-files", "--", "*.dvc").splitlines():
        if not (workspace.path / name.removesuffix(".dvc")).exists():
            raise _not_here(workspace, name.removesuffix(".dvc"))


def bring(workspace: Workspace, name: str) -> None:
    """Bring the data of `NAME.dvc` into the clone; do nothing if there is no such file.

    Raises CheckoutError: the data are neither in the shared cache nor in the remote.
    """
    if not (workspace.path / f"{name}.dvc").exists():
        return
    remote = configured_remote(workspace.root)
    try:
        workspace.dvc("pull" if remote else "checkout", f"{name}.dvc")
    except CommandError as error:
        if MISSING not in str(error):
            raise
        raise _not_here(workspace, name) from None


def _not_here(workspace: Workspace, name: str) -> CheckoutError:
    remote = configured_remote(workspace.root)
    return CheckoutError(
        f"the data of {name} are not here: neither in this machine's DVC cache nor in "
        + (f"the remote {remote!r}" if remote else "a remote, since none is configured"),
        remedy="dvc push on the machine that has them, then dvc pull here"
        if remote
        else "dvc pull, after `dvc remote add --default NAME URL` and a dvc push on the machine that has "
        "them; or copy its .dvc/cache",
    )


def configured_remote(root: Path) -> str | None:
    """Return the name of DVC's default remote; the local configuration overrides the committed one."""
    remotes = (
        read_dvc_config(root, name).get("core", "remote", fallback=None)
        for name in ("config.local", "config")
    )
    return next(filter(None, remotes), None)


def push_data(workspace: Workspace, say: Say) -> None:
    """Push the data to DVC's remote; tell the user if none is configured."""
    if configured_remote(workspace.root) is None:
        say("no DVC remote is configured: the data stay on this machine (dvc remote add --default NAME URL)")
        return
    workspace.dvc("push", "--quiet")


def share_cache(root: Path, path: Path) -> None:
    """Let the clone at `path` use the cache of the checkout at `root`.

    It writes what `dvc cache dir --local` and `dvc config --local` would; each takes a second to start.
    """
    config, committed = read_dvc_config(root, "config.local"), read_dvc_config(root, "config")
    for section in ("core", "cache"):
        if not config.has_section(section):
            config.add_section(section)
    config.set("cache", "dir", f'"{cache_folder(root)}"')
    config.set("cache", "type", f'"{CACHE_TYPES}"')
    # By default DVC keeps data about each repository in a system folder, where it would outlive the clone.
    config.set("core", "site_cache_dir", f'"{path / ".dvc" / "tmp" / "site"}"')
    _keep_remotes(root, config, committed)
    _verify_remotes(config, committed)
    local = path / ".dvc" / "config.local"
    local.parent.mkdir(exist_ok=True)  # a clone without a checkout has none
    local.touch(mode=0o600)  # it may contain a remote's password
    with local.open("w", encoding="utf-8") as out:
        config.write(out)


def _keep_remotes(
    root: Path, config: configparser.ConfigParser, committed: configparser.ConfigParser
) -> None:
    """Make the paths of remotes absolute.

    DVC resolves a relative path from the folder of the configuration, which differs in the clone.
    """
    for section in {*config.sections(), *committed.sections()}:
        url = config.get(section, "url", fallback=committed.get(section, "url", fallback="")).strip("\"'")
        if section.startswith("'remote ") and url and "://" not in url and not url.startswith(("/", "~")):
            if not config.has_section(section):
                config.add_section(section)
            config.set(section, "url", f'"{(root / ".dvc" / url).resolve()}"')


def _verify_remotes(config: configparser.ConfigParser, committed: configparser.ConfigParser) -> None:
    """Let DVC compare what it pulls with its hash, unless a remote's own setting says otherwise."""
    for section in {*config.sections(), *committed.sections()}:
        if section.startswith("'remote ") and not committed.get(section, "verify", fallback=""):
            if not config.has_section(section):
                config.add_section(section)
            if not config.has_option(section, "verify"):
                config.set(section, "verify", "true")
