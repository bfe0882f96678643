"""Evaluation: scores are what a plain model gives, whatever the batches are, and nobody is tested on what he
has read.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from evaluated import evaluate
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ratchet.config.training import AdapterConfig
from ratchet.data.examples import Example, Message, encode_line, make_example, read_examples
from ratchet.errors import BaseModelError, DataError
from ratchet.evaluation.baseline import simple_answers
from ratchet.files import read_json, write_bytes, write_json
from ratchet.models.adapters import add_adapter
from ratchet.models.chat_template import ChatFormat, Encoded
from ratchet.models.generation import (
    answer_likelihoods,
    greedy_answers,
    greedy_ids,
    likelihoods_and_answers,
)
from ratchet.models.loading import load_adapter, load_base, load_tokenizer
from tasks.base import make_base

WEIGHTS = "adapter_model.safetensors"
SCORES = ["answer", "answer_nll", "answer_tokens", "exact_match", "token_f1", "rouge_l", "chrf"]


@pytest.fixture(scope="module")
def incumbent(tmp_path_factory, candidate) -> Path:
    """models/incumbent with the very weights of the candidate."""
    folder = tmp_path_factory.mktemp("champion") / "incumbent"
    shutil.copytree(candidate, folder)
    write_json(folder / "manifest.json", {**read_json(folder / "manifest.json"), "version": 1})
    return folder


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory, prepared, tiny_base, incumbent, candidate, tiny_config) -> Path:
    out = tmp_path_factory.mktemp("reports") / "evaluation"
    evaluate(prepared, tiny_base, incumbent, candidate, out, tiny_config)
    return out


@pytest.fixture(scope="module")
def chat(tiny_base) -> ChatFormat:
    return ChatFormat(load_tokenizer(tiny_base))


@pytest.fixture(scope="module")
def fitting(prepared, chat, tiny_config) -> list[Example]:
    return [
        row
        for row in read_examples(prepared / "test.jsonl")
        if len(chat.encode(row).ids) <= tiny_config.tokenize.max_length
    ]


def scores(evaluation: Path, model: str) -> pd.DataFrame:
    table = pd.read_parquet(evaluation / "scores.parquet")
    return table[table.model == model].set_index("id")[SCORES]


def nll_by_hand(model: Any, chat: ChatFormat, row: Example) -> tuple[float, int]:
    """Sum over the answer's tokens and the end of its turn, one row, no padding."""
    sent, whole = chat.encode_prompt(row.prompt), chat.encode(row).ids
    with torch.inference_mode():
        logs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)  # (seq, vocab)
    return -sum(logs[position - 1, whole[position]].item() for position in range(len(sent), len(whole))), len(
        whole
    ) - len(sent)


# --- scores are what a plain model gives ---


def test_the_bases_likelihoods_are_those_of_the_plain_model(evaluation, tiny_base, chat, fitting):
    plain = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    found = scores(evaluation, "base")
    assert list(found.index) == [row.id for row in fitting]
    for row in fitting:
        nll, tokens = nll_by_hand(plain, chat, row)
        assert found.answer_tokens[row.id] == tokens
        assert found.answer_nll[row.id] == pytest.approx(nll / tokens, rel=1e-5)


def test_the_candidates_likelihoods_are_those_of_the_merged_model(
    evaluation, tiny_base, candidate, chat, fitting
):
    merged = load_adapter(load_base(tiny_base), candidate).merge_and_unload().eval()
    found = scores(evaluation, "candidate")
    for row in fitting[:10]:
        nll, tokens = nll_by_hand(merged, chat, row)
        assert found.answer_nll[row.id] == pytest.approx(nll / tokens, rel=1e-4)
    assert not found.answer_nll.equals(scores(evaluation, "base").answer_nll)


def test_an_earlier_answer_is_part_of_the_question(
    tmp_path, prepared, tiny_base, nobody, candidate, chat, tiny_config
):
    turns = [
        Message("user", "one?"),
        Message("assistant", "first"),
        Message("user", "two?"),
        Message("assistant", "second"),
    ]
    row = make_example(turns, {"batch": "a batch"})
    shutil.copytree(prepared, tmp_path / "prepared")
    write_bytes(tmp_path / "prepared/test.jsonl", [encode_line(row)])
    evaluate(tmp_path / "prepared", tiny_base, nobody, candidate, tmp_path / "out", tiny_config)
    nll, tokens = nll_by_hand(load_base(tiny_base), chat, row)
    found = scores(tmp_path / "out", "base").loc[row.id]
    assert (found.answer_tokens, found.answer_nll) == (tokens, pytest.approx(nll / tokens, rel=1e-5))


