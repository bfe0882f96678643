"""Check what this machine and this clone have and lack, and say what to do about it: `ratchet doctor`.

It takes under two seconds: versions are read from the packages' metadata, torch and MLflow are never
imported. It changes nothing, and it does not read the data, the model or the registry.
"""

from __future__ import annotations

import configparser
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ratchet.errors import RatchetError
from ratchet.monitoring.retrain_budget import FILE as RETRAINS
from ratchet.pipeline.checkout import FOREIGN, git, trust
from ratchet.promotion.rollout import ENDED
from ratchet.promotion.rollout import FILE as ROLLOUT
from ratchet.review.store import FILE as REVIEW
from ratchet.services.environment import ADDRESSES
from ratchet.services.processes import find_port_fault
from ratchet.services.supervisor import Service, list_services
from ratchet.storage.database import find_database, shown

if TYPE_CHECKING:
    from ratchet.config.params import Config

GIB = 2**30
REINSTALL = "rm .venv/.core && make .venv/.core installs the locked versions"
# Pairs that fail together although a resolver installs them, because the second one's metadata allows the
# first: package, bad versions, other package, its versions, effect.
BAD_PAIRS = (
    (
        "sqlalchemy",
        ">=2.1",
        "prefect",
        "==3.8.8",
        "Prefect's scheduler fails: a deployment's schedule never starts a run",
    ),
    (
        "fastapi",
        ">=0.151",
        "prefect",
        "==3.8.8",
        (
            "Prefect's server refuses requests of its own client that leave a filter empty (422), and from "
            "0.155 does not start"
        ),
    ),
    ("pandas", ">=3", "evidently", "<0.8", "Evidently does not import"),
)


@dataclass(frozen=True)
class Finding:
    """The result of one check. `ok` is None for a warning: it works, but less well or less safely."""

    name: str
    ok: bool | None
    found: str
    remedy: str = ""


def examine(root: Path | None, config: Config | None) -> list[Finding]:
    """Run the checks: those of the clone need `root`, those of the ports need `config`."""
    versions = read_versions()
    findings = [
        check_python(),
        *check_packages(versions, metadata.requires("ratchet") or []),
        *check_pairs(versions),
        *check_git(root),
    ]
    if root is not None:
        findings += [check_dvc(root), check_disk(root), *check_storage(root)]
    if root is not None and config is not None:
        findings += check_ports(root, config)
    return [
        *findings,
        check_gpu(versions.get("torch"), has_cuda_build(), list_gpus()),
        check_cores(),
        check_memory(),
    ]


def read_versions() -> dict[str, str]:
    """Read the versions of the installed packages, by normalised name (lower case, hyphens)."""
    found = (
        (distribution.metadata["Name"], distribution.version) for distribution in metadata.distributions()
    )
    return {name.lower().replace("_", "-"): version for name, version in found if name}


def check_python() -> Finding:
    wanted = metadata.metadata("ratchet")["Requires-Python"]
    ok = platform.python_version() in SpecifierSet(wanted)
    return Finding(
        "python",
        ok,
        platform.python_version(),
        "" if ok else f"Ratchet needs {wanted}: rm -r .venv, then make PYTHON=python3.12 demo",
    )


def check_packages(versions: Mapping[str, str], requirements: Iterable[str]) -> list[Finding]:
    """Compare versions with the requirements: one finding if all fit, else one per package that does not."""
    wanted = [
        requirement
        for requirement in map(Requirement, requirements)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    faults = [fault for requirement in wanted if (fault := _check_package(requirement, versions))]
    named = ", ".join(
        f"{name} {versions[name]}"
        for name in ("prefect", "dvc", "mlflow", "torch", "transformers", "peft")
        if name in versions
    )
    return faults or [Finding("packages", True, f"all {len(wanted)} within their bounds: {named}")]


def _check_package(requirement: Requirement, versions: Mapping[str, str]) -> Finding | None:
    version = versions.get(requirement.name.lower().replace("_", "-"))
    if version is None:
        return Finding(
            requirement.name,
            False,
            f"not installed, wanted {requirement.specifier or 'any version'}",
            REINSTALL,
        )
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, False, f"{version}, wanted {requirement.specifier}", REINSTALL)
    return None


