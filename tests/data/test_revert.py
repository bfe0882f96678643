"""A batch that is taken back is trained on no more; later ones stay, versions that learned it are named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import scaled
from places import (
    KEPT_CONNECTIONS,
    commit,
    subjects,
    use_git_without_a_user,
    use_mlflow,
    use_no_mlflow,
    write_files,
)
from small_checkout import (
    CONFIG,
    add,
    commit_batches,
    id_of,
    make,
    make_checkout,
    quiet,
    register,
    row,
    tag_of,
    training_ids,
)

from flows.erase import follow_all, follow_reverted, list_is_pending, revert_batch
from ratchet.data.batches import read_manifest, read_reverted
from ratchet.errors import UserError
from ratchet.media.store import MediaStore
from ratchet.pipeline.checkout import git
from ratchet.promotion.champion import Champion, write_champion
from ratchet.promotion.lineage import reverted_since
from ratchet.services.status import ledger_lines, read_moves
from ratchet.tracking.registry import get_version
from tasks.erase import find_batch, inherit
from tasks.ingest import add_batch, freeze_golden, pull
from tests.media.test_media import encoded, noise, question

pytestmark = pytest.mark.filterwarnings(KEPT_CONNECTIONS)
FIRST, SECOND, THIRD = range(10), range(8, 20), range(20, 25)  # 8 and 9 are in two batches


def ids(*numbers: range) -> set[str]:
    return {id_of(row(number)) for part in numbers for number in part}


def bring(path: Path, numbers: range, month: int) -> str:
    name = add(path / "data/raw", [row(number) for number in numbers], month)
    commit_batches(path, f"Ingest\n\nBatch: {name}")
    return name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout with three batches and golden rows, prepared once."""
    path = tmp_path_factory.mktemp("revert") / "checkout"
    with pytest.MonkeyPatch.context() as patch:
        use_git_without_a_user(patch)
        golden = b"\n".join([row(12), row(13), row(900)]).decode() + "\n"
        make_checkout(path, {"data/golden.jsonl": golden, "data/forgotten.jsonl": ""})
        for month, numbers in enumerate((FIRST, SECOND, THIRD), start=1):
            bring(path, numbers, month)
        make(path)
        yield path


@pytest.fixture
def root(made, tmp_path, monkeypatch) -> Path:
    use_git_without_a_user(monkeypatch)
    use_mlflow(monkeypatch, tmp_path)
    shutil.copytree(made, tmp_path / "checkout", symlinks=True)
    return tmp_path / "checkout"


def names(root: Path) -> list[str]:
    return [batch.name for batch in read_manifest(root / "data/raw")]


def put_in_charge(root: Path, version: int, at: str) -> None:
    kept = {
        "run_key": "",
        "run_id": "",
        "batches": [],
        "data": {},
        "gate": {"verdict": "promote", "rival": None},
    }
    moved = {"at": "", "by": "Ana", "why": "", "move": "promote", "replaced": None, "previous": None}
    entry = Champion(name="small", version=version, commit=at, adapter_sha256="0" * 64, **kept, **moved)
    write_champion(root, entry)
    commit(root, f"Promote v{version}")


def test_a_batch_leaves_and_the_later_ones_stay(root):
    first, second, third = names(root)

    done = revert_batch(root, CONFIG, second, reason="wrong prices", say=quiet)

    assert names(root) == [first, third] and not (root / "data/raw" / second).exists()
    assert (done.batch.name, done.batch.rows, done.golden, done.versions) == (second, 12, 2, [])
    assert subjects(root)[0].startswith("Take back 12 rows") and git(root, "status", "--porcelain") == ""
    (entry,) = read_reverted(root)
    assert (entry.batch, entry.rows, entry.reason, entry.by) == (second, 12, "wrong prices", "Ana")
    make(root)
    assert training_ids(root) == ids(FIRST, THIRD), "rows that another batch has too are still trained on"


def test_a_batch_that_was_taken_back_can_come_again_mended(root):
    second = names(root)[1]
    revert_batch(root, CONFIG, second, reason="wrong prices", say=quiet)
    again = bring(root, SECOND, 4)

    assert names(root)[-1] == again != second
    make(root)
    assert training_ids(root) == ids(FIRST, SECOND, THIRD) - ids(range(12, 14)), "golden ones apart"


def test_versions_are_told_that_learned_it_and_those_that_went_on_from_them(root):
    before, (first, second, third) = git(root, "rev-parse", "HEAD").strip(), names(root)
    revert_batch(root, CONFIG, second, reason="wrong prices", say=quiet)
    after = make(root)
    register(1, before, [first, second, third])
    register(2, "0" * 40, [first, second])  # a commit that is not here
    register(3, "0" * 40, [first])
    register(4, after, [first, second, third])  # the list of batches still has it, its rows do not
    register(5, after, [first, third], start="1" * 64)

    follow_reverted(root, CONFIG, quiet)

    told = {"at": read_reverted(root)[0].at, "reason": "wrong prices"}
    assert tag_of(1, "reverted") == {"count": 8, "exact": True, **told}, (
        "of 12 rows 2 are golden, 2 came earlier"
    )
    assert tag_of(2, "reverted") == {"count": 12, "exact": False, **told}
    assert tag_of(3, "reverted") is None and tag_of(4, "reverted") is None
    assert tag_of(5, "reverted") == {"count": 0, "exact": True, **told, "from": 1}
    register(6, after, [first], start="5" * 64)
    inherit(get_version("small", 6))
    assert tag_of(6, "reverted") == {"count": 0, "exact": True, **told, "from": 5}


