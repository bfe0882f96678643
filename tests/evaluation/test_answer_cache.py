"""Cached answers: nothing but time depends on them, an unchanged model is not even loaded, and what is broken
is not believed.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from ratchet.data.examples import encode_line, read_examples
from ratchet.evaluation import scoring
from ratchet.evaluation.answer_cache import Answers, forget_oldest, identity, open_answers
from ratchet.evaluation.scoring import batches
from ratchet.files import read_json, write_bytes, write_json
from tasks.evaluate import evaluate

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory, candidate: Path) -> Path:
    """Other weights than the candidate's, of the same shape."""
    folder = tmp_path_factory.mktemp("answers") / "incumbent"
    shutil.copytree(candidate, folder)
    tensors = load_file(folder / WEIGHTS)
    save_file(
        {name: tensor * 0.5 for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"}
    )
    write_json(folder / "manifest.json", {**read_json(folder / "manifest.json"), "version": 1})
    return folder


@pytest.fixture(scope="module")
def filled(
    tmp_path_factory: pytest.TempPathFactory,
    prepared: Path,
    tiny_base: Path,
    champion: Path,
    candidate: Path,
    tiny_config: Any,
) -> tuple[Path, Path]:
    """(an evaluation without a cache, the cache that an equal one has filled)."""
    folder = tmp_path_factory.mktemp("filled")
    evaluate(prepared, tiny_base, champion, candidate, folder / "without", tiny_config)
    evaluate(
        prepared, tiny_base, champion, candidate, folder / "filling", tiny_config, cache=folder / "answers"
    )
    assert bytes_of(folder / "filling") == bytes_of(folder / "without")
    return folder / "without", folder / "answers"


@pytest.fixture
def cache(filled: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled[1], tmp_path / "answers"))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the folders that models are loaded from, as they are."""
    found: list[str] = []
    for name in ("load_base_of", "load_trained", "load_adapter"):
        real = getattr(scoring, name)

        def watched(*arguments: Any, real: Any = real, **settings: Any) -> Any:
            found.append(next(path for path in reversed(arguments) if isinstance(path, Path)).name)
            return real(*arguments, **settings)

        monkeypatch.setattr(scoring, name, watched)
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_with_everything_cached_no_model_is_loaded_and_the_bytes_are_the_same(
    tmp_path, prepared, tiny_base, champion, candidate, tiny_config, filled, cache, loaded
):
    evaluate(prepared, tiny_base, champion, candidate, tmp_path / "out", tiny_config, cache=cache)
    assert loaded == []
    assert bytes_of(tmp_path / "out") == bytes_of(filled[0])


def test_an_unchanged_champion_is_not_asked_again(
    tmp_path, prepared, tiny_base, champion, candidate, tiny_config, cache, loaded
):
    shutil.copytree(candidate, tmp_path / "candidate")
    tensors = load_file(tmp_path / "candidate" / WEIGHTS)
    save_file(
        {name: tensor * 0.9 for name, tensor in tensors.items()},
        tmp_path / "candidate" / WEIGHTS,
        metadata={"format": "pt"},
    )
    evaluate(
        prepared, tiny_base, champion, tmp_path / "candidate", tmp_path / "out", tiny_config, cache=cache
    )
    assert loaded == ["candidate"]
    evaluate(prepared, tiny_base, champion, tmp_path / "candidate", tmp_path / "without", tiny_config)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "without")


def test_what_was_a_candidate_is_known_as_a_champion(tmp_path, tiny_base, candidate):
    shutil.copytree(candidate, tmp_path / "incumbent")
    write_json(
        tmp_path / "incumbent/manifest.json",
        {**read_json(candidate / "manifest.json"), "version": 7, "oldest": None},
    )
    assert identity(tiny_base, tmp_path / "incumbent", candidate) == identity(tiny_base, candidate, candidate)


@pytest.mark.parametrize("what", ["weights", "scale", "tokenizer", "threads", "code"])
def test_whatever_an_answer_depends_on_makes_another_model(tmp_path, tiny_base, candidate, monkeypatch, what):
    folder, base = (
        Path(shutil.copytree(candidate, tmp_path / "candidate")),
        Path(shutil.copytree(tiny_base, tmp_path / "base")),
    )
    before = identity(base, folder, folder)
    if what == "weights":
        save_file(
            {name: tensor * 2 for name, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS
        )
    elif what == "scale":
        write_json(
            folder / "adapter_config.json", {**read_json(folder / "adapter_config.json"), "lora_alpha": 99}
        )
    elif what == "tokenizer":
        write_json(
            base / "tokenizer_config.json", {**read_json(base / "tokenizer_config.json"), "added": True}
        )
    elif what == "threads":
        monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    else:
        monkeypatch.setattr("ratchet.evaluation.answer_cache.CODE", ("ratchet/evaluation/answer_cache.py",))
    assert identity(base, folder, folder) != before


def test_new_rows_leave_the_forward_batches_of_old_ones_alone(
    tmp_path, prepared, tiny_base, champion, candidate, tiny_config, cache
):
    """Those of another data batch; so only they are computed, and nothing moves, not even a last bit."""
    shutil.copytree(prepared, tmp_path / "prepared")
    rows = list(read_examples(prepared / "test.jsonl"))
    first = sorted({row.meta["batch"] for row in rows})[0]
    write_bytes(
        tmp_path / "prepared/test.jsonl", [encode_line(row) for row in rows if row.meta["batch"] == first]
    )
    evaluate(tmp_path / "prepared", tiny_base, champion, candidate, tmp_path / "early", tiny_config)
    evaluate(prepared, tiny_base, champion, candidate, tmp_path / "late", tiny_config, cache=cache)
    early, late = (pd.read_parquet(tmp_path / name / "scores.parquet") for name in ("early", "late"))
    early, late = (
        table[(table.model != "simple") & (table.batch == first)].reset_index(drop=True)
        for table in (early, late)
    )
    pd.testing.assert_frame_equal(
        early[["id", "model", "answer", "answer_nll"]],
        late[["id", "model", "answer", "answer_nll"]],
        check_exact=True,
    )


def test_batches_follow_from_the_rows_of_their_group_alone():
    ids = [[1, 2, 3], [4], [5, 6], [7], [8, 9]]
    assert list(batches(ids, ["a", "b", "a", "a", "a"], 2)) == [[3, 2], [4, 0], [1]]
    turned = list(batches(ids[::-1], ["a", "a", "a", "b", "a"], 2))
    assert [[ids[::-1][place] for place in batch] for batch in turned] == [
        [[7], [5, 6]],
        [[8, 9], [1, 2, 3]],
        [[4]],
    ]


# --- what is broken ---


@pytest.mark.parametrize("damage", ["no database", "cut", "a changed answer", "a changed key", "a folder"])
def test_a_broken_file_is_passed_over_with_a_message(
    tmp_path, prepared, tiny_base, champion, candidate, tiny_config, filled, cache, damage, capsys
):
    for path in cache.glob("*.db"):
        if damage == "no database":
            path.write_bytes(b"not a database at all" * 400)
        elif damage == "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
        elif damage == "a folder":
            path.unlink()
            path.mkdir()
        else:
            known = sqlite3.connect(path)
            with known:
                known.execute(
                    "update answers set value = replace(value, '1', '2')"
                    if damage == "a changed answer"
                    else "update answers set key = substr(key, 2) || substr(key, 1, 1)"
                )
            known.close()
    evaluate(prepared, tiny_base, champion, candidate, tmp_path / "out", tiny_config, cache=cache)
    assert bytes_of(tmp_path / "out") == bytes_of(filled[0])
    said = capsys.readouterr().err
    assert ("passed over" in said or "computed again" in said) == (damage != "a changed key")


def test_a_locked_file_is_left_alone(tmp_path, capsys):
    with open_answers(tmp_path, "one") as answers:
        answers.put("key", [1])
    holder = sqlite3.connect(tmp_path / "one.db", isolation_level=None)
    holder.execute("begin exclusive")
    before = (tmp_path / "one.db").read_bytes()
    answers = Answers(tmp_path / "one.db", patience=0.01)
    assert answers.get("key", 1) is None
    answers.close()
    holder.close()
    assert (tmp_path / "one.db").read_bytes() == before
    assert "database is locked" in capsys.readouterr().err


def test_an_answer_of_another_number_of_rows_is_not_taken(tmp_path):
    with open_answers(tmp_path, "one") as answers:
        answers.put("key", ["a", "b"])
        assert answers.get("key", 2) == ["a", "b"]
        assert answers.get("key", 3) is None
        assert answers.get("another", 2) is None


# --- room ---


def test_the_model_that_was_asked_longest_ago_is_forgotten_first(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        with open_answers(tmp_path, name) as answers:
            answers.put("key", ["x" * 450 * 1024])
        os.utime(tmp_path / f"{name}.db", (1e9 - age, 1e9 - age))
    forget_oldest(tmp_path, 1)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["middle", "new"]
    with open_answers(tmp_path, "middle"):  # asking it makes it the newest
        pass
    with open_answers(tmp_path, "third") as answers:
        answers.put("key", ["x" * 450 * 1024])
    forget_oldest(tmp_path, 1)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["middle", "third"]


def test_without_a_cache_nothing_is_kept(tmp_path):
    with open_answers(None, "") as answers:
        answers.put("key", [1])
        assert answers.get("key", 1) is None
    assert list(tmp_path.iterdir()) == []