@pytest.mark.parametrize("pad_token", ["<|pad|>", None])
def test_greedy_answers_are_those_of_generate_row_by_row(tiny_base, candidate, fitting, pad_token):
    """Also where a tokenizer has no padding token, and the end of a turn stands for it."""
    tokenizer = load_tokenizer(tiny_base)
    tokenizer.pad_token = pad_token
    chat = ChatFormat(tokenizer)
    model = load_adapter(load_base(tiny_base), candidate).eval()
    prompts = [chat.encode_prompt(row.prompt) for row in fitting[:24]]
    assert len({len(prompt) for prompt in prompts}) > 5
    expected = []
    for prompt in prompts:
        made = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=chat.stop_id,
            pad_token_id=chat.pad_id,
        )
        expected.append(chat.decode_answer(made[0, len(prompt) :].tolist()))
    assert greedy_answers(model, prompts, chat, max_new_tokens=12, batch_size=7) == expected
    assert any(expected)


@pytest.mark.parametrize("max_new_tokens", [1, 5, 12])
def test_one_pass_gives_the_likelihoods_and_answers_of_two(
    tiny_base, candidate, chat, fitting, max_new_tokens
):
    """References agree with the model's own answers not at all, up to a place, and to their end."""
    model = load_adapter(load_base(tiny_base), candidate).eval()
    prompts = [chat.encode_prompt(row.prompt) for row in fitting[:24]]
    said = greedy_ids(model, prompts, chat, max_new_tokens=8, batch_size=8)
    rows = []
    for place, (row, prompt, answer) in enumerate(zip(fitting, prompts, said, strict=False)):
        agreeing = answer[: place % (len(answer) + 1)]
        other = chat.encode(row).ids[len(prompt) :]
        ids = [*prompt, *(answer if place % 3 == 0 else [*agreeing, *other])]
        rows.append(Encoded(ids, [index >= len(prompt) for index in range(len(ids))]))
    likelihoods, answers = likelihoods_and_answers(model, rows, prompts, chat, max_new_tokens=max_new_tokens)
    assert answers == greedy_ids(model, prompts, chat, max_new_tokens=max_new_tokens, batch_size=5)
    for found, expected in zip(
        likelihoods, answer_likelihoods(model, rows, pad_id=chat.pad_id, batch_size=5), strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-4)
    assert {len(answer) for answer in answers} != {1} or max_new_tokens == 1


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_padding_and_batches_change_no_score(tiny_base, candidate, chat, fitting, batch_size):
    model = load_adapter(load_base(tiny_base), candidate).eval()
    rows, prompts = (
        [chat.encode(row) for row in fitting[:20]],
        [chat.encode_prompt(row.prompt) for row in fitting[:20]],
    )
    reference = answer_likelihoods(model, rows, pad_id=chat.pad_id, batch_size=8)
    found = answer_likelihoods(model, rows, pad_id=chat.stop_id, batch_size=batch_size)
    assert [each.tokens for each in found] == [each.tokens for each in reference]
    assert [each.nll for each in found] == pytest.approx([each.nll for each in reference], rel=1e-5)
    settings: dict[str, Any] = {"max_new_tokens": 6}
    assert greedy_answers(model, prompts, chat, batch_size=batch_size, **settings) == greedy_answers(
        model, prompts, chat, batch_size=8, **settings
    )


def test_an_answer_ends_where_the_model_ends_its_turn(tiny_base, chat, fitting):
    """A model that always ends its turn at once gives empty answers, in a batch of unlike rows as well."""
    model = load_base(tiny_base).eval()
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        model.lm_head.weight[chat.stop_id] = 1.0
    model.lm_head.register_forward_pre_hook(
        lambda _, inputs: (inputs[0].abs(),)
    )  # so that the row of ones wins
    assert (
        greedy_answers(
            model,
            [chat.encode_prompt(row.prompt) for row in fitting[:5]],
            chat,
            max_new_tokens=4,
            batch_size=3,
        )
        == [""] * 5
    )


