"""Serve parity: the gateway says what was trained, and each fault is found, on a real tiny model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from ratchet.config.evaluation import ParityConfig
from ratchet.config.params import Config
from ratchet.data.examples import Example, read_examples
from ratchet.errors import DataError, RatchetError
from ratchet.files import read_json, sha256_file, write_bytes, write_json
from ratchet.gate.guardrails import judge_parity
from ratchet.models.adapters import load_trained
from ratchet.models.chat_template import ChatFormat
from ratchet.models.loading import MANIFEST, WEIGHTS, load_tokenizer
from ratchet.models.manifests import GENERATION
from ratchet.models.merging import load_merged
from ratchet.parity.check import Asked, check_parity, compare_model, find_trained, make_reference
from ratchet.parity.compare import compare_answers
from ratchet.parity.paths import Answer, Top
from ratchet.parity.report import Mismatch, Part, Report
from ratchet.serving.bundle import Bundle, Generation
from ratchet.training.packing import read_windows, rows_of
from tasks.parity import parity

CONFIG = ParityConfig()


class Place:
    """The candidate, what was trained on, and a copy to be served that a test may spoil."""

    def __init__(self, folder: Path, prepared: Path, tokens: Path, base: Path, candidate: Path) -> None:
        self.prepared, self.tokens, self.base, self.candidate = prepared, tokens, base, candidate
        self.served = folder / "served"
        shutil.copytree(candidate, self.served)
        self.chat = ChatFormat(load_tokenizer(base))
        self.rows = [
            row for row in read_examples(prepared / "test.jsonl") if len(self.chat.encode(row).ids) <= 96
        ][:12]
        self.windows = [row for window in read_windows(tokens / "train.arrow") for row in rows_of(window)]
        chosen = set((tokens / "rows.txt").read_text().split())
        self.train = [
            row
            for row in read_examples(prepared / "train.jsonl")
            if row.id in chosen and len(self.chat.encode(row).ids) <= 96
        ][:12]

    def report(self, **changed: Any) -> Report:
        bundle = Bundle("tiny", 1, self.served, self.base, 256, Generation(8))
        trained = find_trained(self.train, changed.pop("windows", self.windows), self.chat)
        evaluated = {"max_new_tokens": 8, "batch_size": 5}
        gateway = {"engine": changed.pop("engine", "local")}
        parity = {"merged": False, **changed}
        config = Config.model_validate({"evaluate": evaluated, "parity": parity, "gateway": gateway})
        scratch = self.served.parent / "scratch"
        return check_parity(self.rows, trained, self.base, self.candidate, bundle, config, scratch)

    def parts(self, **changed: Any) -> dict[str, Part]:
        return {part.name: part for part in self.report(**changed).parts}

    def first(self, name: str, **changed: Any) -> Mismatch:
        found = self.parts(**changed)[name].first
        assert found is not None
        return found

    def template(self, old: str, new: str) -> None:
        path = self.served / "chat_template.jinja"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def weights(self, change: Any) -> None:
        weights = {name: change(name, weight) for name, weight in load_file(self.served / WEIGHTS).items()}
        save_file(weights, self.served / WEIGHTS, metadata={"format": "pt"})

    def asked(self) -> Asked:
        return Asked(self.rows, self.chat, self.chat, 8, 5)


@pytest.fixture
def place(tmp_path: Path, prepared: Path, tokens: Path, tiny_base: Path, candidate: Path) -> Place:
    return Place(tmp_path, prepared, tokens, tiny_base, candidate)


def failed(parts: dict[str, Part]) -> set[str]:
    return {name for name, part in parts.items() if part.result == "fail"}


# --- whole ---


def test_a_trained_candidate_passes_and_equal_candidates_have_equal_reports(
    place: Place, tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config.model_copy(update={"parity": ParityConfig(rows=20)})
    report = parity(
        place.prepared, place.tokens, place.base, place.candidate, tmp_path / "parity.json", config
    )
    parts = {part.name: part for part in report.parts}
    assert list(parts) == ["files", "training", "prompts", "gateway", "merged"]
    assert failed(parts) == set()
    assert parts["gateway"].rows == parts["merged"].rows == parts["training"].rows == 20
    assert parts["merged"].largest is not None and parts["merged"].largest < 1e-5
    written = read_json(tmp_path / "parity.json")
    assert msgspec.to_builtins(report) == written
    parity(place.prepared, place.tokens, place.base, place.candidate, tmp_path / "again.json", config)
    again = read_json(tmp_path / "again.json")
    speed = written["speed"]
    assert (
        speed["answers"] >= 10
        and 0 < speed["milliseconds"]["low"] <= speed["milliseconds"]["mean"]
        and speed["tokens_per_second"] > 0
    )
    assert again | {"speed": None} == written | {"speed": None}  # but for how long it took
    check = judge_parity(tmp_path / "parity.json", read_json(place.candidate / MANIFEST)["adapter_sha256"])
    assert (check.name, check.result, check.rows) == ("parity", "pass", 20)


def test_without_rows_nothing_was_shown(place: Place, tiny_config: Config, tmp_path: Path) -> None:
    shutil.copytree(place.prepared, tmp_path / "prepared")
    write_bytes(tmp_path / "prepared/test.jsonl", [])
    with pytest.raises(DataError, match="0 test rows and 200 training rows to compare on"):
        parity(
            tmp_path / "prepared",
            place.tokens,
            place.base,
            place.candidate,
            tmp_path / "parity.json",
            tiny_config,
        )
    assert not (tmp_path / "parity.json").exists()


# --- what differs ---


def test_llama_cpps_answers_are_compared_where_it_is_what_serves(place: Place) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (uv pip install xllamacpp)")
    part = place.parts(engine="llama_cpp")["llama.cpp"]
    assert (part.result, part.rows, part.largest) == ("pass", 12, None)
    assert "llama.cpp gives the same greedy answers to 12 test rows" in part.reason
    assert "llama.cpp" not in place.parts()


def test_another_template_fails_with_the_first_token_that_differs(place: Place) -> None:
    place.template("<|assistant|>", "<|assistant|>!")
    parts = place.parts()
    assert failed(parts) == {"files", "training", "prompts"}
    first = parts["prompts"].first
    prompt = place.chat.encode_prompt(place.rows[0].prompt)
    assert first is not None and first.seen is not None
    assert (first.row, first.position, first.wanted) == (place.rows[0].id, len(prompt), None), (
        "the trainer's prompt is over where the gateway's goes on"
    )
    assert first.seen.text == "!"
    told = parts["prompts"].reason
    assert first.row in told and f"token {len(prompt)}:" in told and "'!'" in told


def test_a_changed_byte_of_the_adapter_fails_though_the_answers_are_the_same(place: Place) -> None:
    whole = bytearray((place.served / WEIGHTS).read_bytes())
    whole[-4] ^= 1  # the last bit of a float's mantissa
    (place.served / WEIGHTS).write_bytes(bytes(whole))
    parts = place.parts()
    assert failed(parts) == {"files"}
    assert parts["files"].mismatches == 1 and WEIGHTS in parts["files"].reason


def test_another_adapter_fails_with_the_first_answer_that_differs(place: Place) -> None:
    place.weights(lambda name, weight: weight * (-10 if "lora_B" in name else 1))
    parts = place.parts()
    assert failed(parts) == {"files", "gateway"}
    first = parts["gateway"].first
    assert first is not None and first.what == "the answers differ" and first.wanted != first.seen
    assert first.row in {row.id for row in place.rows}


def test_another_adapter_fails_by_its_logits_where_the_answers_happen_to_agree(place: Place) -> None:
    place.weights(lambda name, weight: weight * (1.02 if "lora_B" in name else 1))
    part = place.parts()["gateway"]
    assert part.result == "fail" and part.first is not None
    assert "the logits differ" in part.first.what and part.first.wanted == part.first.seen
    assert part.largest is not None and part.largest > CONFIG.tolerance


def test_weights_that_the_gateway_refuses_are_told(place: Place) -> None:
    place.weights(lambda name, weight: weight * torch.nan)
    parts = place.parts()
    assert failed(parts) == {"files", "intake"}
    assert "weights are not finite" in parts["intake"].reason


def test_a_stop_token_that_does_not_stop_fails(place: Place) -> None:
    """The served version knows another token as the end: what was trained to end there would go on."""
    write_json(place.served / GENERATION, {"eos_token_id": []})
    place.template("<|end|>", "{{ '<|system|>' if message.role == 'assistant' else '<|end|>' }}")
    part = place.parts()["training"]
    assert part.mismatches == len(place.train)
    assert part.first is not None and part.first.wanted is not None
    assert "ended by 'length', wanted 'stop'" in part.first.what
    assert part.first.wanted.text == "<|end|>"


def test_training_rows_that_do_not_learn_the_stop_token_fail(place: Place) -> None:
    open_ended = [row._replace(labels=[*row.labels[:-1], -100]) for row in place.windows]
    assert "did not learn the stop token" in place.first("training", windows=open_ended).what


def test_rows_that_were_tokenised_in_another_way_fail_where_it_begins(place: Place) -> None:
    other = [
        row._replace(input_ids=[*row.input_ids[:2], row.input_ids[2] + 1, *row.input_ids[3:]])
        for row in place.windows
    ]
    first = place.first("training", windows=other)
    assert first.position == 2 and "tokenised for the training in another way" in first.what


def test_a_message_that_the_gateway_refuses_fails_with_its_words(place: Place) -> None:
    row = place.rows[0]
    place.rows[0] = Example(row.id, (row.messages[0].__class__("user", "a\0b"), *row.messages[1:]), row.meta)
    assert "holds a NUL character" in place.first("prompts").what


# --- merged ---


def test_a_merged_model_that_is_not_the_adapter_fails(place: Place) -> None:
    reference = make_reference(load_trained(place.base, place.candidate).eval(), place.asked())
    assert (
        compare_model(
            "merged", load_merged(place.base, place.candidate), place.asked(), reference, CONFIG.tolerance
        ).mismatches
        == 0
    )
    place.weights(lambda name, weight: weight * (3 if "lora_B" in name else 1))
    found = compare_model(
        "merged", load_merged(place.base, place.served), place.asked(), reference, CONFIG.tolerance
    )
    assert found.mismatches > 0
    assert found.first is not None and found.first.what in found.reason
    assert f"{found.mismatches} of {len(place.rows)} rows differ" in found.reason


# --- ties ---


@pytest.mark.parametrize(
    ("gap", "ties", "mismatches"),
    [(1.9e-3, 1, 0), (2.1e-3, 0, 1)],
    ids=["within twice the tolerance", "beyond it"],
)
def test_a_difference_between_two_tokens_that_are_as_good_is_a_tie(
    place: Place, gap: float, ties: int, mismatches: int
) -> None:
    one, other = Answer([1], [7, 8], "", "length"), Answer([1], [7, 9], "", "length")
    top = Top(torch.tensor([[7, 8], [8, 9]]), torch.tensor([[10.0, 0.0], [10.0, 10.0 - 10 * gap]]))
    found = compare_answers(
        "gateway", ["row"], [one], [top], [other], [torch.zeros(2)], 1e-3, place.chat, place.chat
    )
    assert (found.ties, found.mismatches) == (ties, mismatches)
    assert found.ties == 0 or "(1 ties)" in found.reason


def test_logits_that_are_no_numbers_are_no_match(place: Place) -> None:
    answer = Answer([1], [7], "", "length")
    top = Top(torch.tensor([[7]]), torch.tensor([[1.0]]))
    assert (
        compare_answers(
            "gateway",
            ["row"],
            [answer],
            [top],
            [answer],
            [torch.tensor([torch.nan])],
            1e-3,
            place.chat,
            place.chat,
        ).mismatches
        == 1
    )


def test_an_answer_that_the_context_cut_off_is_compared_as_far_as_it_goes(place: Place) -> None:
    """The trainer's way has no such limit; one that is shorter for no reason is a mismatch."""
    whole, short = Answer([1, 2], [7, 8, 9], "abc", "length"), Answer([1, 2], [7, 8], "ab", "length")
    top = Top(torch.tensor([[7], [8], [9]]), torch.ones(3, 1))
    for context, mismatches in ((4, 0), (5, 1)):
        found = compare_answers(
            "gateway",
            ["row"],
            [whole],
            [top],
            [short],
            [torch.zeros(3)],
            1e-3,
            place.chat,
            place.chat,
            context=context,
        )
        assert found.mismatches == mismatches


