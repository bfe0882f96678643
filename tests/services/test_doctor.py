"""What `ratchet doctor` finds, and that every fault comes with something to do."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from ratchet.config.params import Config
from ratchet.services import doctor
from ratchet.services.doctor import (
    Finding,
    check_dvc,
    check_gpu,
    check_packages,
    check_pairs,
    check_ports,
    examine,
)
from ratchet.services.processes import free_port

GOOD = {
    "prefect": "3.8.8",
    "fastapi": "0.150.0",
    "sqlalchemy": "2.0.58",
    "evidently": "0.7.23",
    "pandas": "2.3.3",
}


def pick(findings: Iterable[Finding], name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository as git and DVC make it, without a remote."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("")
    return tmp_path


def test_all_that_is_not_well_has_a_remedy(tmp_path: Path) -> None:
    findings = examine(tmp_path, Config())
    assert {
        "python",
        "git",
        "git repository",
        "dvc",
        "disk",
        "port of mlflow",
        "port of prefect",
        "gpu",
        "cores",
        "memory",
    } <= {finding.name for finding in findings}
    assert [finding for finding in findings if finding.ok is not True and not finding.remedy] == []
    assert [finding for finding in findings if not finding.found] == []


def test_a_plain_folder_is_no_clone(tmp_path: Path) -> None:
    findings = examine(tmp_path, None)
    assert pick(findings, "git repository").ok is False
    assert "dvc init" in pick(findings, "dvc").remedy


def test_another_users_clone_gets_the_command_of_gits_own(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    found = pick(doctor.check_git(clone), "git repository")
    assert found.ok is False and found.remedy == f"git config --global --add safe.directory {clone}"


def test_the_clone_is_left_out_without_a_root() -> None:
    names = {finding.name for finding in examine(None, None)}
    assert not names & {"dvc", "disk", "git repository", "port of mlflow"}
    assert {"git", "python", "gpu"} <= names


def test_the_doctor_is_light() -> None:
    code = (
        "import sys, ratchet.services.doctor as d; d.examine(None, None); print([m for m in ('prefect', "
        "'mlflow', 'torch', 'dvc') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_a_package_out_of_bounds_is_named_with_both_versions() -> None:
    findings = check_packages(
        {"pandas": "3.0.1"}, ["pandas>=2.3,<3", "psutil>=7.2", 'ruff>=0.15; extra == "dev"']
    )
    assert [(finding.name, finding.ok) for finding in findings] == [("pandas", False), ("psutil", False)]
    assert findings[0].found == "3.0.1, wanted <3,>=2.3"
    assert findings[1].found.startswith("not installed")


def test_a_local_version_counts_as_its_release() -> None:
    assert [finding.ok for finding in check_packages({"torch": "2.13.0+cpu"}, ["torch>=2.13,<2.14"])] == [
        True
    ]


@pytest.mark.parametrize(
    ("name", "version"), [("fastapi", "0.154.0"), ("sqlalchemy", "2.1.9"), ("pandas", "3.0.0")]
)
def test_a_pair_that_installs_and_does_not_work_is_known(name: str, version: str) -> None:
    assert [finding.ok for finding in check_pairs(GOOD)] == [True]
    (fault,) = check_pairs({**GOOD, name: version})
    assert fault.ok is False
    assert f"{name} {version}" in fault.found
    assert f"'{name}<" in fault.remedy


def test_a_clone_without_a_remote_is_a_warning(clone: Path) -> None:
    finding = check_dvc(clone)
    assert finding.ok is None
    assert "this machine" in finding.found


def test_a_remote_is_named_without_its_address(clone: Path) -> None:
    (clone / ".dvc" / "config").write_text(
        "[core]\n    analytics = false\n    remote = storage\n['remote \"storage\"']\n    url = "
        "https://user:secret@dvc.example/x\n    verify = true\n"
    )
    finding = check_dvc(clone)
    assert (finding.ok, finding.found) == (True, "remote `storage` (https)")


def test_a_broken_dvc_config_is_reported(clone: Path) -> None:
    (clone / ".dvc" / "config").write_text("remote = storage\n")
    assert check_dvc(clone).ok is False


def test_little_room_is_a_warning_and_almost_none_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    for free in (6, 3, 0.5):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _, free=free: type("Usage", (), {"free": free * doctor.GIB})()
        )
        seen[free] = doctor.check_disk(tmp_path).ok
    assert seen == {6: True, 3: None, 0.5: False}


def test_a_port_that_another_holds_is_a_fault(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        config = Config.model_validate(
            {
                "services": {"mlflow_port": taken, "prefect_port": free_port()},
                "gateway": {"port": free_port()},
            }
        )
        findings = check_ports(tmp_path, config)
    assert [(finding.name, finding.ok) for finding in findings] == [
        ("port of mlflow", False),
        ("port of prefect", True),
        ("port of gateway", True),
    ]
    assert "services.mlflow_port" in findings[0].remedy


def test_a_gpu_that_the_build_cannot_use_is_a_warning() -> None:
    assert check_gpu("2.13.0+cpu", False, []).ok is True
    assert check_gpu("2.13.0+cu130", True, ["NVIDIA H200"]).ok is True
    idle = check_gpu("2.13.0+cpu", False, ["NVIDIA H200"])
    assert idle.ok is None
    assert "TORCH_INDEX" in idle.remedy