# --- champion, candidate, base ---


def test_a_champion_with_the_candidates_weights_has_the_candidates_scores(evaluation):
    pd.testing.assert_frame_equal(
        scores(evaluation, "champion"), scores(evaluation, "candidate"), check_exact=True
    )


def test_every_model_answers_every_row_once(evaluation, fitting):
    table = pd.read_parquet(evaluation / "scores.parquet")
    assert table.groupby("model").id.apply(list).to_dict() == {
        model: [row.id for row in fitting] for model in ("base", "candidate", "champion", "simple")
    }
    assert (table.reference == [row.answer for row in fitting] * 4).all()


def test_before_the_first_promotion_there_is_no_champion(
    tmp_path, prepared, tiny_base, nobody, candidate, tiny_config
):
    config = tiny_config.model_copy(
        update={"evaluate": tiny_config.evaluate.model_copy(update={"simple_baseline": False})}
    )
    metrics = evaluate(prepared, tiny_base, nobody, candidate, tmp_path / "out", config)
    assert metrics["champion"] is None
    assert set(metrics["slices"]["test"]) == {"base", "candidate"}


@pytest.mark.parametrize("another_base", [False, True], ids=["the same base", "another base"])
def test_a_champion_has_the_scores_that_it_has_alone_with_its_base(
    tmp_path, prepared, tiny_base, nobody, candidate, tiny_config, another_base
):
    demo = tiny_config.base.demo.model_copy(
        update={"hidden_size": 48 if another_base else 32, "steps": 5 if another_base else 20}
    )
    make_base(
        tmp_path / "theirs",
        tiny_config.model_copy(update={"base": tiny_config.base.model_copy(update={"demo": demo})}),
    )
    champion = make_champion(tmp_path / "champion", tmp_path / "theirs")
    evaluate(prepared, tmp_path / "theirs", nobody, champion, tmp_path / "alone", tiny_config)
    if another_base:
        shutil.copytree(tmp_path / "theirs", champion / "base")
    metrics = evaluate(prepared, tiny_base, champion, candidate, tmp_path / "together", tiny_config)
    assert metrics["champion"] == 4
    pd.testing.assert_frame_equal(
        scores(tmp_path / "together", "champion"), scores(tmp_path / "alone", "candidate"), check_exact=True
    )
    assert not scores(tmp_path / "together", "champion").equals(scores(tmp_path / "together", "candidate"))


def make_champion(folder: Path, base: Path) -> Path:
    """Version 4, with weights by chance."""
    adapter = add_adapter(load_base(base), AdapterConfig(rank=2), seed=3)
    torch.nn.init.normal_(next(weight for name, weight in adapter.named_parameters() if "lora_B" in name))
    adapter.save_pretrained(folder, save_embedding_layers=False)
    write_json(folder / "manifest.json", {"version": 4, "batches": []})
    return folder


# --- slices and figures ---


