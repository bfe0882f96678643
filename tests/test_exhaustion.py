"""A full disk and a lack of memory are told as such, whichever library meets them."""

from __future__ import annotations

import contextlib
import errno
import resource
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from command import ratchet

from ratchet.errors import CommandError, DiskSpaceError, MemoryLimitError, UserError
from ratchet.exhaustion import explain
from ratchet.files import write_bytes

FULL = Path("/dev/full")  # each write to it fails with ENOSPC


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", "/var/data/x.parquet")


@pytest.mark.parametrize(
    "error",
    [
        full_disk(),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        sqlite3.OperationalError("database or disk is full"),
        OSError(
            "[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"
        ),  # pyarrow
        RuntimeError("I/O error: No space left on device (os error 28)"),  # safetensors, tokenizers
        CommandError(
            "dvc add failed: ERROR: unexpected error - [Errno 28] No space left on device: '/data/c'"
        ),
    ],
    ids=["os", "quota", "sqlite", "pyarrow", "safetensors", "dvc"],
)
def test_a_full_disk_is_one_message_with_what_is_free(error: Exception) -> None:
    told = explain(error)
    assert isinstance(told, DiskSpaceError) and told.exit_code == 2
    assert "MiB are free at /" in str(told) and "ratchet clean" in told.remedy


def test_a_full_disk_is_found_under_another_error() -> None:
    try:
        try:
            raise full_disk()
        except OSError as error:
            raise ValueError("the table was not written") from error
    except ValueError as error:
        told = explain(error)
    assert isinstance(told, DiskSpaceError) and "/var" in str(told)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("could not create a primitive descriptor for the matmul primitive"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=str,
)
def test_a_lack_of_memory_names_what_to_lower(error: Exception) -> None:
    told = explain(error)
    assert isinstance(told, MemoryLimitError) and told.exit_code == 2 and "train.batch_windows" in told.remedy


def test_other_errors_and_ours_are_left_as_they_are() -> None:
    for error in (
        ValueError("no rows"),
        FileNotFoundError(errno.ENOENT, "No such file", "/x"),
        UserError("row 3 says: no space left on device"),
        DiskSpaceError("cannot write /x"),
    ):
        assert explain(error) is None


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_pyarrow_on_a_full_disk_is_understood() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(OSError) as caught:  # its text is what is examined
        pq.write_table(pa.table({"a": list(range(100_000))}), str(FULL))
    assert isinstance(explain(caught.value), DiskSpaceError)


def test_sqlite_that_may_not_grow_is_understood(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "requests.db")) as database:
        database.execute("create table a (b)")
        database.execute("pragma max_page_count = 3")
        with pytest.raises(sqlite3.OperationalError) as full:
            database.executemany("insert into a values (?)", [("x" * 4000,)] * 9)
    assert isinstance(explain(full.value), DiskSpaceError)


def test_a_stage_that_runs_out_of_memory_ends_in_one_message(tmp_path: Path) -> None:
    """With a real limit of the address space, in a process of its own."""
    code = (
        "import sys; sys.argv = ['stage', '--params', 'params.yaml']\n"
        "from ratchet.pipeline.stage import run_stage\n"
        "run_stage(None, [], lambda config, arguments: bytearray(1 << 40))"
    )
    (tmp_path / "params.yaml").write_text("project: {name: pydoc}\n")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)),
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("MemoryLimitError: memory ran out") and "train.batch_windows" in done.stderr


def test_a_command_on_a_full_disk_exits_with_2_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "params.yaml").write_text("project: {name: pydoc}\n")

    def fill(*_: object, **__: object) -> None:
        raise full_disk()

    monkeypatch.setattr(Path, "replace", fill)
    with pytest.raises(DiskSpaceError, match=r"No space left on device; [\d,]+ MiB are free at"):
        write_bytes(tmp_path / "out", [b"x"])
    done = ratchet("-C", str(tmp_path), "report", "--out", str(tmp_path / "report.html"))
    assert done.returncode == 2 and "Traceback" not in done.stderr and "free some room" in done.stderr
