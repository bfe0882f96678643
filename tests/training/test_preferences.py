"""Preferences: what is compared stays together, the losses are the papers', and thumbs teach a model."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from stages import run_stages

from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig
from ratchet.data.batches import write_batch
from ratchet.data.examples import Example, Message, encode_line, make_example, read_examples
from ratchet.data.mixture import pair_up, read_undesirable
from ratchet.errors import DataError
from ratchet.files import read_json, write_bytes, write_json
from ratchet.models.adapters import add_adapter
from ratchet.models.chat_template import Encoded, encode_last_answer
from ratchet.models.loading import load_base, load_chat
from ratchet.monitoring.request_log import URL_VARIABLE, open_log
from ratchet.monitoring.request_records import Feedback, Logged
from ratchet.sources.feedback import harvest
from ratchet.training.collation import RowCollator, make_batches
from ratchet.training.loss import PreferenceLoss
from ratchet.training.packing import (
    IGNORED,
    Role,
    Unit,
    group_rows,
    pack_units,
    read_windows,
    rows_of,
    units_of,
    write_windows,
)
from ratchet.training.schedule import Schedule
from ratchet.training.trainer import fit
from tasks.tokenize import tokenize

NOW = 1_790_000_000.0


def row(length: int, start: int = 3) -> Encoded:
    """The second half is learned."""
    return Encoded(list(range(start, start + length)), [place >= length // 2 for place in range(length)])


def pair(better: int, worse: int) -> Unit:
    return Unit([row(better), row(worse, start=9)], [Role.CHOSEN, Role.REJECTED])


UNITS = [pair(8, 6), Unit([row(5)], [Role.PLAIN]), pair(4, 12), pair(6, 6), Unit([row(3)], [Role.PLAIN])]


def test_rows_that_are_compared_stay_together(tmp_path):
    windows = pack_units(UNITS, 24)
    write_windows(tmp_path / "train.arrow", windows)
    read = read_windows(tmp_path / "train.arrow")

    assert read == windows
    found = [unit for window in read for unit in units_of(rows_of(window))]
    assert sorted([row.input_ids for row in unit] for unit in found) == sorted(
        [row.ids for row in unit.rows] for unit in UNITS
    )
    for group in group_rows(read, 1):
        roles = [role for row in group for role in row.roles]
        assert [later for role, later in itertools.pairwise(roles) if role == Role.CHOSEN] == [
            Role.REJECTED
        ] * roles.count(Role.CHOSEN)
        assert len(group) * max(len(row.input_ids) for row in group) <= max(24, len(units_of(group)[0]) * 12)


def test_a_pair_that_no_window_holds_is_kept_whole():
    windows = pack_units([pair(20, 20), pair(4, 4)], 24)
    assert max(len(window.input_ids) for window in windows) == 40
    assert sum(len(window.roles) for window in windows) == 4


def test_a_step_counts_units_and_not_tokens():
    batch = RowCollator(0)([[row for window in pack_units(UNITS, 1000) for row in rows_of(window)]])
    assert int(batch["shift_labels"].ne(IGNORED).sum()) == len(UNITS)
    assert int(batch["labels"].ne(IGNORED).sum()) == sum(
        sum(row.learned) for unit in UNITS for row in unit.rows
    )


# --- losses -------------------------------------------------------------------------------------------------

VOCAB = 24


def logits_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((*batch["labels"][:, 1:].shape, VOCAB), generator=generator)


def said(batch: dict[str, torch.Tensor], place: int) -> tuple[float, int]:
    """The log-probability of a row's answer, token by token, and the number of its tokens."""
    scores, total, tokens = logits_of(batch)[place].log_softmax(-1), 0.0, 0
    for position, label in enumerate(batch["labels"][place, 1:].tolist()):
        if label != IGNORED:
            total, tokens = total + float(scores[position, label]), tokens + 1
    return total, tokens


def losses(
    units: list[Unit], references: list[float], **settings: float
) -> tuple[dict[str, Any], list[float]]:
    rows = [row for window in pack_units(units, 1000) for row in rows_of(window)]
    rows = [row._replace(references=[value]) for row, value in zip(rows, references, strict=True)]
    batch = RowCollator(0)([rows])
    loss = PreferenceLoss(**{"beta": 0.3, "chosen_weight": 0.0, "undesirable_weight": 1.0} | settings)
    found, count = loss(batch, lambda chosen: logits_of(batch)[chosen], torch.tensor(7))
    assert int(count) == 7
    return batch, found.tolist()


