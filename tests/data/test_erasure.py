"""Forgotten rows: out of every later training, listed without a word of theirs, traced to versions."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import scaled
from places import (
    KEPT_CONNECTIONS,
    subjects,
    use_git_without_a_user,
    use_mlflow,
    use_no_mlflow,
    write_files,
)
from small_checkout import (
    CONFIG,
    ROOT,
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

from flows.erase import erase_rows, find_rows, follow_list, list_is_pending
from ratchet.config.data import PrepareConfig
from ratchet.data.batches import write_batch
from ratchet.data.erasure import FILE, Entry, Forgotten, read_forgotten, write_forgotten
from ratchet.data.examples import read_examples
from ratchet.data.profile import SPLITS, Profile
from ratchet.errors import DataError, UserError
from ratchet.gateway.identity import Ids
from ratchet.pipeline.checkout import dvc, git
from ratchet.tracking.registry import get_version
from tasks.erase import Found, Query, extend, find, inherit
from tasks.prepare import prepare

pytestmark = pytest.mark.filterwarnings(KEPT_CONNECTIONS)
LENIENT = PrepareConfig(min_rows=1, test_share=0.0, validation_share=0.0)
SECRET = "Zebulon Quisling"


def matching(pattern: str) -> Query:
    return Query(pattern=re.compile(pattern))


# --- preparation --------------------------------------------------------------------------------------------


def prepared(folder: Path, forgotten: Forgotten, config: PrepareConfig = LENIENT) -> tuple[Profile, set[str]]:
    profile = prepare(folder / "raw", folder / "golden.jsonl", folder / "out", config, forgotten=forgotten)
    return profile, {
        example.id
        for split in (*SPLITS, "golden")
        for example in read_examples(folder / f"out/{split}.jsonl")
    }


def entry(id: str, batch: str = "", line: int = 0) -> Entry:
    return Entry([id] if id else [], batch, line, "by hand", "Ana", "2026-01-01T00:00:00Z")


def test_forgotten_rows_are_left_out_with_their_copies_and_counted_apart(tmp_path):
    gone, kept = row(1), row(2)
    add(tmp_path / "raw", [gone, kept, row(3)])
    add(tmp_path / "raw", [row(4), gone], month=2)
    profile, ids = prepared(tmp_path, Forgotten([entry(id_of(gone))]))
    assert ids == {id_of(row(number)) for number in (2, 3, 4)}
    total = profile.total
    assert (total.rows, total.accepted["rows"]) == (5, 3)
    assert total.rejected == {"rows": 2, "forgotten": 2}
    assert b"n1w" not in (tmp_path / "out/rejected.jsonl").read_bytes(), "no word of them"


def test_a_forgotten_golden_row_is_left_out_and_others_may_take_its_line(tmp_path):
    add(tmp_path / "raw", [row(1)])
    (tmp_path / "golden.jsonl").write_bytes(row(7) + b"\n" + row(8) + b"\n")
    profile, ids = prepared(tmp_path, Forgotten([entry(id_of(row(7)), "golden", 1)]))
    assert profile.golden == 1 and ids == {id_of(row(1)), id_of(row(8))}
    (tmp_path / "golden.jsonl").write_bytes(row(9) + b"\n")
    assert id_of(row(9)) in prepared(tmp_path, Forgotten([entry(id_of(row(7)), "golden", 1)]))[1]


def test_a_place_holds_whatever_the_row_has_become(tmp_path):
    """Its id changes when texts are normalised in another way."""
    batch = add(tmp_path / "raw", [row(1), row(2)])
    assert prepared(tmp_path, Forgotten([entry("f" * 32, batch, 2)]))[1] == {id_of(row(1))}


def test_forgotten_rows_count_to_no_limit(tmp_path):
    batch = add(tmp_path / "raw", [*(row(number) for number in range(20)), b"{", b"{", b"{"])
    strict = LENIENT.model_copy(update={"max_rejected_share": 0.0})
    with pytest.raises(DataError, match="3 of 23 rows"):
        prepared(tmp_path, Forgotten(), strict)
    profile, _ = prepared(
        tmp_path,
        Forgotten(
            [
                *(entry("", batch, line) for line in (21, 22, 23)),
                *(entry("", batch, line) for line in range(1, 15)),
            ]
        ),
        strict,
    )
    assert profile.total.rejected == {"rows": 17, "forgotten": 17}


def test_no_other_row_moves_to_another_split(tmp_path):
    """The first row of a cluster decides for its near duplicates, forgotten or not."""
    config = PrepareConfig(min_rows=1, test_share=0.3, validation_share=0.2)
    first = [row(number) for number in range(60)]
    near = [
        json.dumps({"question": json.loads(line)["question"] + " too", "answer": "near"}).encode()
        for line in first
    ]
    add(tmp_path / "raw", [*first, *near])

    def splits(forgotten: Forgotten) -> dict[str, str]:
        prepare(tmp_path / "raw", tmp_path / "golden.jsonl", tmp_path / "out", config, forgotten=forgotten)
        return {
            example.id: split
            for split in SPLITS
            for example in read_examples(tmp_path / f"out/{split}.jsonl")
        }

    before, after = splits(Forgotten()), splits(Forgotten(entry(id_of(line)) for line in first))
    assert after == {id: split for id, split in before.items() if id in {id_of(line) for line in near}}
    assert len(after) == 60 and set(after.values()) == set(SPLITS)


def test_a_list_that_is_broken_stops_rather_than_letting_rows_through(tmp_path):
    (tmp_path / "forgotten.jsonl").write_text('{"id": "')
    with pytest.raises(DataError, match=r"holds a line that is no entry"):
        read_forgotten(tmp_path / "forgotten.jsonl")


def test_the_list_comes_back_as_it_was_written(tmp_path):
    written = Forgotten([entry("a" * 32, "one.jsonl", 3), entry("", "two.jsonl", 1)])
    write_forgotten(tmp_path / "forgotten.jsonl", written)
    assert read_forgotten(tmp_path / "forgotten.jsonl").entries == written.entries
    assert read_forgotten(tmp_path / "nowhere.jsonl").entries == ()
    assert not Forgotten().holds("", "golden", 1)


# --- finding ------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path) -> tuple[Path, Path, str]:
    lines = [
        row(1),
        row(2, f"says {SECRET}"),
        row(3, user="ana"),
        f'{{"question": "{SECRET}"}}'.encode(),
        f"no json {SECRET}".encode(),
        row(6, note=SECRET),
        row(7, taught_by="ana"),
    ]
    name = add(tmp_path / "raw", lines)
    (tmp_path / "golden.jsonl").write_bytes(row(8) + b"\n" + row(9, f"and {SECRET}") + b"\n")
    return tmp_path / "raw", tmp_path / "golden.jsonl", name


def test_a_pattern_is_found_in_every_text_of_whole_and_broken_rows(rows):
    raw, golden, name = rows
    found = find(raw, golden, matching("(?i)zebulon"), LENIENT)
    assert [row.place for row in found] == [f"{name}:2", f"{name}:4", f"{name}:5", f"{name}:6", "golden:2"]
    assert [bool(row.ids) for row in found] == [True, False, False, True, True]
    assert find(raw, golden, matching("^question$"), LENIENT) == [], "keys are no texts"
    deep = b'{"question": "a", "answer": "b", "meta": ' + b'{"x": ' * 900 + b'"deep"' + b"}" * 901
    (raw.parent / "golden.jsonl").write_bytes(deep)
    assert [row.line for row in find(raw, golden, matching("^deep$"), LENIENT)] == [1]


def test_a_pattern_finds_what_is_written_with_combining_marks(tmp_path):
    apart = "Zoe\u0308"
    add(
        tmp_path / "raw",
        [
            row(1, apart),
            row(2, note=apart),
            json.dumps({"question": apart}, ensure_ascii=False).encode(),
            apart.encode(),
        ],
    )
    assert [
        row.line for row in find(tmp_path / "raw", tmp_path / "golden.jsonl", matching("Zo\u00eb"), LENIENT)
    ] == [1, 2, 3, 4]


def test_rows_are_found_by_id_and_by_who_is_named(rows):
    raw, golden, name = rows
    assert find(raw, golden, Query(id=id_of(row(1))), LENIENT) == [Found([id_of(row(1))], name, 1)]
    assert [row.line for row in find(raw, golden, Query(names=frozenset({"ana"})), LENIENT)] == [3, 7]
    assert find(raw, golden, Query(names=frozenset({"an"})), LENIENT) == []


def test_a_row_that_is_changed_by_preparation_is_known_by_both_of_its_hashes(tmp_path):
    """Versions learned from the one or from the other, as their settings were."""
    mail, config = "write to zed@example.org", LENIENT.model_copy(update={"personal_data": "mask"})
    add(tmp_path / "raw", [row(1, mail), row(2)])
    [found] = find(tmp_path / "raw", tmp_path / "golden.jsonl", matching("zed@"), config)
    written, masked = found.ids
    assert written == id_of(row(1, mail)) != masked
    assert masked in prepared(tmp_path, Forgotten(), config)[1]
    for known in (written, masked):
        ids = prepared(tmp_path, Forgotten([entry(known, found.batch, found.line)]), config)[1]
        assert ids == {id_of(row(2))}


def test_a_forgotten_correction_is_no_last_word(tmp_path):
    """The row that it superseded counts again."""
    wrong, right = (
        json.dumps({"question": "one and one and one?", "answer": answer}).encode()
        for answer in ("two", "three")
    )
    add(tmp_path / "raw", [wrong])
    write_batch(
        tmp_path / "raw",
        [right],
        source="feedback",
        label="feedback",
        time="2026-02-01T00:00:00Z",
        licence="CC0-1.0",
        who="tests",
        form="auto",
    )
    assert prepared(tmp_path, Forgotten())[1] == {id_of(right)}
    assert prepared(tmp_path, Forgotten([entry(id_of(right))]))[1] == {id_of(wrong)}


def test_what_is_on_the_list_is_not_put_there_again():
    found = [Found(["a" * 32], "one.jsonl", 1), Found([], "one.jsonl", 2)]
    once = extend(Forgotten(), found, reason="ticket 12", by="Ana")
    assert (
        extend(once, [*found, Found(["b" * 32], "one.jsonl", 3)], reason="again", by="Ben").entries[:2]
        == once.entries
    )
    assert len(extend(once, found, reason="again", by="Ben").entries) == 2


# --- the whole way, with git, DVC and MLflow ----------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout with code, two batches, a golden row, prepared data in dvc.lock; copied for each test."""
    path = tmp_path_factory.mktemp("made") / "checkout"
    with pytest.MonkeyPatch.context() as patch:
        use_git_without_a_user(patch)
        make_checkout(path, {str(FILE): "", "data/golden.jsonl": row(90, SECRET).decode() + "\n"})
        add(path / "data/raw", [row(number, SECRET if number == 3 else "") for number in range(10)])
        commit_batches(path, "First batch")
        make(path)
        yield path