# --- the guardrail ---


def report(**changed: Any) -> dict[str, Any]:
    parts = [
        {"name": name, "rows": 5, "mismatches": 0, "result": "pass", "reason": f"{name} fits", "first": None}
        for name in ("files", "training", "prompts", "gateway")
    ]
    return {"candidate": "sha", "rows": 5, "training_rows": 5, "parts": parts, **changed}


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        (None, "does not exist"),
        (report(candidate="another"), "was checked for the adapter another, the candidate's is sha"),
        (report(parts=report()["parts"][:3]), "has no rows for gateway"),
        (
            report(parts=[{**part, "rows": 0} for part in report()["parts"]]),
            "has no rows for files, training, prompts, gateway",
        ),
        ({"candidate": "sha"}, "is no report of serve parity"),
    ],
    ids=["missing", "stale", "partial", "empty", "of another form"],
)
def test_a_report_that_shows_nothing_fails_closed(
    tmp_path: Path, spoilt: dict[str, Any] | None, words: str
) -> None:
    if spoilt is not None:
        write_json(tmp_path / "parity.json", spoilt)
    with pytest.raises(RatchetError, match=words):
        judge_parity(tmp_path / "parity.json", "sha")


def test_a_mismatch_blocks_and_its_token_is_told_before_the_names_of_files(tmp_path: Path) -> None:
    parts = report()["parts"]
    parts[0] |= {"mismatches": 1, "result": "fail", "reason": "a file differs"}
    parts[2] |= {"mismatches": 2, "result": "fail", "reason": "a token differs", "first": {"row": "r"}}
    write_json(tmp_path / "parity.json", report(parts=parts))
    check = judge_parity(tmp_path / "parity.json", "sha")
    assert check.result == "fail"
    assert 0 < check.reason.index("a token differs") < check.reason.index("a file differs")


def test_the_manifest_of_a_training_names_the_files_that_are_served(candidate: Path) -> None:
    files = read_json(candidate / MANIFEST)["files"]
    assert {"chat_template.jinja", "tokenizer.json", WEIGHTS} <= files.keys()
    assert files[WEIGHTS] == sha256_file(candidate / WEIGHTS)