@pytest.mark.parametrize("chosen_weight", [0.0, 0.5])
def test_the_loss_of_a_pair_is_dpos(chosen_weight):
    batch, found = losses([pair(8, 6)], [-9.0, -4.0], chosen_weight=chosen_weight)
    (better, tokens), (worse, _) = said(batch, 0), said(batch, 1)
    margin = 0.3 * ((better + 9.0) - (worse + 4.0))
    wanted = math.log1p(math.exp(-margin)) - chosen_weight * better / tokens
    assert found == pytest.approx([wanted], rel=1e-5)


def test_the_losses_of_judged_answers_are_ktos():
    units = [
        Unit([row(8), row(6, 9)], [Role.DESIRABLE, Role.MISMATCHED]),
        Unit([row(7, 4), row(5, 8)], [Role.UNDESIRABLE, Role.MISMATCHED]),
    ]
    batch, found = losses(units, [-30.0, -40.0, -35.0, -38.0], undesirable_weight=2.0)
    good, other, bad, another = (
        said(batch, place)[0] + reference for place, reference in enumerate([30.0, 40.0, 35.0, 38.0])
    )
    drift = max(0.0, (other + another) / 2)
    assert drift > 0

    def value(above: float) -> float:
        return 1 / (1 + math.exp(-0.3 * above))

    assert found == pytest.approx([1 - value(good - drift), 2 * (1 - value(drift - bad))], rel=1e-4)


def test_a_plain_row_among_preferences_is_learned_by_cross_entropy():
    batch, found = losses([Unit([row(8)], [Role.PLAIN])], [0.0])
    total, tokens = said(batch, 0)
    assert found == pytest.approx([-total / tokens], rel=1e-5)


def test_references_are_what_the_model_says_before_its_first_step(tiny_base):
    model, chat = load_base(tiny_base), load_chat(tiny_base)
    example = make_example([Message("user", "which one?"), Message("assistant", "this")], {})
    unit = Unit([encode_last_answer(chat, example), row(9)], [Role.CHOSEN, Role.REJECTED])
    batches = make_batches(pack_units([unit], 64), [], 1, accumulate=2, pad_id=0, apart=None)
    prepared = PreferenceLoss(beta=0.1, chosen_weight=1.0, undesirable_weight=1.0).prepare(model, batches)

    for found in prepared.train[0]:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([found.input_ids])).logits[0, :-1].log_softmax(-1)
        labels = torch.tensor(found.labels[1:])
        learned = labels != IGNORED
        wanted = float(scores[learned].gather(1, labels[learned][:, None]).sum())
        assert found.references == pytest.approx([wanted], rel=1e-4)
    assert [len(group) for group in prepared.train] == [2, 1], "and what only fills a step is there"


@pytest.mark.parametrize(
    "roles", [[Role.CHOSEN, Role.REJECTED], [Role.DESIRABLE, Role.MISMATCHED]], ids=["dpo", "kto"]
)
def test_a_training_makes_the_better_answer_likelier(tiny_base, roles):
    units = [Unit([row(10, 20 + place), row(10, 60 + place)], roles) for place in range(6)]
    if Role.DESIRABLE in roles:
        units += [
            Unit([row(10, 60 + place), row(10, 20)], [Role.UNDESIRABLE, roles[1]]) for place in range(6)
        ]
    model = add_adapter(load_base(tiny_base), AdapterConfig(rank=4, alpha=8.0, dropout=0.1), seed=1)
    loss = PreferenceLoss(beta=0.5, chosen_weight=0.0, undesirable_weight=1.0)
    schedule = Schedule(
        steps=16,
        batch_windows=2,
        accumulate=2,
        learning_rate=1e-2,
        kind="constant",
        warmup_share=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        evaluations=3,
        patience=3,
        seed=1,
    )
    seen: list[float] = []

    def report(step: int, values: dict[str, float]) -> None:
        seen.extend([values["validation_loss"]] if "validation_loss" in values else [])

    windows = pack_units(units, 64)
    fit(model, windows, windows, schedule, loss=loss, pad_id=0, report=report)

    assert seen[-1] < seen[0]
    assert seen[-1] < (math.log(2) if Role.CHOSEN in roles else 0.5), "less than without any training"


