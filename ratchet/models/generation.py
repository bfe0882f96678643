"""Compute likelihoods and greedy answers of a loaded model in batches, for evaluation and checks."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from ratchet.models.cache import align_right, forward, is_hybrid, new_cache, select
from ratchet.models.chat_template import ChatFormat, Encoded

# Names of each row's pictures, ids (batch, seq) → what the model takes besides ids and mask: see
# `ChatFormat.inputs`.
Inputs = Callable[[Sequence[Sequence[str]], torch.Tensor], dict[str, torch.Tensor]]


def no_inputs(media: Sequence[Sequence[str]], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the inputs of a model of text."""
    return {}


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
    model: Any, rows: Sequence[Encoded], *, pad_id: int, batch_size: int, inputs: Inputs = no_inputs
) -> list[Likelihood]:
    """Return one likelihood per row, in the order of `rows`; rows with pictures need the chat's `inputs`.

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
        more = inputs([rows[index].media for index in batch], ids)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
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
    model: Any,
    prompts: Sequence[list[int]],
    chat: ChatFormat,
    *,
    max_new_tokens: int,
    batch_size: int,
    media: Sequence[Sequence[str]] = (),
) -> list[list[int]]:
    """Return the tokens of each greedy answer, including the end token if it was generated.

    `media` has the names of each prompt's pictures, in `chat.media`; empty: no prompt shows any.

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
            **chat.inputs([media[index] for index in batch] if media else [], ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(chat.stop_ids),
            pad_token_id=chat.pad_id,
            num_beams=1,
        )
        for position, index in enumerate(batch):
            answers[index] = up_to_end(made[position, length:].tolist(), chat.stop_ids)
    return answers


@torch.inference_mode()
def likelihoods_and_answers(
    model: Any,
    rows: Sequence[Encoded],
    prompts: Sequence[list[int]],
    chat: ChatFormat,
    *,
    max_new_tokens: int,
) -> tuple[list[Likelihood], list[list[int]]]:
    """Return what `answer_likelihoods` and `greedy_ids` return for one batch, in fewer forward passes.

    One pass over prompt and reference gives the likelihoods, and the likeliest token after each token of the
    reference. The greedy answer equals the reference up to the first token that is not the likeliest; only
    from there it is generated, on the same cache. The start that all prompts share is computed once. This
    is greedy speculative decoding (arXiv 2211.17192) with the reference as the draft.
    """
    media, count = [row.media for row in rows], len(rows)
    if any(media) or _has_virtual_tokens(model) or is_hybrid(model) or not _begin_with(rows, prompts):
        greedy: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": count, "media": media}
        return (
            answer_likelihoods(model, rows, pad_id=chat.pad_id, batch_size=count, inputs=chat.inputs),
            greedy_ids(model, prompts, chat, **greedy),
        )
    wholes = [row.ids for row in rows]
    shared = _shared_start(prompts)
    cache, opening = new_cache(model), torch.empty(0)
    if shared:
        ids = torch.tensor([wholes[0][:shared]], device=model.device)
        ones, places = torch.ones_like(ids), torch.arange(shared, device=model.device)[None]
        opening = forward(model, ids, ones, places, cache, whole=True)[0]  # (shared, vocab)
        cache.batch_repeat_interleave(len(rows))
    length = max(map(len, wholes))
    ids = torch.tensor(
        [whole[shared:] + [chat.pad_id] * (length - len(whole)) for whole in wholes], device=model.device
    )  # (batch, seq)
    lengths = torch.tensor([len(whole) for whole in wholes], device=model.device)
    places = torch.arange(length, device=model.device).expand(len(rows), -1)
    mask = (places < lengths[:, None]).long()
    logits = forward(model, ids, mask, places[:, shared:], cache, whole=True)  # (batch, seq, vocab)
    likelihoods, answers = [], []
    for row, prompt, later in zip(rows, prompts, logits, strict=True):
        # Row i of `predicted` predicts token i + 1.
        predicted = torch.cat([opening, later[: len(row.ids) - shared]]).float()  # (len(row.ids), vocab)
        following = torch.tensor(row.ids[1:], device=predicted.device)
        losses = cross_entropy(predicted[:-1], following, reduction="none")
        learned = torch.tensor(row.learned[1:], device=predicted.device)
        likelihoods.append(Likelihood(*_sum(losses, learned), *_sum(losses, ~learned)))
        likeliest = predicted[len(prompt) - 1 :].argmax(-1).tolist()
        answers.append(_agreed(likeliest, row.ids[len(prompt) :], chat.stop_ids)[:max_new_tokens])
    del logits, predicted, later
    _finish(model, cache, prompts, answers, chat.stop_ids, max_new_tokens)
    return likelihoods, answers


def _begin_with(rows: Sequence[Encoded], prompts: Sequence[list[int]]) -> bool:
    return all(row.ids[: len(prompt)] == prompt for row, prompt in zip(rows, prompts, strict=True))


def _shared_start(prompts: Sequence[list[int]]) -> int:
    """Return how many tokens all prompts share at their start, without the last token of any of them."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # what these two share, all that lie between them share
    length = min(map(len, prompts)) - 1
    return next((place for place in range(length) if first[place] != last[place]), length)


def _agreed(likeliest: Sequence[int], reference: Sequence[int], ends: Container[int]) -> list[int]:
    """Return the greedy answer as far as the reference shows it: what both share, and the token after it."""
    answer = []
    for place, token in enumerate(likeliest):
        answer.append(token)
        if token in ends or place == len(reference) or token != reference[place]:
            break
    return answer


def _finish(
    model: Any,
    cache: Any,
    prompts: Sequence[list[int]],
    answers: list[list[int]],
    ends: Container[int],
    max_new_tokens: int,
) -> None:
    """Generate the rest of the answers, in place. `cache` holds each row's prompt and reference."""

    def open_rows(among: Sequence[int]) -> list[int]:
        return [i for i in among if len(answers[i]) < max_new_tokens and answers[i][-1] not in ends]

    rows = open_rows(range(len(answers)))
    if not rows:
        return
    # Of each row the cache keeps the prompt and the answer without its newest token, padded on the left.
    kept = torch.tensor([len(prompts[i]) + len(answers[i]) - 1 for i in rows], device=model.device)
    mask = align_right(cache, rows, kept)
    while rows:
        newest = torch.tensor([answers[i][-1:] for i in rows], device=model.device)
        positions = mask.sum(-1, keepdim=True)  # (batch, 1)
        mask = torch.cat([mask, torch.ones_like(positions)], dim=1)
        logits = forward(model, newest, mask, positions, cache, whole=False)[:, -1]
        for i, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
            answers[i].append(token)
        left = open_rows(rows)
        if left and len(left) < len(rows):
            places = [rows.index(i) for i in left]
            mask = mask[places]
            start = int(mask.argmax(-1).min())
            mask = mask[:, start:]
            select(cache, places, start)
        rows = left


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
