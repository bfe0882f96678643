"""Compute likelihoods and greedy answers of a loaded model in batches, for evaluation and checks."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from ratchet.models.chat_template import ChatFormat, Encoded


class Likelihood(NamedTuple):
    """Sums of the negative log-likelihood, in nats, with the numbers of tokens.

    The answer includes its end of turn. The prompt excludes its first token, which nothing predicts.
    """

    nll: float
    tokens: int
    prompt_nll: float
    prompt_tokens: int


@torch.inference_mode()
def answer_likelihoods(
    model: Any, rows: Sequence[Encoded], *, pad_id: int, batch_size: int
) -> list[Likelihood]:
    """Return one likelihood per row, in the order of `rows`.

    Padding is on the right, since a causal model's logits do not depend on later tokens.
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
        # The virtual tokens of prompt tuning have logits too, before those of the row.
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
    """Return the texts of greedy answers, in the order of `prompts`."""
    return [
        chat.decode_answer(ids)
        for ids in greedy_ids(model, prompts, chat, max_new_tokens=max_new_tokens, batch_size=batch_size)
    ]


@torch.inference_mode()
def greedy_ids(
    model: Any, prompts: Sequence[list[int]], chat: ChatFormat, *, max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """Return the tokens of each greedy answer, including the end token if it was generated.

    Padding is on the left, so that all answers of a batch start at the same position.
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
    """Return an answer up to and including its first end token."""
    return next((ids[: place + 1] for place, token in enumerate(ids) if token in ends), ids)


def _has_virtual_tokens(model: Any) -> bool:
    """Return whether the model has virtual tokens, so that rows must not be padded on the left.

    PEFT 0.21 puts them before the padding and counts the padding as positions, which would shift the row.
    """
    configs = getattr(model, "peft_config", {})
    return any(config.is_prompt_learning for config in configs.values())


def by_length(lengths: Sequence[int], batch_size: int, *, alike: bool = False) -> Iterator[list[int]]:
    """Yield batches of indices of similar lengths, to pad little; `alike`: of equal lengths only."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    groups = (
        [list(group) for _, group in groupby(order, key=lambda index: lengths[index])] if alike else [order]
    )
    for group in groups:
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]
