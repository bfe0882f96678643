"""Packing: every row whole, in one window, and none of them sees another."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from ratchet.models.chat_template import Encoded
from ratchet.training.collation import WindowCollator
from ratchet.training.packing import (
    IGNORED,
    TOKEN_COLUMNS,
    Window,
    by_length,
    pack,
    read_windows,
    write_windows,
)

LIMIT = 12


def make_row(index: int, length: int, learned: list[bool]) -> Encoded:
    """Tokens that no other row has, so that a window tells which rows are in it."""
    return Encoded(
        [1000 * index + position for position in range(length)],
        [learned[position % len(learned)] for position in range(length)],
    )


ROWS = st.lists(
    st.tuples(st.integers(1, LIMIT), st.lists(st.booleans(), min_size=1, max_size=5)), max_size=40
).map(lambda shapes: [make_row(index, *shape) for index, shape in enumerate(shapes)])


def cut_at_starts(window: Window) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each row in a window; a row starts where the position is 0."""
    starts = [index for index, position in enumerate(window.position_ids) if position == 0]
    return [
        (window.input_ids[start:end], window.labels[start:end])
        for start, end in zip(starts, [*starts[1:], len(window.input_ids)], strict=True)
    ]


@settings(deadline=None)
@given(rows=ROWS)
def test_every_row_is_whole_in_exactly_one_window_within_the_limit(rows):
    windows = pack(rows, LIMIT)
    assert all(0 < len(window.input_ids) <= LIMIT for window in windows)
    assert all(len({len(getattr(window, name)) for name in TOKEN_COLUMNS}) == 1 for window in windows)
    found = [ids for window in windows for ids, _ in cut_at_starts(window)]
    assert sorted(found) == sorted(row.ids for row in rows)


@settings(deadline=None)
@given(rows=ROWS)
def test_labels_stand_only_where_the_row_is_learned_and_never_at_its_start(rows):
    of_row = {row.ids[0]: row for row in rows}
    for window in pack(rows, LIMIT):
        for ids, labels in cut_at_starts(window):
            learned = of_row[ids[0]].learned
            assert labels == [
                token if position and learned[position] else IGNORED for position, token in enumerate(ids)
            ]


@settings(deadline=None)
@given(rows=ROWS)
def test_two_windows_never_fit_into_one(rows):
    """Best fit leaves no two windows that are both at most half full."""
    half_empty = [window for window in pack(rows, LIMIT) if len(window.input_ids) <= LIMIT // 2]
    assert len(half_empty) <= 1


def test_the_fullest_window_that_still_takes_a_row_gets_it():
    windows = pack([make_row(index, length, [True]) for index, length in enumerate([7, 9, 3, 5])], LIMIT)
    assert [window.position_ids for window in windows] == [[*range(9), *range(3)], [*range(7), *range(5)]]


def test_a_row_that_is_longer_than_a_window_is_refused_with_both_lengths():
    with pytest.raises(ValueError, match="a row has 13 tokens, the window holds 12"):
        pack([make_row(0, 13, [True])], LIMIT)


def test_nothing_gives_no_window():
    assert pack([], LIMIT) == []


@settings(deadline=None, max_examples=25)
@given(rows=ROWS)
def test_windows_come_back_from_their_file(rows, tmp_path_factory):
    path, windows = tmp_path_factory.mktemp("windows") / "train.arrow", pack(rows, LIMIT)
    write_windows(path, windows)
    assert read_windows(path) == windows


def test_equal_windows_are_equal_bytes(tmp_path):
    windows = pack([make_row(index, 5, [False, True]) for index in range(20)], LIMIT)
    for name in ("a", "b"):
        write_windows(tmp_path / name, windows)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# --- in a real model ---

GENERATOR = torch.Generator().manual_seed(3)
TEXTS = [torch.randint(3, 97, (length,), generator=GENERATOR).tolist() for length in (5, 11, 8, 3, 9, 1, 7)]
REAL_ROWS = [Encoded(ids, [position >= len(ids) // 3 for position in range(len(ids))]) for ids in TEXTS]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def llama(request) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation=request.param,
        )
    )


def summed_loss(model: LlamaForCausalLM, windows: list[Window]) -> torch.Tensor:
    """In nats; what the Trainer sends through the model, as it sends it."""
    batch = WindowCollator(pad_id=0)(windows)
    return model(**batch, use_cache=False, num_items_in_batch=1).loss


def gradients(model: LlamaForCausalLM, windows: list[Window]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    summed_loss(model, windows).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def alone(row: Encoded) -> list[Window]:
    return pack([row], LIMIT)


def test_a_row_has_the_same_loss_and_gradient_packed_with_others_or_alone(llama):
    learning = [row for row in REAL_ROWS if len(row.ids) > 1]
    packed = pack(learning, 2 * LIMIT)
    assert len(packed) < len(learning)
    assert summed_loss(llama, packed).item() == pytest.approx(
        sum(summed_loss(llama, alone(row)).item() for row in learning), rel=1e-5
    )
    together, apart = gradients(llama, packed), [gradients(llama, alone(row)) for row in learning]
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, sum(each[name] for each in apart), rtol=1e-4, atol=1e-5)


def test_each_token_is_predicted_from_its_own_row_alone(llama):
    for window in pack(REAL_ROWS, 2 * LIMIT):
        batch = WindowCollator(pad_id=0)([window])
        logits = llama(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits[0]  # (seq, vocab)
        starts = [index for index, position in enumerate(window.position_ids) if position == 0]
        for start, (ids, _) in zip(starts, cut_at_starts(window), strict=True):
            by_itself = llama(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            torch.testing.assert_close(logits[start : start + len(ids)], by_itself, rtol=1e-5, atol=1e-5)


def test_padding_does_not_change_the_loss(llama):
    short, long = pack(REAL_ROWS[:1], LIMIT), pack(REAL_ROWS[1:2], LIMIT)
    assert len(WindowCollator(pad_id=0)([*short, *long])["input_ids"][0]) == len(long[0].input_ids)
    assert summed_loss(llama, [*short, *long]).item() == pytest.approx(
        summed_loss(llama, short).item() + summed_loss(llama, long).item(), rel=1e-5
    )


@pytest.mark.parametrize("pad_id", [0, 1, 96])
def test_the_padding_token_does_not_matter(llama, pad_id):
    windows = pack(REAL_ROWS, LIMIT)
    losses = [
        llama(**WindowCollator(pad)(windows), use_cache=False, num_items_in_batch=1).loss.item()
        for pad in (2, pad_id)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(40, 200))
def test_every_row_is_in_exactly_one_group_and_no_group_is_larger_padded_than_its_room(lengths, budget):
    rows = [
        Window([index] * length, [IGNORED] * length, list(range(length)))
        for index, length in enumerate(lengths)
    ]
    groups = by_length([[row] for row in rows], budget)
    assert sorted(row.input_ids[0] for group in groups for row in group) == list(range(len(rows)))
    assert all(len(group) * max(len(row.input_ids) for row in group) <= budget for group in groups)
    bounds = [
        (min(len(row.input_ids) for row in group), max(len(row.input_ids) for row in group))
        for group in groups
    ]
    assert all(
        shortest >= longest for (shortest, _), (_, longest) in pairwise(bounds)
    )  # like lengths together