def check_pairs(versions: Mapping[str, str]) -> list[Finding]:
    faults = []
    for name, bad, other, others, effect in BAD_PAIRS:
        if (
            name in versions
            and other in versions
            and versions[name] in SpecifierSet(bad)
            and versions[other] in SpecifierSet(others)
        ):
            faults.append(
                Finding(
                    f"{name} with {other}",
                    False,
                    f"{name} {versions[name]} with {other} {versions[other]}: {effect}",
                    f"{REINSTALL}; or .venv/bin/uv pip install '{name}{_turn(bad)}'",
                )
            )
    return faults or [Finding("known bad pairs", True, f"none of {len(BAD_PAIRS)}")]


def _turn(bad: str) -> str:
    """Invert `bad` (">=X") into the bound that keeps it out."""
    return "<" + bad.removeprefix(">=")


def check_git(root: Path | None) -> list[Finding]:
    version = _ask("git", "--version")
    if version is None:
        return [
            Finding(
                "git",
                False,
                "not installed",
                "install git: workspaces, data commits and the promotion ledger are git's",
            )
        ]
    place = ["-C", str(root)] if root else []
    findings = [Finding("git", True, version.removeprefix("git version "))]
    if root is not None:
        findings.append(_check_repository(root))
    # `git commit` looks up the identity in the same way: config, environment, and the system's user entry.
    identity = _ask("git", *place, "var", "GIT_COMMITTER_IDENT")
    remedy = (
        "" if identity else "git config --global user.name NAME && git config --global user.email ADDRESS"
    )
    return [
        *findings,
        Finding(
            "git identity",
            True if identity else None,
            identity.rsplit(" ", 2)[0]
            if identity
            else "none: commits of ours are by Ratchet, yours git would refuse",
            remedy,
        ),
    ]


def _check_repository(root: Path) -> Finding:
    try:
        git(root, "rev-parse", "--show-toplevel")
    except RatchetError as error:
        if FOREIGN in str(error):
            found = f"{root} belongs to another user, so git refuses to work in it"
            return Finding("git repository", False, found, trust(root))
        remedy = "git clone the project, or git init here"
        return Finding("git repository", False, f"{root} is none", remedy)
    return Finding("git repository", True, str(root))


def check_dvc(root: Path) -> Finding:
    if not (root / ".dvc" / "config").is_file():
        return Finding("dvc", False, f"{root} is not initialised for DVC", "dvc init, then commit .dvc")
    remotes = configparser.RawConfigParser(strict=False)
    try:
        remotes.read([root / ".dvc" / "config", root / ".dvc" / "config.local"], encoding="utf-8")
    except configparser.Error as error:
        return Finding(
            "dvc",
            False,
            f"{root / '.dvc' / 'config'} cannot be read: {error.message.splitlines()[0]}",
            "correct the file, or git checkout .dvc/config",
        )
    name = remotes.get("core", "remote", fallback=None)
    if name is None:
        return Finding(
            "dvc",
            None,
            "no default remote: data and models stay on this machine",
            "dvc remote add --default storage URL (s3://…, gs://…, ssh://…, a mounted folder)",
        )
    # Only the kind of address is shown: the address itself may hold a password.
    address = remotes.get(f"'remote \"{name}\"'", "url", fallback="")
    kind = address.partition("://")[0] if "://" in address else "a folder"
    return Finding("dvc", True, f"remote `{name}` ({kind})")


def check_storage(root: Path) -> list[Finding]:
    """Check that the shared database answers, and that no state was left in files when it was named."""
    try:
        if (database := find_database(root)) is None:
            return []
        with database.transaction():
            pass
    except RatchetError as error:
        return [Finding("shared storage", False, str(error).splitlines()[0], error.remedy)]
    left = [name.as_posix() for name in (ROLLOUT, ENDED, RETRAINS, REVIEW) if (root / name).exists()]
    if left:
        return [
            Finding(
                "shared storage",
                None,
                f"{shown(database.url)} is in charge, and {', '.join(left)} lie(s) here unread",
                "to take them along, set storage.url to '' and run `ratchet storage move --to URL` with an "
                "empty database; else remove them",
            )
        ]
    return [Finding("shared storage", True, f"{shown(database.url)} answers")]