@pytest.fixture
def root(made, tmp_path, monkeypatch) -> Path:
    use_git_without_a_user(monkeypatch)
    use_mlflow(monkeypatch, tmp_path)
    shutil.copytree(made, tmp_path / "checkout", symlinks=True)
    return tmp_path / "checkout"


def batch_of(root: Path) -> str:
    return str(json.loads((root / "data/raw/manifest.jsonl").read_text().splitlines()[0])["name"])


def test_a_retraining_after_it_does_without_the_rows_and_git_holds_no_word_of_them(root):
    gone = id_of(row(3, SECRET))
    assert gone in training_ids(root)
    found = find_rows(root, CONFIG, matching(SECRET), quiet)
    assert [row.place for row in found] == [f"{batch_of(root)}:4", "golden:1"]

    done = erase_rows(root, CONFIG, found, reason="ticket 12", say=quiet)

    assert (done.rows, done.commit, subjects(root)[0]) == (
        2,
        git(root, "rev-parse", "HEAD").strip(),
        "Forget 2 rows",
    )
    assert git(root, "show", "--format=", "--name-only", "HEAD").split() == [str(FILE)]
    assert SECRET not in git(root, "show", "HEAD") and "Zebulon" not in (root / FILE).read_text()
    assert read_forgotten(root / FILE).ids == {gone, id_of(row(90, SECRET))}
    assert gone in training_ids(root), "nothing is rewritten in place"
    make(root)
    assert training_ids(root) == {id_of(row(number)) for number in range(10) if number != 3}
    assert (root / "data/prepared/golden.jsonl").read_text() == ""
    again = erase_rows(root, CONFIG, found, reason="once more", say=quiet)
    assert (again.rows, subjects(root)[0]) == (0, "Retrain")


