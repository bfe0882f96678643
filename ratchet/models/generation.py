"""Compute likelihoods and greedy answers of a loaded model, in batches, as evaluation measures them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from ratchet.models.chat_template import ChatFormat, Encoded


class Likelihood(NamedTuple):
    """Hold sums of the negative log-likelihood in nats, and the numbers of tokens summed.

    The answer includes its end of turn; the prompt leaves out its first token, which nothing predicts.
    """

    nll: float
    tokens: int
    prompt_nll: float
    prompt_tokens: int


@torch.inference_mode()
def answer_likelihoods(
    model: Any, rows: Sequence[Encoded], *, pad_id: int, batch_size: int
) -> list[Likelihood]:
    """Return one likelihood a row, in the order of `rows`.

    Padding is on the right: a causal model's logits do not depend on what follows.
    """
    found: list[Likelihood] = [Likelihood(0.0, 0, 0.0, 0)] * len(rows)
    for batch in by_length([len(row.ids) for row in rows], batch_size):
        length = max(len(rows[index].ids) for index in batch)
        ids = torch.tensor(
            [rows[index].ids + [pad_id] * (length - len(rows[index].ids)) for index in batch],
            device=model.device,
        )  # (batch, seq)
        learned = torch.tensor(
            [rows[index].learned + [False] * (length - len(rows[index].ids)) for index in batch],
            device=model.device,
        )
        mask = torch.tensor(
            [[1] * len(rows[index].ids) + [0] * (length - len(rows[index].ids)) for index in batch],
            device=model.device,
        )
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        # Virtual tokens of prompt tuning stand before the row and have logits as well.
        logits = logits[:, -length:-1].float()  # (batch, seq - 1, vocab)
        losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # (batch, seq - 1)
        answered, asked = learned[:, 1:], mask[:, 1:].bool() & ~learned[:, 1:]
        for position, index in enumerate(batch):
            found[index] = Likelihood(
                *_sum(losses[position], answered[position]), *_sum(losses[position], asked[position])
            )
    return found


def _sum(losses: torch.Tensor, counted: torch.Tensor) -> tuple[float, int]:
    return float((losses * counted).sum()), int(counted.sum())


def greedy_answers(
    model: Any, prompts: Sequence[list[int]], chat: ChatFormat, *, max_new_tokens: int, batch_size: int
) -> list[str]:
    """Return the answers' texts, in the order of `prompts`."""
    return [
        chat.decode_answer(ids)
        for ids in greedy_ids(model, prompts, chat, max_new_tokens=max_new_tokens, batch_size=batch_size)
    ]


@torch.inference_mode()
def greedy_ids(
    model: Any, prompts: Sequence[list[int]], chat: ChatFormat, *, max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """Return the tokens of each answer, with the one that ended it.

    Padding is on the left, so that every answer starts at the same position.
    """
    answers: list[list[int]] = [[]] * len(prompts)
    for batch in by_length([len(prompt) for prompt in prompts], batch_size, alike=_has_virtual_tokens(model)):
        length = max(len(prompts[index]) for index in batch)
        ids = torch.tensor(
            [[chat.pad_id] * (length - len(prompts[index])) + prompts[index] for index in batch],
            device=model.device,
        )  # (batch, seq)
        mask = torch.tensor(
            [[0] * (length - len(prompts[index])) + [1] * len(prompts[index]) for index in batch],
            device=model.device,
        )
        made = model.generate(  # (batch, seq + answer)
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(chat.stop_ids),
            pad_token_id=chat.pad_id,
            num_beams=1,
        )
        for position, index in enumerate(batch):
            answers[index] = up_to_end(made[position, length:].tolist(), chat.stop_ids)
    return answers


def up_to_end(ids: list[int], ends: Container[int]) -> list[int]:
    """Cut an answer after its first end token."""
    return next((ids[: place + 1] for place, token in enumerate(ids) if token in ends), ids)


def _has_virtual_tokens(model: Any) -> bool:
    """Return whether the model has virtual tokens, whose rows must not be padded on the left.

    PEFT 0.21 puts them before the padding and counts its positions, so padding would move the row away.
    """
    configs = getattr(model, "peft_config", {})
    return any(config.is_prompt_learning for config in configs.values())


def by_length(lengths: Sequence[int], batch_size: int, *, alike: bool = False) -> Iterator[list[int]]:
    """Yield batches of indices of similar lengths, so that little is padded; `alike`: of equal lengths."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    groups = (
        [list(group) for _, group in groupby(order, key=lambda index: lengths[index])] if alike else [order]
    )
    for group in groups:
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]