def check_disk(root: Path) -> Finding:
    free = shutil.disk_usage(root).free
    found = f"{free / GIB:,.1f} GiB free at {root}"
    if free >= 5 * GIB:
        return Finding("disk", True, found)
    return Finding(
        "disk",
        None if free >= GIB else False,
        f"{found}, 5 GiB wanted",
        "free some room; dvc gc -w drops versions of data that no commit needs",
    )


def check_ports(root: Path, config: Config) -> list[Finding]:
    """Check that each port is free, or held by this clone's own services."""
    try:
        services = {service.name: service for service in list_services(root, config)}
    except RatchetError as error:
        return [Finding("services", False, str(error).splitlines()[0], error.remedy)]
    findings = []
    ports = {
        "mlflow": ("services.mlflow_port", config.services.mlflow_port),
        "prefect": ("services.prefect_port", config.services.prefect_port),
        "gateway": ("gateway.port", config.gateway.port),
    }
    for name, (key, port) in ports.items():
        service = services[name]
        if service.given:
            findings.append(_check_given(service))
        elif service.answers and not service.alive:
            findings.append(
                Finding(
                    f"port of {name}",
                    None,
                    f"{name} answers on {service.url}, and `ratchet up` did not start it here",
                    f"right for containers (docker/README.md); otherwise set {key} in params.yaml to "
                    "another port",
                )
            )
        elif service.alive:
            said = "answers" if service.answers else "does not answer"
            findings.append(
                Finding(
                    f"port of {name}",
                    service.answers or None,
                    f"our {name} {said} on {service.url}",
                    "" if service.answers else f"wait a little, then see {service.log}",
                )
            )
        else:
            fault = find_port_fault(port)
            findings.append(
                Finding(
                    f"port of {name}",
                    fault is None,
                    f"{port}: {fault or 'free'}",
                    f"stop that, or set {key} in params.yaml to another port" if fault else "",
                )
            )
    return findings


def _check_given(service: Service) -> Finding:
    """Judge a server whose address is from the environment."""
    variable = ADDRESSES[service.name]
    if service.answers:
        return Finding(service.name, True, f"answers on {service.url} ({variable})")
    return Finding(
        service.name,
        False,
        f"{variable} names a server that does not answer (in a browser: {service.url})",
        f"start it, or set {variable} to its address",
    )


def check_gpu(torch: str | None, cuda_build: bool, gpus: list[str]) -> Finding:
    if not gpus:
        return Finding("gpu", True, f"none; torch {torch} computes on the processor")
    found = f"{len(gpus)}: {gpus[0]}; torch {torch}"
    if cuda_build:
        return Finding("gpu", True, found)
    return Finding(
        "gpu",
        None,
        f"{found} is a build for the processor and does not use it",
        "rm -r .venv, then make TORCH_INDEX=https://download.pytorch.org/whl/cu130 demo (the index that fits "
        "the driver)",
    )


def list_gpus() -> list[str]:
    """List the GPUs as NVIDIA's tool names them, without their serial numbers."""
    lines = (_ask("nvidia-smi", "-L") or "").splitlines()
    return [line.partition(": ")[2].partition(" (UUID")[0] for line in lines if line.startswith("GPU ")]


def has_cuda_build() -> bool:
    """Look for a CUDA build's library: the version need not name it, and importing torch takes seconds."""
    spec = find_spec("torch")
    return bool(spec and spec.origin and (Path(spec.origin).parent / "lib" / "libtorch_cuda.so").exists())


def check_cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding(
        "cores",
        True if cores > 1 else None,
        str(cores),
        ""
        if cores > 1
        else (
            "services and training share one core: expect twice the time, and set services.start_timeout to "
            "300"
        ),
    )


def check_memory() -> Finding:
    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:,.1f} of {memory.total / GIB:,.1f} GiB available"
    if memory.available >= 4 * GIB:
        return Finding("memory", True, found)
    return Finding(
        "memory",
        None,
        f"{found}, 4 GiB wanted: the services alone take 0.9",
        "end other programs, or choose a smaller base and train.batch_windows",
    )


def _ask(*command: str) -> str | None:
    """Run a command and return its output, or None when it fails or is not there."""
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=3, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
