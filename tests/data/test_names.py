"""Names of people, by the extra `names`; skipped where it is not installed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ratchet.config.data import PrepareConfig
from ratchet.data.batches import write_batch
from ratchet.data.examples import read_examples
from ratchet.data.pii import mask_names
from ratchet.errors import ConfigError
from tasks.prepare import prepare

ROWS = [
    msgspec.json.encode({"prompt": question, "completion": "yes"})
    for question in ("Is the parcel of Ana Lima there?", "Is there a parcel of amber?")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that knows one person, in place of one that would have to be downloaded."""
    pytest.importorskip("presidio_analyzer", reason="the extra `names` is not installed")
    import spacy

    knows = spacy.blank("en")
    knows.add_pipe("entity_ruler").add_patterns([{"label": "PERSON", "pattern": "Ana Lima"}])
    folder = tmp_path_factory.mktemp("model") / "en"
    knows.to_disk(folder)
    return str(folder)


def prepared(folder: Path, **settings: object) -> list[str]:
    write_batch(
        folder / "raw",
        ROWS,
        source="jsonl",
        label="a",
        time="2026-01-01T00:00:00Z",
        licence="CC0-1.0",
        who="tests",
        form="auto",
    )
    prepare(
        folder / "raw",
        folder / "none",
        folder / "out",
        PrepareConfig(test_share=0, validation_share=0, min_rows=1, **settings),
    )
    return [row.question for row in read_examples(folder / "out/train.jsonl")]


def test_a_name_is_masked_or_its_row_rejected_as_the_policy_says(tmp_path, model):
    assert mask_names("To Ana Lima, from Ana Lima.", model, "[name]") == "To [name], from [name]."
    assert prepared(tmp_path / "mask", names_model=model, personal_data="mask") == [
        "Is the parcel of [name] there?",
        "Is there a parcel of amber?",
    ]
    assert prepared(tmp_path / "reject", names_model=model) == ["Is there a parcel of amber?"]
    assert len(prepared(tmp_path / "off")) == 2


def test_a_model_that_is_not_there_is_named(model):
    with pytest.raises(ConfigError, match="spaCy knows no such model"):
        mask_names("a", "no-such-model", "[name]")
