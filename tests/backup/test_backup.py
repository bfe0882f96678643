"""A project in one file, and back at another path after everything was destroyed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
from contextlib import closing
from pathlib import Path

import pytest
from places import commit, flip, make_repository, use_git_without_a_user, write_files
from typer.testing import CliRunner

from ratchet.backup.archive import MANIFEST, Manifest, packing, unpacking
from ratchet.backup.data import without_password
from ratchet.backup.make import DATA, GIT, back_up
from ratchet.backup.restore import restore
from ratchet.backup.state import STATE, state_files
from ratchet.cli.main import app
from ratchet.config.data import ProjectConfig
from ratchet.config.params import Config
from ratchet.data.examples import Message
from ratchet.engines.local_engine import LocalEngine
from ratchet.errors import CheckoutError, DamagedError, UserError
from ratchet.models.loading import adapter_sha256
from ratchet.pipeline.checkout import dvc, git
from ratchet.promotion.champion import Champion, Data, GateLine, read_champion, write_champion
from ratchet.serving.bundle import SERVING, make_bundle
from ratchet.serving.engine import Ask, Piece
from ratchet.verification.project import verify

CONFIG = Config(project=ProjectConfig(name="small"))
PIPELINE = """
stages:
  base: {cmd: cp -r ../made/base models/base, outs: [models/base]}
  train: {cmd: cp -r ../made/candidate models/candidate, deps: [strength], outs: [models/candidate]}
"""
QUESTION = (Message("user", "What does email.message do?"),)


def quiet(line: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def original(candidate: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a real version in charge; its cache gives links, as that of this repository does."""
    place = tmp_path_factory.mktemp("original")
    shutil.copytree(candidate, place / "made/candidate")
    shutil.copytree(tiny_base, place / "made/base")
    root = make_repository(place / "root", {"dvc.yaml": PIPELINE, "strength": "1"})
    write_files(root, {".gitignore": "/models\n.ratchet/\n"})
    (root / "models").mkdir()
    dvc(root, "config", "cache.type", "symlink")
    dvc(root, "repro", "--quiet")
    sha256, of = adapter_sha256(root / "models/candidate"), commit(root, "Train v1")
    gate = GateLine("promote", None)
    entry = Champion(
        *("small", 1, None, of, "key", "run", sha256, [], Data(), gate),
        *("2026-01-01T00:00:00Z", "Ana", "first", "promote", None),
    )
    write_champion(root, entry)
    git(root, "tag", "model/small/v1", commit(root, "Promote v1"))
    write_files(root, {".ratchet/rollouts.jsonl": "{}\n", ".ratchet/logs/gateway.log": "started\n"})
    write_files(root, {".ratchet/gateway.key": "k" * 32, ".ratchet/keys.json": "{}"})
    shutil.rmtree(place / "made")
    return root


