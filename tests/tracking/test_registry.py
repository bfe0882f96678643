"""Versions are found by their key and made once; aliases are read again after they were written."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import KEPT_CONNECTIONS, use_mlflow, use_no_mlflow

from ratchet.errors import ServiceError
from ratchet.tracking.mlflow import KEY_TAG, find_or_create_run, mlflow_client
from ratchet.tracking.registry import (
    ARTIFACT,
    CHALLENGER,
    CHAMPION,
    Version,
    drop_alias,
    find_version,
    get_alias,
    get_version,
    list_versions,
    make_version,
    set_alias,
)

pytestmark = pytest.mark.filterwarnings(KEPT_CONNECTIONS)


@pytest.fixture(autouse=True)
def _store(tmp_path, monkeypatch):
    use_mlflow(monkeypatch, tmp_path)


def make(key: str, *, description: str = "card", **tags: str) -> Version:
    adapter = Path("adapter")
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_model.safetensors").write_text(f"weights of {key}")
    return make_version(
        "small", find_or_create_run("small", key, {}), adapter, {KEY_TAG: key, **tags}, description
    )


def test_before_the_first_version_there_is_none():
    assert list_versions("small") == []
    assert get_version("small", 1) is None
    assert find_version("small", "key") is None
    assert get_alias("small", CHAMPION) is None


def test_a_version_carries_its_adapter_its_tags_and_its_card():
    made = make("key1", verdict="promote", description="## card")
    assert made == Version("small", 1, made.run_id, {KEY_TAG: "key1", "verdict": "promote"}, "## card")
    assert list_versions("small") == [made]
    assert get_version("small", 1) == made
    client = mlflow_client()
    assert [entry.path for entry in client.list_artifacts(made.run_id, ARTIFACT)] == [
        f"{ARTIFACT}/adapter_model.safetensors"
    ]
    source = client.get_model_version("small", "1").source
    assert (
        Path(source.removeprefix("file://")) / "adapter_model.safetensors"
    ).read_text() == "weights of key1"


def test_the_same_key_twice_is_one_version_with_its_texts_up_to_date():
    make("key1", verdict="uncertain", kept="yes", description="old")
    again = make("key1", verdict="promote", description="new")
    assert list_versions("small") == [again]
    assert again.number == 1
    assert again.tags == {KEY_TAG: "key1", "verdict": "promote", "kept": "yes"}
    assert again.description == "new"


def test_versions_are_listed_the_newest_first_and_found_by_key():
    for number in range(1, 12):
        make(f"key{number}")
    assert [version.number for version in list_versions("small")] == list(range(11, 0, -1))
    assert find_version("small", "key10").number == 10


def test_a_tag_holds_the_names_of_many_batches():
    names = ",".join(f"20260101T000000Z-batch-{number:08}.jsonl" for number in range(1000))
    make("key1", batches=names)
    assert get_version("small", 1).tags["batches"] == names


def test_an_alias_moves_and_goes():
    make("key1")
    make("key2")
    set_alias("small", CHAMPION, 1)
    set_alias("small", CHALLENGER, 2)
    assert (get_alias("small", CHAMPION), get_alias("small", CHALLENGER)) == (1, 2)
    set_alias("small", CHAMPION, 2)
    drop_alias("small", CHALLENGER)
    drop_alias("small", CHALLENGER)
    assert (get_alias("small", CHAMPION), get_alias("small", CHALLENGER)) == (2, None)


def test_an_alias_of_a_version_that_is_not_there_is_an_error_of_the_service():
    make("key1")
    with pytest.raises(ServiceError):
        set_alias("small", CHAMPION, 9)
    assert get_alias("small", CHAMPION) is None


CALLS = {
    "list_versions": lambda: list_versions("small"),
    "make_version": lambda: make_version("small", "run", Path("adapter"), {KEY_TAG: "key"}, "card"),
    "set_alias": lambda: set_alias("small", CHAMPION, 1),
    "get_alias": lambda: get_alias("small", CHAMPION),
    "drop_alias": lambda: drop_alias("small", CHAMPION),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_server_that_is_away_is_an_error_of_the_service(call, monkeypatch):
    use_no_mlflow(monkeypatch)
    with pytest.raises(ServiceError, match=r"(?s)MLflow at http://127\.0\.0\.1:1: .*ratchet up"):
        CALLS[call]()
