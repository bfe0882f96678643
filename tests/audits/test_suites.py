"""Public suites through lm-evaluation-harness: local files alone, the scores of a plain model, and a faulty
suite is named before any model answers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from evaluated import evaluate

from ratchet.audits.suites import read_suites, run_suites
from ratchet.errors import ConfigError, DataError
from ratchet.evaluation.report import decode_metrics
from ratchet.files import read_json, write_json
from ratchet.models.chat_template import ChatFormat
from ratchet.models.loading import load_base, load_tokenizer
from ratchet.promotion.verdict import Candidate, Rival, Verdict
from ratchet.reporting.markdown import model_card

SUITE = """
dataset_path: json
dataset_kwargs: {data_files: {test: tiny.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
DOCS = [
    {"question": f"Module {place} is for", "choices": [" email", " the web server"], "answer": place % 2}
    for place in range(12)
]


@pytest.fixture
def own(tmp_path) -> Path:
    folder = tmp_path / "own/suites"
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(SUITE)
    (folder / "tiny.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    return folder.parent


def test_the_harness_gives_what_the_plain_model_gives(own, tiny_base):
    model, tokenizer = load_base(tiny_base).eval(), load_tokenizer(tiny_base)
    lines = run_suites(model, tokenizer, read_suites(own, ["tiny"]), batch_size=4)
    assert [line.suite for line in lines] == ["tiny"] * len(DOCS)
    assert len({line.id for line in lines}) == len(DOCS)
    for doc, line in zip(DOCS, lines, strict=True):
        sums = []
        for choice in doc["choices"]:
            asked, whole = tokenizer.encode(doc["question"]), tokenizer.encode(doc["question"] + choice)
            with torch.inference_mode():
                logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)  # (seq, vocab)
            sums.append(sum(logs[place - 1, whole[place]].item() for place in range(len(asked), len(whole))))
        assert line.score == float(sums.index(max(sums)) == doc["answer"])


def test_an_evaluation_runs_its_suites_on_every_model_and_the_card_shows_them(
    tmp_path, own, prepared, tiny_base, candidate, tiny_config
):
    shutil.copytree(candidate, tmp_path / "champion")
    write_json(tmp_path / "champion/manifest.json", {**read_json(candidate / "manifest.json"), "version": 1})
    config = tiny_config.model_copy(
        update={"evaluate": tiny_config.evaluate.model_copy(update={"suites": ["tiny"]})}
    )
    metrics = evaluate(
        prepared, tiny_base, tmp_path / "champion", candidate, tmp_path / "out", config, own=own
    )
    table = pd.read_parquet(tmp_path / "out/suites.parquet")
    assert table.groupby("model").size().to_dict() == {
        model: len(DOCS) for model in ("candidate", "champion", "base")
    }
    sides = {model: part.set_index("id").score for model, part in table.groupby("model")}
    assert sides["candidate"].equals(sides["champion"])
    plain = run_suites(
        load_base(tiny_base).eval(),
        ChatFormat(load_tokenizer(tiny_base)).tokenizer,
        read_suites(own, ["tiny"]),
        batch_size=4,
    )
    assert sides["base"].tolist() == [line.score for line in plain]
    assert (metrics["suites"]["tiny"]["metric"], metrics["suites"]["tiny"]["rows"]) == ("acc", len(DOCS))
    assert "| tiny | acc | 12 | " in model_card(
        decode_metrics(metrics), Verdict("promote", [], Rival("champion", 1), [], Candidate("", "")), {}
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            ("dataset_path: json", "dataset_path: org/hub-set"),
            "`dataset_path` is 'org/hub-set', which would be downloaded",
        ),
        (("tiny.jsonl", "other.jsonl"), "the data file 'other.jsonl' is not in"),
        (("tiny.jsonl", "../../../elsewhere.jsonl"), "is not in"),
        (("metric_list: [{metric: acc}]", ""), "names no metric"),
        (("dataset_kwargs: {data_files: {test: tiny.jsonl}}", ""), "names no `data_files`"),
        (('"{{question}}"', "!function code.run"), "names Python (`!function`)"),
        (("output_type", "}{"), "is no plain YAML"),
    ],
)
def test_a_file_that_is_no_local_suite_is_named(own, change, words):
    (own / "suites/tiny.yaml").write_text(SUITE.replace(*change))
    (own.parent / "elsewhere.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"tiny\.yaml") as caught:
        read_suites(own, ["tiny"])
    assert words in str(caught.value)


def test_a_suite_that_is_not_there_and_a_metric_that_scores_no_document_are_named(own, tiny_base):
    with pytest.raises(DataError, match="names 'gone', but there is no"):
        read_suites(own, ["gone"])
    (own / "suites/tiny.yaml").write_text(SUITE.replace("doc_to_target", "doc_to_nothing"))
    with pytest.raises(DataError, match="the suite 'tiny' does not run"):
        run_suites(
            load_base(tiny_base).eval(), load_tokenizer(tiny_base), read_suites(own, ["tiny"]), batch_size=4
        )


def test_without_the_harness_the_extra_is_named(own, monkeypatch):
    monkeypatch.setattr("ratchet.audits.suites.find_spec", lambda name: None)
    assert read_suites(own, []) == {}
    with pytest.raises(ConfigError, match=r"(?s)lm-evaluation-harness is not installed.*ratchet\[suites\]"):
        read_suites(own, ["tiny"])


def test_virtual_tokens_are_refused_before_any_model_answers(
    tmp_path, own, prepared, tiny_base, nobody, tiny_config
):
    write_json(tmp_path / "candidate/manifest.json", {"adapter": {"method": "prompt"}})
    config = tiny_config.model_copy(
        update={"evaluate": tiny_config.evaluate.model_copy(update={"suites": ["tiny"]})}
    )
    with pytest.raises(ConfigError, match=r"cannot be measured with adapter\.method 'prompt'"):
        evaluate(prepared, tiny_base, nobody, tmp_path / "candidate", tmp_path / "out", config, own=own)
