"""Commands that people type every day, as processes would run them, on a checkout with a prepared batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import in_process, ratchet
from places import use_git_without_a_user, use_no_mlflow
from small_checkout import add, commit_batches, make, make_checkout, row

LONG = json.dumps({"question": "a question " * 400, "answer": "yes"}).encode()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("everyday") / "small"
    with pytest.MonkeyPatch.context() as patch:
        use_git_without_a_user(patch)
        files = {"data/golden.jsonl": "", "data/forgotten.jsonl": ""}
        make_checkout(path, files)
        (path / "params.yaml").write_text(
            (path / "params.yaml").read_text() + "  max_chars: 1000\n  max_rejected_share: 0.5\n"
        )
        batch = add(path / "data/raw", [*(row(number) for number in range(40)), LONG])
        commit_batches(path, "Ingest")
        make(path)
    return path, batch


@pytest.fixture
def checkout(made, monkeypatch) -> tuple[Path, str]:
    use_git_without_a_user(monkeypatch)
    use_no_mlflow(monkeypatch)
    return made


def test_rejected_rows_are_listed_shown_and_tried_again(checkout):
    path, batch = checkout
    listed = ratchet("-C", path, "data", "rejected")
    assert "1 too_many_chars" in listed.stdout and f"{batch}:41" in listed.stdout, listed
    shown = ratchet("-C", path, "data", "show", f"{batch}:41")
    assert shown.stdout.startswith("rejected: too_many_chars") and "a question a question" in shown.stdout
    again = ratchet("-C", path, "data", "resubmit", "--json")
    assert json.loads(again.stdout) == {"fit": {}, "unfit": {"too_many_chars": 1}, "not_tried": {}}


def test_a_key_is_shown_once_listed_and_refused(checkout):
    path, _ = checkout
    added = ratchet("-C", path, "keys", "add", "website")
    assert len(added.stdout.strip()) > 20
    assert ratchet("-C", path, "keys", "list").stdout.split() == ["website", "infer,feedback"]
    assert added.stdout.strip() not in "".join(
        file.read_text(encoding="utf-8", errors="replace") for file in (path / ".ratchet").glob("*.json*")
    ), "the key itself is not kept"
    assert "refused from now on" in ratchet("-C", path, "keys", "revoke", "website").stdout
    assert ratchet("-C", path, "keys", "list").stdout == ""


def test_the_page_is_written_where_the_command_says(checkout):
    path, _ = checkout
    done = ratchet("-C", path, "report")
    assert done.returncode == 0, done.stderr
    written = Path(done.stdout.split()[-1])
    assert "<html" in (written if written.is_absolute() else path / written).read_text(encoding="utf-8")


def test_a_batch_is_taken_back(checkout):
    path, batch = checkout
    done = ratchet("-C", path, "data", "revert", batch[:16], "--reason", "wrong prices", "--json")
    assert json.loads(done.stdout)["batch"]["rows"] == 41, done
    assert batch not in (path / "data/raw/manifest.jsonl").read_text(encoding="utf-8")


def test_a_retraining_elsewhere_needs_an_address_that_answers(checkout, monkeypatch):
    path, _ = checkout
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    missing = ratchet("-C", path, "retrain", "--deployment")
    assert (missing.returncode, missing.stdout) == (2, "") and "PREFECT_API_URL is not set" in missing.stderr
    both = ratchet("-C", path, "retrain", "--deployment", "--force")
    assert both.returncode == 2 and "--force" in both.stderr
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    silent = in_process("-C", path, "retrain", "--deployment")
    assert silent.returncode == 1 and "does not answer at http://127.0.0.1:9/api" in silent.stderr, silent
    assert "Traceback" not in silent.stderr