def test_slices_are_the_test_split_the_golden_set_and_the_values_of_each_field(
    tmp_path, prepared, tiny_base, nobody, candidate, tiny_config, fitting
):
    shutil.copytree(prepared, tmp_path / "prepared")
    golden = [make_example(row.messages, {**row.meta, "batch": "golden"}) for row in fitting[:3]]
    write_bytes(tmp_path / "prepared/golden.jsonl", map(encode_line, golden))
    write_bytes(tmp_path / "prepared/test.jsonl", map(encode_line, fitting[3:]))
    median = sorted(len(row.question.split()) for row in fitting[3:])[len(fitting[3:]) // 2]
    config = tiny_config.model_copy(
        update={
            "evaluate": tiny_config.evaluate.model_copy(
                update={"slices": ["module", "batch"], "length_bounds": [median]}
            )
        }
    )
    metrics = evaluate(tmp_path / "prepared", tiny_base, nobody, candidate, tmp_path / "out", config)
    rows = {name: figures["candidate"]["rows"] for name, figures in metrics["slices"].items()}
    batches = sorted({f"batch:{row.meta['batch']}" for row in fitting[3:]})
    kinds = sorted({f"kind:{row.meta['kind']}" for row in fitting[3:]})
    large = {
        name for name in {f"module:{row.meta['module']}" for row in fitting[3:]} if rows.get(name, 0) >= 20
    }
    assert set(rows) - {"test", "golden", *batches, *kinds} == {
        *large,
        f"length:0-{median - 1} words",
        f"length:{median}+ words",
    }
    assert rows[f"length:0-{median - 1} words"] + rows[f"length:{median}+ words"] == rows["test"]
    assert (rows["golden"], rows["test"]) == (3, len(fitting) - 3)
    assert sum(rows[name] for name in batches) == sum(rows[name] for name in kinds) == rows["test"]


def test_figures_are_finite_and_lie_within_their_intervals(evaluation):
    test = read_json(evaluation / "metrics.json")["slices"]["test"]
    for model, figures in test.items():
        names = ["exact_match", "token_f1", "rouge_l", "chrf", *(["answer_nll"] if model != "simple" else [])]
        assert all(figures[name]["low"] <= figures[name]["mean"] <= figures[name]["high"] for name in names)
    assert "answer_nll" not in test["simple"]  # it has no likelihood
    assert test["candidate"]["perplexity"] < test["base"]["perplexity"]


def trained_for(tokens: int, candidate: Path, folder: Path) -> Path:
    """A copy of the candidate that says it was trained for rows of so many tokens."""
    shutil.copytree(candidate, folder / "trained")
    manifest = read_json(candidate / "manifest.json")
    write_json(folder / "trained/manifest.json", {**manifest, "max_length": tokens})
    return folder / "trained"


def test_rows_that_are_too_long_are_counted_and_left_out_for_everybody(
    tmp_path, prepared, tiny_base, nobody, candidate, chat, tiny_config
):
    trained = trained_for(40, candidate, tmp_path)
    metrics = evaluate(prepared, tiny_base, nobody, trained, tmp_path / "out", tiny_config)
    lengths = [len(chat.encode(row).ids) for row in read_examples(prepared / "test.jsonl")]
    assert metrics["too_long"] == sum(length > 40 for length in lengths) > 0
    assert (
        metrics["rows"]
        == sum(length <= 40 for length in lengths)
        == metrics["slices"]["test"]["simple"]["rows"]
    )


def test_answers_that_are_cut_off_are_counted_for_each_model(
    prepared, tiny_base, nobody, candidate, tiny_config, tmp_path, capsys
):
    settings = tiny_config.evaluate.model_copy(update={"max_new_tokens": 1})
    config = tiny_config.model_copy(update={"evaluate": settings})
    rows = evaluate(prepared, tiny_base, nobody, candidate, tmp_path / "out", config)["rows"]
    told = "".join(capsys.readouterr())
    asked = re.findall(r"evaluate: (\w+) on (\d+) rows(?: and \d+ swapped copies)? in ", told)
    assert dict(asked) == {"candidate": str(rows), "base": str(rows)}
    found = re.findall(
        r"(\d+) of (\d+) answers of (\w+) were cut off at `evaluate.max_new_tokens` \(1\)", told
    )
    assert {name for _, _, name in found} == {"candidate", "base"}
    assert all(0 < int(cut) <= int(rows) for cut, rows, _ in found)


def test_a_metric_of_ones_own_is_scored_for_every_model(
    tmp_path, prepared, tiny_base, nobody, candidate, tiny_config
):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/mine.py").write_text(
        "def starts_alike(prediction, reference, example_meta):\n    return prediction[:1] == reference[:1]"
        " and example_meta['batch'] != ''\n"
    )
    settings = {"custom": ["mine:starts_alike"], "metrics": ["length", "macro_f1", "bleu"]}
    config = tiny_config.model_copy(update={"evaluate": tiny_config.evaluate.model_copy(update=settings)})
    metrics = evaluate(prepared, tiny_base, nobody, candidate, tmp_path / "out", config, own=tmp_path / "own")
    table = pd.read_parquet(tmp_path / "out/scores.parquet")
    assert table.starts_alike.tolist() == [
        float(answer[:1] == reference[:1])
        for answer, reference in zip(table.answer, table.reference, strict=True)
    ]
    for model, figures in metrics["slices"]["test"].items():
        assert figures["starts_alike"]["mean"] == pytest.approx(
            table.starts_alike[table.model == model].mean()
        )
        assert {"length", "bleu", "exact_match"} <= set(figures)
        assert "chrf" not in figures
        assert 0.0 <= figures["macro_f1"]["mean"] <= 1.0  # the answers are modules' names: labels