def test_git_alone_tells_what_a_commit_had_and_lost_later(root):
    with_two = git(root, "log", "-1", "--format=%H", "--grep", names(root)[1]).strip()
    with_one = git(root, "rev-parse", f"{with_two}~1").strip()
    with_all, second = git(root, "rev-parse", "HEAD").strip(), names(root)[1]
    done = revert_batch(root, CONFIG, second, reason="wrong prices", say=quiet)

    assert [entry.batch for entry in reverted_since(root, with_all)] == [second]
    assert [entry.batch for entry in reverted_since(root, with_two)] == [second]
    assert reverted_since(root, with_one) == [] == reverted_since(root, done.commit)
    for version, at in ((1, with_one), (2, with_all)):
        put_in_charge(root, version, at)
    told = "\n".join(ledger_lines(read_moves(root)))
    assert told.count("taken back later") == 1 and told.index(second) < told.index("→ v1")


def test_with_mlflow_away_the_batch_is_taken_back_and_the_marks_follow(root, monkeypatch):
    register(1, "0" * 40, names(root))
    known = os.environ["MLFLOW_TRACKING_URI"]
    use_no_mlflow(monkeypatch)

    done = revert_batch(root, CONFIG, names(root)[0], reason="old", say=quiet)

    assert done.versions is None and list_is_pending(root) and len(names(root)) == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", known)
    follow_all(root, CONFIG, quiet)
    assert tag_of(1, "reverted")["count"] == 10 and not list_is_pending(root)


def test_a_name_that_means_no_batch_or_several_is_refused_with_those_there_are(root):
    before = git(root, "rev-parse", "HEAD")
    for name in ("", "2026", "20270101T", "month-2"):
        with pytest.raises(UserError, match="month-3"):
            find_batch(root / "data/raw", name)
    with pytest.raises(UserError, match="no batch of data/raw begins with 'month-2'"):
        revert_batch(root, CONFIG, "month-2", reason="", say=quiet)

    assert find_batch(root / "data/raw", "20260201T").name == names(root)[1]
    assert git(root, "rev-parse", "HEAD") == before and len(names(root)) == 3


@pytest.mark.e2e
def test_the_command_says_what_it_took_back_and_what_stays(root):
    write_files(root, {"champion.json": ""})
    (root / "champion.json").unlink()
    command = [sys.executable, "-m", "ratchet.cli", "data", "revert", "20260201T", "--reason", "wrong prices"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=scaled(120), check=False)

    assert done.returncode == 0, done.stderr
    assert "12 rows" in done.stdout and "2 golden rows" in done.stdout and len(names(root)) == 2


def test_a_batch_leaves_with_its_pictures(tmp_path, monkeypatch):
    use_git_without_a_user(monkeypatch)
    use_mlflow(monkeypatch, tmp_path)
    root, files = tmp_path / "checkout", tmp_path / "files"
    make_checkout(root, {"data/golden.jsonl": "", "data/forgotten.jsonl": ""})
    files.mkdir()
    for number in range(12):
        (files / f"{number}.png").write_bytes(encoded(noise(number)))
    shown = [question(number, image=f"{number}.png") for number in range(12)]
    (files / "golden.jsonl").write_text("\n".join(map(json.dumps, shown[:2])))
    golden = pull(CONFIG, path=str(files / "golden.jsonl"))
    freeze_golden(root / "data/golden.jsonl", golden, CONFIG, rows=2, base=tmp_path / "none", tell=quiet)
    bring(root, FIRST, 1)
    (files / "rows.jsonl").write_text("\n".join(map(json.dumps, shown[2:])))
    pulled = pull(CONFIG, path=str(files / "rows.jsonl"))
    batch, _ = add_batch(root / "data/raw", pulled, licence="", who="tests")
    commit_batches(root, f"Ingest\n\nBatch: {batch.name}")

    make(root)
    shards = {path.name: len(MediaStore([path])) for path in (root / "data/prepared/media").iterdir()}
    assert shards == {"golden.tar": 2, batch.shard: 10}

    revert_batch(root, CONFIG, batch.name, reason="wrong pictures", say=quiet)
    assert not (root / "data/raw" / batch.shard).exists() and git(root, "status", "--porcelain") == ""
    make(root)
    assert [path.name for path in (root / "data/prepared/media").iterdir()] == ["golden.tar"]
    assert training_ids(root) == ids(FIRST)