# --- rows ---------------------------------------------------------------------------------------------------


def example(question: str, answer: str, *, batch: str = "one", worse: str = "", good: bool = True) -> Example:
    return make_example(
        [Message("user", question), Message("assistant", answer)],
        {"batch": batch, "source": "jsonl"},
        rejected=Message("assistant", worse) if worse else None,
        desirable=good,
    )


def test_a_bad_answer_is_paired_with_a_good_one_to_the_same_prompt():
    rows = [example("a?", "1"), example("b?", "2", worse="3"), example("c?", "4")]
    bad = [example("B?", "5", good=False), example("a?", "6", good=False), example("d?", "7", good=False)]
    found = pair_up(rows, bad)
    pairs = [(row.answer, row.rejected and row.rejected.content) for row in found.rows]
    assert pairs == [("1", "6"), ("2", "3"), ("4", None), ("2", "5")]
    assert [row.answer for row in found.unpaired] == ["7"]


def config_for(objective: str, config: Config, **train: Any) -> Config:
    return config.model_copy(
        update={
            "train": config.train.model_copy(
                update={"objective": objective, "max_feedback_share": 1.0} | train
            ),
            "evaluate": config.evaluate.model_copy(update={"metrics": ["exact_match", "preference"]}),
        }
    )


@pytest.fixture
def judged(tmp_path) -> Path:
    splits = {
        "train": [
            *(example(f"q{place}?", f"a{place}") for place in range(8)),
            example("p?", "yes", worse="no"),
        ],
        "undesirable_train": [example("q0?", "bad", good=False), example("lonely?", "bad", good=False)],
        **{split: [example(f"{split}?", "a")] for split in ("validation", "test")},
        "golden": [],
    }
    for name, rows in splits.items():
        write_bytes(tmp_path / "prepared" / f"{name}.jsonl", map(encode_line, rows))
    return tmp_path / "prepared"


def roles_of(tokens: Path) -> list[list[int]]:
    return sorted(
        [role for row in unit for role in row.roles]
        for window in read_windows(tokens / "train.arrow")
        for unit in units_of(rows_of(window))
    )


def test_what_is_learned_from_each_row_is_counted(judged, tiny_base, nobody, tiny_config, tmp_path):
    found = tokenize(judged, tiny_base, nobody, tmp_path / "dpo", config_for("dpo", tiny_config))
    assert msgspec.to_builtins(found.preferences) == {
        "plain": 7,
        "pairs": 2,
        "desirable": 0,
        "undesirable": 0,
        "unpaired": 1,
    }
    assert roles_of(tmp_path / "dpo") == [[Role.PLAIN]] * 7 + [[Role.CHOSEN, Role.REJECTED]] * 2

    found = tokenize(judged, tiny_base, nobody, tmp_path / "kto", config_for("kto", tiny_config))
    assert (found.preferences.desirable, found.preferences.undesirable) == (9, 3)
    assert (
        roles_of(tmp_path / "kto")
        == [[Role.DESIRABLE, Role.MISMATCHED]] * 9 + [[Role.UNDESIRABLE, Role.MISMATCHED]] * 3
    )

    found = tokenize(judged, tiny_base, nobody, tmp_path / "sft", config_for("sft", tiny_config))
    assert found.preferences is msgspec.UNSET and found.train.rows == 9
    assert not any(window.roles for window in read_windows(tmp_path / "sft/train.arrow"))


def test_an_answer_of_another_row_stands_beside_each_judged_one(
    judged, tiny_base, nobody, tiny_config, tmp_path
):
    tokenize(judged, tiny_base, nobody, tmp_path / "kto", config_for("kto", tiny_config))
    for window in read_windows(tmp_path / "kto/train.arrow"):
        for answer, other in units_of(rows_of(window)):
            first = answer.labels.index(next(label for label in answer.labels if label != IGNORED))
            assert answer.input_ids[:first] == other.input_ids[:first]
            assert answer.input_ids[first:] != other.input_ids[first:]
            assert other.labels == [IGNORED] * first + other.input_ids[first:]


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_without_any_preference_nothing_is_trained(
    objective, judged, tiny_base, nobody, tiny_config, tmp_path
):
    plain = [row for row in read_examples(judged / "train.jsonl") if not row.rejected]
    write_bytes(judged / "train.jsonl", map(encode_line, plain))
    write_bytes(judged / "undesirable_train.jsonl", [])
    with pytest.raises(DataError, match="none of 8 training rows"):
        tokenize(judged, tiny_base, nobody, tmp_path / "out", config_for(objective, tiny_config))
    assert not (tmp_path / "out").exists()