def test_versions_are_traced_by_their_training_rows_or_else_by_their_batches(root):
    before, batch = git(root, "rev-parse", "HEAD").strip(), batch_of(root)
    erase_rows(root, CONFIG, [Found([id_of(row(3, SECRET))], batch, 4)], reason="ticket 12", say=quiet)
    after = make(root)
    register(1, before, [batch])
    register(2, "0" * 40, [batch])  # a commit that is not here
    register(3, "--output=oops", ["another.jsonl"])
    register(4, after, [batch])
    register(5, after, [batch], start="1" * 64)
    register(6, after, [batch], start="5" * 64)

    follow_list(root, CONFIG, quiet)

    at = read_forgotten(root / FILE).entries[0].at
    told = {"at": at, "reason": "ticket 12"}
    assert tag_of(1, "forget") == {"count": 1, "exact": True, **told}
    assert tag_of(2, "forget") == {"count": 1, "exact": False, **told}
    assert tag_of(3, "forget") is None and tag_of(4, "forget") is None
    assert tag_of(5, "forget") == {"count": 0, "exact": True, **told, "from": 1}, (
        "its weights went on from those of v1"
    )
    assert tag_of(6, "forget") == {"count": 0, "exact": True, **told, "from": 5}
    assert not (root / "oops").exists()