@pytest.fixture
def root(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_git_without_a_user(monkeypatch)
    for name in [name for name in os.environ if name.startswith(("RATCHET_", "PREFECT_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    shutil.copytree(original, tmp_path / "root", symlinks=True)
    shutil.rmtree(tmp_path / "root/models")
    dvc(tmp_path / "root", "checkout", "--quiet")  # links into its own cache
    return tmp_path / "root"


def answer(root: Path) -> str:
    """What the gateway's loader and engine make of the version in charge."""
    champion = read_champion(root)
    assert champion is not None
    bundle = make_bundle(
        root,
        name=champion.name,
        version=champion.version,
        commit=champion.commit,
        adapter_sha256=champion.adapter_sha256,
    )
    engine = LocalEngine(CONFIG)

    async def whole() -> str:
        await engine.load(bundle)
        try:
            ask = Ask("id", champion.version, QUESTION, max_tokens=8)
            return "".join([part.text async for part in engine.answer(ask) if isinstance(part, Piece)])
        finally:
            await engine.close()

    return asyncio.run(whole())


def test_a_destroyed_project_is_restored_elsewhere_and_its_version_answers_the_same(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATCHET_GATEWAY_URL", "http://127.0.0.1:1")
    before, head = answer(root), git(root, "rev-parse", "HEAD")
    with closing(sqlite3.connect(root / ".ratchet/requests.db")) as log:
        log.execute("PRAGMA journal_mode = WAL")
        log.execute("CREATE TABLE requests (prompt)")
        log.execute("INSERT INTO requests VALUES ('hello')")
        log.commit()  # into the -wal file, which stays as long as this service is connected
        made = back_up(root, CONFIG, tmp_path / "backup.tar.gz", quiet)
    assert made.missing == [] and (made.versions, made.champion) == ([1], 1)
    assert made.left_out == [".ratchet/gateway.key: a secret, keep it apart"]
    assert (tmp_path / "backup.tar.gz").stat().st_mode & 0o777 == 0o600
    shutil.rmtree(root)
    place, _ = restore(tmp_path / "backup.tar.gz", tmp_path / "other/place", quiet)
    assert place == tmp_path / "other/place" and [path.name for path in place.parent.iterdir()] == ["place"]
    assert git(place, "rev-parse", "HEAD") == head and git(place, "status", "--porcelain") == ""
    with closing(sqlite3.connect(place / ".ratchet/requests.db")) as log:
        assert log.execute("SELECT prompt FROM requests").fetchall() == [("hello",)]
    state = {path.relative_to(place / ".ratchet").as_posix() for path in state_files(place)}
    assert state == {"requests.db", "rollouts.jsonl", "keys.json"}
    assert answer(place) == before != ""
    findings = {one.name: one.result for one in verify(place, CONFIG)}
    assert "wrong" not in findings.values()
    assert [findings[name] for name in ("ledger", "tags", "data", "versions")] == ["ok"] * 4


def test_a_copied_checkout_serves_although_its_old_cache_is_gone(root: Path, tmp_path: Path) -> None:
    before = answer(root)
    root.rename(tmp_path / "moved")
    assert answer(tmp_path / "moved") == before


def digests(folder: Path) -> set[str]:
    return {path.parent.name + path.name for path in folder.rglob("*") if path.is_file()}


def test_data_that_the_remote_holds_stay_there_and_what_a_push_left_behind_is_packed(
    root: Path, tmp_path: Path
) -> None:
    """A push of all commits takes each commit's own settings: v1 is older than the remote."""
    git(root, "rm", "--quiet", "dvc.lock", "dvc.yaml")
    write_files(root, {"rows": "new rows\n"})
    dvc(root, "add", "--quiet", "rows")
    dvc(root, "remote", "add", "--quiet", "--default", "store", str(tmp_path / "store"))
    commit(root, "Begin anew, with a remote")
    dvc(root, "push", "--quiet", "--all-commits")
    pushed, here = digests(tmp_path / "store"), digests(root / ".dvc/cache/files/md5")
    assert pushed and here > pushed
    made = back_up(root, CONFIG, tmp_path / "part.tar.gz", quiet)
    packed = {name.removeprefix(f"{DATA}/").replace("/", "") for name in made.files if name.startswith(DATA)}
    assert packed == here - pushed and made.data_remote is not None
    place, _ = restore(tmp_path / "part.tar.gz", tmp_path / "place", quiet)
    assert (place / "rows").read_text() == "new rows\n"
    whole = back_up(root, CONFIG, tmp_path / "whole.tar.gz", quiet, whole=True)
    assert sum(name.startswith(DATA) for name in whole.files) == len(here) and whole.data_remote is None


def test_a_remotes_address_is_kept_without_what_lets_one_in() -> None:
    kept = ["ssh://git@host/x", "git@host:x", "/mnt/x", "s3://bucket/x", "https://host/x"]
    given = [*kept[:4], "https://token@host/x"]
    assert [without_password(url) for url in given] == kept
    assert without_password("ssh://ana:secret@host/x") == "ssh://ana@host/x"


def test_lost_data_are_told_with_the_version_that_needs_them_and_damaged_ones_are_refused(
    root: Path, tmp_path: Path
) -> None:
    weights = (root / "models/candidate/adapter_model.safetensors").resolve()
    flip(weights)
    with pytest.raises(DamagedError, match=f"rm -f {weights}"):
        back_up(root, CONFIG, tmp_path / "damaged.tar.gz", quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    weights.unlink()
    made = back_up(root, CONFIG, tmp_path / "backup.tar.gz", quiet)
    assert made.missing[:2] == ["HEAD: models/candidate", "v1: models/candidate"]


def test_what_would_be_lost_or_overwritten_is_refused_before_anything_is_written(
    root: Path, tmp_path: Path
) -> None:
    write_files(tmp_path, {"there.tar.gz": "old", "full/file": "old"})
    with pytest.raises(UserError, match="exists"):
        back_up(root, CONFIG, tmp_path / "there.tar.gz", quiet)
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", "--depth", "1", f"file://{root}", str(clone))
    with pytest.raises(CheckoutError, match="--unshallow"):
        back_up(clone, CONFIG, tmp_path / "cut.tar.gz", quiet)
    with pytest.raises(UserError, match="not empty"):
        restore(tmp_path / "there.tar.gz", tmp_path / "full", quiet)
    with pytest.raises(DamagedError, match="cannot be unpacked"):
        restore(tmp_path / "there.tar.gz", tmp_path / "new", quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clone", "full", "root", "there.tar.gz"]


def small_archive(path: Path) -> Path:
    write_files(path.parent / "files", {"one": "one " * 300, "two": "two"})
    with packing(path) as packer:
        for name in ("one", "two"):
            packer.add(path.parent / "files" / name, name)
        packer.finish(EMPTY)
    return path


def test_a_flipped_byte_anywhere_is_refused_or_changes_no_file(tmp_path: Path) -> None:
    archive = small_archive(tmp_path / "small.tar.gz")
    size, refused = archive.stat().st_size, 0
    for at in range(size):
        flip(archive, at=at)
        try:
            with unpacking(archive, tmp_path / "place") as unpacked:
                assert (unpacked.folder / "one").read_text() == "one " * 300
                assert (unpacked.folder / "two").read_text() == "two"
        except DamagedError:
            refused += 1
        flip(archive, at=at)
    assert refused > 0.8 * size, "the others are gzip's header, and another way to write the same zeros"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "small.tar.gz"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_cut_archive_is_refused(tmp_path: Path, share: float) -> None:
    archive = small_archive(tmp_path / "small.tar.gz")
    archive.write_bytes(archive.read_bytes()[: int(archive.stat().st_size * share)])
    with pytest.raises(DamagedError), unpacking(archive, tmp_path / "place"):
        raise AssertionError("it was taken")


EMPTY = Manifest("small", "", "main", "", [], None, {}, None, [], [])


def add_member(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


@pytest.mark.parametrize(
    "member",
    [
        *(add_member("../outside"), add_member("a/../../outside"), add_member("link", tarfile.SYMTYPE)),
        *(add_member("hard", tarfile.LNKTYPE), add_member("pipe", tarfile.FIFOTYPE), add_member("stranger")),
    ],
    ids=lambda member: member.name,
)
def test_a_member_that_leads_out_is_a_link_or_is_not_in_the_manifest_is_refused(
    tmp_path: Path, member: tarfile.TarInfo
) -> None:
    small, evil = small_archive(tmp_path / "small.tar.gz"), tmp_path / "evil.tar.gz"
    (tmp_path / "inner").mkdir()
    with tarfile.open(small) as good, tarfile.open(evil, "w:gz") as bad:
        bad.addfile(member)
        for one in good:
            bad.addfile(one, good.extractfile(one))
    with pytest.raises(DamagedError), unpacking(evil, tmp_path / "inner/place"):
        raise AssertionError("it was taken")
    assert not (tmp_path / "outside").exists()


def test_a_backup_that_is_interrupted_leaves_no_file_and_one_that_is_killed_none_of_its_name(
    root: Path, tmp_path: Path
) -> None:
    place = tmp_path / "backups"
    place.mkdir()
    code = (
        "import os, signal, sys; from ratchet.backup import make; from ratchet.cli.main import main\n"
        "make.pack_state = lambda root, packer: os.kill(os.getpid(), int(os.environ['SIGNAL']))\n"
        "main()"
    )
    for number, left in ((signal.SIGTERM, 0), (signal.SIGKILL, 1)):
        done = subprocess.run(
            [sys.executable, "-c", code, "-C", str(root), "backup", str(place / "backup.tar.gz")],
            env={**os.environ, "SIGNAL": str(int(number))},
            capture_output=True,
            check=False,
        )
        assert done.returncode in (130, -signal.SIGKILL), done.stderr
        assert len(list(place.iterdir())) == left and not (place / "backup.tar.gz").exists()


def test_the_commands_say_what_is_left_out_and_what_to_run_next(root: Path, tmp_path: Path) -> None:
    call, file = CliRunner(), str(tmp_path / "backup.tar.gz")
    made = call.invoke(app, ["-C", str(root), "backup", file])
    assert made.exit_code == 0 and "left out  .ratchet/gateway.key" in made.stdout
    done = call.invoke(app, ["restore", file, "--into", str(tmp_path / "place")])
    assert done.exit_code == 0 and "v1 in charge" in done.stdout and "ratchet verify" in done.stdout
    assert not (tmp_path / "place" / SERVING).exists() and not (tmp_path / "place/.ratchet/landing").exists()
    with tarfile.open(file) as tar:
        names = tar.getnames()
    assert names[0] == GIT and names[-1] == MANIFEST and f"{STATE}/keys.json" in names