# --- the whole way ------------------------------------------------------------------------------------------

THINGS = ("river", "engine", "letter", "garden", "window", "bottle", "pencil", "ladder")
PLACES = ("north", "south", "east", "west", "valley", "harbour", "village", "castle", "forest", "station")


def questions(first: int, count: int) -> list[tuple[str, str, str]]:
    """(question, one way to answer it, the other way)."""
    mixed = [(thing, place, number) for number in range(20) for thing in THINGS for place in PLACES]
    return [
        (f"tell me of the {thing} number {number} in the {place}", f"sure the {thing}", f"well a {thing}")
        for thing, place, number in mixed[first : first + count]
    ]


@pytest.mark.e2e
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_thumbs_make_a_version_that_prefers_what_people_liked(
    objective, tmp_path, tiny_base, nobody, tiny_config, monkeypatch
):
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    config = Config.model_validate(
        tiny_config.model_dump(mode="json")
        | {"prepare": {"min_rows": 40, "near_search": False, "test_share": 0.25, "validation_share": 0.1}}
        | {"tokenize": {"max_length": 96, "window": 192}}
        | {"train": {"epochs": 4.0, "evaluations": 2, "learning_rate": 1e-2, "max_feedback_share": 1.0}}
        | {"request_log": {"keep_days": 1e5}, "parity": {"rows": 8}}
        | {"ingest": {"feedback": {"max_rows_per_user": 1000, "max_trigger_rows": 1000}}}
    )
    # v1 has learned both ways to answer, the second for a fifth of the questions.
    both = [
        {"prompt": question, "completion": usual if place % 5 else rare}
        for place, (question, usual, rare) in enumerate(questions(0, 160))
    ]
    batch(tmp_path, [msgspec.json.encode(row) for row in both], "jsonl", "completion")
    first = run_stages(tmp_path, tiny_base, nobody, config, out=tmp_path / "v1").candidate
    manifest = {**read_json(first / "manifest.json"), "version": 1}
    write_json(first / "manifest.json", manifest)

    # People like the rare one.
    config = config_for(
        objective, config, learning_rate=5e-3, epochs=2.0, preference_beta=0.3, undesirable_weight=1.0
    )
    config = config.model_copy(
        update={"gate": config.gate.model_copy(update={"metric": "preference", "min_rows": 10})}
    )
    log = open_log(tmp_path, config)
    for place, (question, *said) in enumerate(questions(160, 100)):
        for answer, score in zip(said, (0.0, 1.0), strict=True):
            id = f"{place}-{score}"
            log.put(
                Logged(
                    id=id,
                    at=NOW,
                    user=f"user-{place % 20}",
                    arm="champion",
                    version=1,
                    messages=(("user", question),),
                    answer=answer,
                    finish="stop",
                )
            )
            log.add_feedback(Feedback(id, "", NOW, score))
    log.close()
    rows = harvest(tmp_path, config, now=NOW + 60)
    assert len(rows) == 200
    batch(tmp_path, [msgspec.json.encode(row) for row in rows], "feedback", "messages")
    second = run_stages(tmp_path, tiny_base, first, config, out=tmp_path / "v2")
    assert second.compared.passed, second.compared.parts

    bad = read_undesirable(tmp_path / "prepared", "test")
    assert len(bad) > 15
    scores = {name: found["preference"] for name, found in second.scores.items() if name != "simple"}
    assert scores["candidate"].mean > 0.9
    assert scores["candidate"].low > scores["champion"].high, "it beats its start on held-out preferences"
    success = next(check for check in second.verdict.checks if check.name == "success")
    assert (success.result, success.metric, success.rows) == ("pass", "preference", len(bad))


def batch(root: Path, lines: list[bytes], source: str, form: str) -> None:
    write_batch(
        root / "raw",
        lines,
        source=source,
        label=source,
        time="2026-01-01T00:00:00Z",
        licence="PSF-2.0",
        who="tests",
        form=form,
    )