def test_a_new_version_inherits_the_mark_of_the_weights_that_it_went_on_from(root):
    register(1, "0" * 40, [batch_of(root)])
    erase_rows(
        root, CONFIG, [Found([id_of(row(3, SECRET))], batch_of(root), 4)], reason="ticket 12", say=quiet
    )
    register(2, "0" * 40, [], start="1" * 64)
    register(3, "0" * 40, [])
    for number in (2, 3):
        inherit(get_version("small", number))
    assert tag_of(2, "forget") == tag_of(1, "forget") | {"count": 0, "exact": True, "from": 1}
    assert tag_of(3, "forget") is None


def test_with_mlflow_away_the_rows_are_forgotten_and_the_marks_follow(root, monkeypatch):
    register(1, "0" * 40, [batch_of(root)])
    known = os.environ["MLFLOW_TRACKING_URI"]
    use_no_mlflow(monkeypatch)
    told: list[str] = []

    done = erase_rows(
        root, CONFIG, [Found([id_of(row(3, SECRET))], batch_of(root), 4)], reason="ticket 12", say=told.append
    )

    assert (done.rows, done.versions, list_is_pending(root)) == (1, None, True)
    assert any("marked later" in line for line in told)
    assert subjects(root)[0] == "Forget 1 row"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", known)
    assert tag_of(1, "forget") is None
    assert [entry.version for entry in follow_list(root, CONFIG, quiet)] == [1]
    assert tag_of(1, "forget")["count"] == 1 and not list_is_pending(root)