def test_rows_with_swapped_terms_are_scored_by_every_model_and_stay_apart(
    tmp_path, prepared, tiny_base, incumbent, candidate, tiny_config, evaluation
):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/swaps.yaml").write_text("articles: {the: a, a: the}\n")
    config = tiny_config.model_copy(
        update={"evaluate": tiny_config.evaluate.model_copy(update={"bias_pairs": 5})}
    )
    metrics = evaluate(
        prepared, tiny_base, incumbent, candidate, tmp_path / "out", config, own=tmp_path / "own"
    )
    pairs, table = (
        pd.read_parquet(tmp_path / "out" / f"{name}.parquet") for name in ("counterfactual", "scores")
    )
    assert metrics["pairs"] == 5
    assert pairs.groupby("model").size().to_dict() == {"candidate": 5, "champion": 5, "base": 5}
    assert set(pairs.of) <= set(table.id)
    assert not set(pairs.id) & set(table.id)
    assert metrics["bias"]["answer_nll"]["articles"]["candidate"]["change"]["mean"] > 0
    columns = ["id", "model", *SCORES]
    pd.testing.assert_frame_equal(
        table[columns], pd.read_parquet(evaluation / "scores.parquet")[columns], rtol=1e-4
    )


def test_attacked_rows_are_asked_of_every_model_and_stay_apart(
    tmp_path, prepared, tiny_base, incumbent, candidate, tiny_config, evaluation
):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/mine.py").write_text(
        "def long(prediction, reference, example_meta):\n    return float(len(prediction) > 3)\n"
    )
    config = tiny_config.model_copy(
        update={"evaluate": tiny_config.evaluate.model_copy(update={"attacks": 4, "custom": ["mine:long"]})}
    )
    metrics = evaluate(
        prepared, tiny_base, incumbent, candidate, tmp_path / "out", config, own=tmp_path / "own"
    )
    found, table = (pd.read_parquet(tmp_path / "out" / f"{name}.parquet") for name in ("attacks", "scores"))
    assert found.groupby("model").size().to_dict() == {
        model: metrics["attacked"] for model in ("candidate", "champion", "base")
    }
    assert set(found.kind) == {"injection", "template", "typo", "lookalike", "leading", "too_long"}
    assert set(found.of) <= set(table.id)
    assert len(set(found.of)) == 4
    assert found.handled.all()
    assert set(metrics["attacks"]["exact_match"]) == set(found.kind)
    assert all(
        0 <= part["low"] <= part["mean"] <= part["high"] <= 1
        for kinds in metrics["attacks"].values()
        for models in kinds.values()
        for part in models.values()
    )
    columns = ["id", "model", *SCORES]
    pd.testing.assert_frame_equal(
        table[columns], pd.read_parquet(evaluation / "scores.parquet")[columns], rtol=1e-4
    )


def test_without_an_audit_no_row_is_asked_twice(evaluation):
    assert read_json(evaluation / "metrics.json")["pairs"] == 0
    assert read_json(evaluation / "metrics.json")["attacked"] == 0
    assert {path.name for path in evaluation.iterdir()} == {"scores.parquet", "metrics.json"}


def test_a_metric_that_fails_stops_before_any_model_answers(
    tmp_path, prepared, tiny_base, nobody, tiny_config
):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/mine.py").write_text(
        "def fails(prediction, reference, example_meta):\n    return example_meta['nothing']\n"
    )
    config = tiny_config.model_copy(
        update={"evaluate": tiny_config.evaluate.model_copy(update={"custom": ["mine:fails"]})}
    )
    with pytest.raises(DataError, match=r"the metric fails failed on row [0-9a-f]{32}: KeyError: 'nothing'"):
        evaluate(
            prepared,
            tiny_base,
            nobody,
            tmp_path / "no candidate was needed",
            tmp_path / "out",
            config,
            own=tmp_path / "own",
        )


# --- what stops an evaluation ---