def test_a_pending_mark_keeps_a_retraining_from_having_nothing_to_do(root):
    from flows.retrain import is_in_charge
    from ratchet.evaluation.report import Metrics
    from ratchet.models.manifests import TrainedManifest
    from ratchet.promotion.champion import Champion, GateLine
    from ratchet.promotion.verdict import Candidate, Rival, Verdict
    from tasks.record import Findings

    kept = {
        "previous": None,
        "commit": "",
        "run_id": "",
        "adapter_sha256": "",
        "batches": [],
        "data": {},
        "at": "",
        "by": "",
        "why": "",
        "move": "promote",
        "replaced": None,
    }
    champion = Champion(name="small", version=1, run_key="key1", gate=GateLine("promote", None), **kept)
    verdict = Verdict("promote", [], Rival("base", None), [], Candidate("key1", ""))
    found = Findings(TrainedManifest(run_key="key1"), {}, Metrics(None), verdict, {}, root)
    assert is_in_charge(root, champion, found)
    write_files(root, {".ratchet/forget-pending": "1 rows\n"})
    assert not is_in_charge(root, champion, found)


def test_what_is_nowhere_is_refused(root):
    with pytest.raises(UserError, match="no row of any batch"):
        find_rows(root, CONFIG, matching("nobody says this"), quiet)


# --- the command --------------------------------------------------------------------------------------------


def ratchet(root: Path, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ratchet.cli", "-C", str(root), *arguments],
        cwd=ROOT,
        input=given,
        capture_output=True,
        text=True,
        check=False,
        timeout=scaled(100),
    )


@pytest.mark.e2e
def test_the_command_shows_asks_and_says_how_to_purge(root):
    dry = ratchet(root, "data", "erase", "--match", SECRET, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout == f"2 rows (batch:line):\n  {batch_of(root)}:4\n  golden:1\n"
    refused = ratchet(root, "data", "erase", "--match", SECRET, given="n\n")
    assert (
        refused.returncode == 1 and f"{batch_of(root)}:4" in refused.stderr and subjects(root)[0] == "Retrain"
    )
    write_files(root, {".ratchet/gateway.key": "k" * 32})
    nobody = ratchet(root, "data", "erase", "--user", "ana")
    assert nobody.returncode == 2 and "no row of any batch" in nobody.stderr
    for wrong in ([], ["--match", "a", "--user", "b"], ["--id", "abc"], ["--match", "("]):
        assert ratchet(root, "data", "erase", *wrong).returncode == 2


@pytest.mark.e2e
def test_following_the_commands_purges_the_bytes(root):
    """As they are printed, but for the retraining, the ingest of what is kept, and git's history."""
    done = ratchet(root, "data", "erase", "--match", SECRET, "--yes", "--reason", "ticket 12")
    assert done.returncode == 0, done.stderr
    assert "2 rows are newly on the list" in done.stdout
    make(root)
    lines = [
        line.strip()
        for line in done.stdout.splitlines()
        if line.startswith("  ") and line.strip().startswith(("sed", "dvc"))
    ]
    assert [line.split()[0] for line in lines] == ["sed", "dvc", "dvc", "sed", "dvc"]
    write_batch_beside(root)
    for line in [*lines[:2], lines[2].partition(" && ratchet")[0], lines[3]]:
        shell(root, line)
    assert (
        SECRET not in (root / ".ratchet/kept.jsonl").read_text()
        and len((root / ".ratchet/kept.jsonl").read_text().splitlines()) == 9
    )
    make(root)
    shell(root, lines[4])
    assert [
        path
        for path in (root / ".dvc/cache").rglob("*")
        if path.is_file() and b"Zebulon" in path.read_bytes()
    ] == []
    assert [
        json.loads(line)["rows"] for line in (root / "data/raw/manifest.jsonl").read_text().splitlines()
    ] == [5]


def write_batch_beside(root: Path) -> None:
    """Something has to be left when the first batch is taken out."""
    dvc(root, "unprotect", "data/raw")
    add(root / "data/raw", [row(number) for number in range(20, 25)], month=2)


def shell(root: Path, line: str) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
    }
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=scaled(100),
    )
    assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_a_person_is_found_by_the_pseudonym_that_the_gateway_gave(tmp_path):
    from ratchet.gateway.identity import known_pseudonym

    assert known_pseudonym(tmp_path, "ana") == "" and not (tmp_path / ".ratchet").exists()
    assert Ids(tmp_path).pseudonym("ana") == known_pseudonym(tmp_path, "ana")