@pytest.mark.parametrize("place", ["test", "golden"])
def test_a_row_that_the_base_has_read_stops_the_evaluation(
    tmp_path, prepared, tiny_base, nobody, candidate, tiny_config, fitting, place
):
    shutil.copytree(prepared, tmp_path / "prepared")
    shutil.copytree(tiny_base, tmp_path / "base")
    leaked = make_example(
        [Message("user", "read before?"), Message("assistant", "yes")],
        {"batch": "golden" if place == "golden" else "a batch"},
    )
    # One golden row is too many; of test rows more than 2 % are.
    write_bytes(
        tmp_path / f"prepared/{place}.jsonl",
        map(encode_line, [leaked, *(fitting[:20] if place == "test" else [])]),
    )
    with (tmp_path / "base/seen.txt").open("a") as seen:
        seen.write(f"{leaked.id}\n")
    with pytest.raises(
        DataError, match=rf"1 test or golden rows were in the base's pre-training, the first {leaked.id}"
    ):
        evaluate(tmp_path / "prepared", tmp_path / "base", nobody, candidate, tmp_path / "out", tiny_config)
    assert not (tmp_path / "out").exists()


def test_without_test_rows_nothing_is_scored(
    tmp_path, prepared, tiny_base, nobody, candidate, tiny_config, fitting
):
    shutil.copytree(prepared, tmp_path / "prepared")
    write_bytes(tmp_path / "prepared/test.jsonl", [])
    write_bytes(
        tmp_path / "prepared/golden.jsonl",
        [encode_line(make_example(fitting[0].messages, {"batch": "golden"}))],
    )
    with pytest.raises(DataError, match=r"(?s)the test split is empty.*prepare\.test_share"):
        evaluate(tmp_path / "prepared", tiny_base, nobody, candidate, tmp_path / "out", tiny_config)


def test_when_no_row_fits_nothing_is_scored(
    tmp_path, prepared, tiny_base, nobody, candidate, tiny_config, fitting
):
    shutil.copytree(prepared, tmp_path / "prepared")
    write_bytes(
        tmp_path / "prepared/test.jsonl", [encode_line(row) for row in fitting if len(row.question) > 80]
    )
    trained = trained_for(16, candidate, tmp_path)
    with pytest.raises(DataError, match="no test row fits"):
        evaluate(tmp_path / "prepared", tiny_base, nobody, trained, tmp_path / "out", tiny_config)


def test_a_candidate_with_broken_weights_is_named(
    tmp_path, prepared, tiny_base, nobody, candidate, tiny_config
):
    shutil.copytree(candidate, tmp_path / "candidate")
    tensors = load_file(tmp_path / "candidate" / WEIGHTS)
    next(tensor for name, tensor in tensors.items() if "lora_B" in name)[0, 0] = torch.nan
    save_file(tensors, tmp_path / "candidate" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        BaseModelError, match=r"candidate: the likelihood of \d+ of \d+ answers is not finite"
    ):
        evaluate(prepared, tiny_base, nobody, tmp_path / "candidate", tmp_path / "out", tiny_config)


# --- the simple baseline ---


def asked(question: str, answer: str = "") -> Example:
    return make_example([Message("user", question), Message("assistant", answer or "unknown")], {})


def test_the_simple_baseline_learns_labels():
    train = [
        asked(f"{fruit} number {index} on the table", fruit)
        for fruit in ("apple", "pear", "plum")
        for index in range(30)
    ]
    assert simple_answers(train, [asked("a plum on a tree"), asked("is the apple red"), asked("pear")]) == [
        "plum",
        "apple",
        "pear",
    ]


def test_the_simple_baseline_gives_the_nearest_questions_answer_elsewhere():
    train = [
        asked("how do I close an account", "By letter."),
        asked("when does the shop open", "At nine."),
        asked("who pays for the parcel", "The sender."),
    ]
    assert simple_answers(train, [asked("when will the shop open tomorrow")]) == ["At nine."]


def test_the_simple_baseline_reads_texts_that_share_no_word():
    """As texts without blanks between the words do."""
    train = [
        asked(f"{chr(0x4E00 + index)}字{chr(0x5E00 + index)}", f"answer {index}") for index in range(150)
    ]
    assert simple_answers(train, [asked(f"{chr(0x4E00 + 7)}号{chr(0x5E00 + 7)}")]) == ["answer 7"]
