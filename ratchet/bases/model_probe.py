"""Check a loaded base with forward passes over a few tokens: its cache, packed rows, two training steps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from ratchet.config.training import AdapterConfig
from ratchet.data.examples import MEDIA_MARK, Example, Message, make_example
from ratchet.media.sounds import RATE, write_flac
from ratchet.models.adapters import (
    ALL_LINEAR,
    PREFIXED,
    add_adapter,
    freeze_outside,
    linear_modules,
    prepare_quantised,
)
from ratchet.models.cache import forward, is_hybrid, join, logits_at, new_cache, place_rows, select
from ratchet.models.chat_template import ChatFormat, Encoded
from ratchet.models.generation import greedy_ids
from ratchet.models.loading import language_model, without_adapter
from ratchet.models.manifests import Finding

# Accepted differences of logits, as a share of the largest logit. In float32, sums in another order differ by
# 1e-5 at most. A convolution over three tokens that reads the previous row differs by 3e-4 (untrained, width
# 32), and has to be found.
TOLERANCE = {torch.float32: 1e-4}
HALF_TOLERANCE = 5e-2
ANSWER = 6  # tokens of a generated answer
ASKED = (Message("user", "What is it?"),)
ASKED_LONGER = (Message("user", "What is it, and what is it good for?"),)
# Names of what a row shows: two equal ones; another of the same size first; one of another size first.
SHOWN = {
    "pictures": (("wide", "wide"), ("other", "wide"), ("tall", "wide")),
    "recordings": (("low.flac", "low.flac"), ("high.flac", "low.flac"), ("short.flac", "low.flac")),
}
RIGHT_PROCESSOR = "take the processor's files that belong to these weights"
ANSWERED = ("It is a test.", "Nothing at all.")


class Loaded(NamedTuple):
    """The model and its chat format, with the accepted difference of logits."""

    model: Any
    chat: ChatFormat
    tolerance: float


# --- pictures and recordings ---


@torch.inference_mode()
def prove_media(loaded: Loaded, kind: str) -> Finding:
    """Show the model a row with two pictures, or recordings: it must take each for as many tokens as it has
    features, and must see or hear them.
    """
    model, chat = loaded.model, loaded.chat.showing(_media())
    assert chat.processor
    sound, (same, other, odd) = kind == "recordings", SHOWN[kind]
    token = chat.processor.tokens[sound].id
    rows = {names: chat.encode(_shown(names)).ids for names in SHOWN[kind]}
    top = max(token, *map(max, rows.values()))
    if top >= (known := model.get_input_embeddings().weight.shape[0]):
        what = f"{kind} are written with the token {top}, the model has embeddings for {known}"
        return Finding(kind, "refused", what, RIGHT_PROCESSOR)
    if (wanted := getattr(model.config, f"{'audio' if sound else 'image'}_token_id", token)) != token:
        what = f"the processor writes the token {token} for {kind}, the model reads {wanted}"
        return Finding(kind, "refused", what, RIGHT_PROCESSOR)
    try:
        seen = {names: _answer_logits(model, chat, ids, names) for names, ids in rows.items()}
    except ValueError as error:  # the model counts tokens and features itself
        what = f"its processor writes other numbers of tokens than the model has features ({error})"
        return Finding(kind, "refused", what, RIGHT_PROCESSOR)
    if not all(logits.isfinite().all() for logits in seen.values()):
        return Finding(kind, "refused", "its logits are not finite", "take a base with other weights")
    if rows[same] == rows[other] and _apart(seen[same], seen[other]) == 0:
        what = f"other {kind} give the same logits: the model does not {'hear' if sound else 'see'} them"
        return Finding(kind, "refused", what, "take a base whose projector was trained")
    fewest, most = sorted(ids.count(token) for ids in (rows[same], rows[odd]))
    what = f"two small ones are {fewest} to {most} tokens, as many as the model has features"
    return Finding(kind, "ok", what)


def _shown(names: Sequence[str], before: str = "") -> Example:
    asked = Message("user", f"{before}{MEDIA_MARK}What is it?{MEDIA_MARK}", media=tuple(names))
    return make_example([asked, Message("assistant", ANSWERED[0])], {})


def _answer_logits(model: Any, chat: ChatFormat, ids: list[int], names: Sequence[str]) -> Tensor:
    """Return the logits for the answer's tokens of a row with media, (answer, vocab)."""
    row = _row(ids, model)
    inputs = chat.inputs([names], row)
    said = len(chat.encode_prompt(_shown(names).prompt))
    logits: Tensor = model(
        input_ids=row, attention_mask=torch.ones_like(row), **inputs, use_cache=False
    ).logits[0, said - 1 :]
    return logits.float()


@cache
def _media() -> dict[str, bytes]:
    pictures = {"wide": _draw(96, 64, 250), "other": _draw(96, 64, 10), "tall": _draw(64, 128, 10)}
    return pictures | {
        "low.flac": _sing(0.9, 220.0),
        "high.flac": _sing(0.9, 1760.0),
        "short.flac": _sing(0.3, 220.0),
    }


def _draw(width: int, height: int, colour: int) -> bytes:
    """Return a picture of two colours; its bytes do not matter, only that it can be decoded."""
    from PIL import Image

    image = Image.new("RGB", (width, height), (colour, 40, 200))
    image.paste((20, 200, colour), (0, 0, width // 2, height // 3))
    stored = io.BytesIO()
    image.save(stored, "PNG")
    return stored.getvalue()


def _sing(seconds: float, pitch: float) -> bytes:
    """Return a recording of a tone; `pitch` is in hertz."""
    times = np.arange(int(seconds * RATE)) / RATE
    return write_flac((0.5 * np.sin(2 * np.pi * pitch * times)).astype(np.float32))


# --- cache ---


@torch.inference_mode()
def prove_cache(loaded: Loaded) -> Finding:
    """Compare the decoding of evaluation and gateway, cached in padded batches, with the uncached model."""
    model, chat = loaded.model, loaded.chat
    other = "take a base of another architecture"
    prompts = [chat.encode_prompt(ASKED), chat.encode_prompt(ASKED_LONGER)]
    endless = ChatFormat(chat.tokenizer, processor=chat.processor)
    endless.stop_ids = frozenset()
    answers = greedy_ids(model, prompts, endless, max_new_tokens=ANSWER, batch_size=len(prompts))
    plain = [_plain(model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    if not all(logits.isfinite().all() for logits in plain):
        return Finding("cache", "refused", "its logits are not finite", "take a base with other weights")
    for answer, logits in zip(answers, plain, strict=True):
        if _behind(answer, logits) > loaded.tolerance:
            return Finding(
                "cache", "refused", "greedy answers in a padded batch are others than alone", other
            )
    for ours, theirs in zip(plain, _joined(model, prompts, answers), strict=True):
        if (apart := _apart(ours, theirs)) > loaded.tolerance:
            what = f"its cache changes the logits of an answer by {apart:.1g} of the largest one"
            return Finding("cache", "refused", what, other)
    kept = "keys and values, and states of other layers" if is_hybrid(model) else "keys and values"
    return Finding("cache", "ok", f"{kept}: the same answers with and without it, alone and in a batch")


def _plain(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """Return the logits for each token of an answer, (answer, vocab), computed without a cache."""
    logits: Tensor = model(input_ids=_row(prompt + answer, model), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].float()


def _behind(answer: list[int], logits: Tensor) -> float:
    """Return by how much the logits of an answer's tokens are below the highest, as a share of the largest.

    It is 0 for a greedy answer, and close to 0 where two tokens tie.
    """
    chosen = logits.gather(1, torch.tensor(answer, device=logits.device)[:, None])[:, 0]
    return float(((logits.amax(-1) - chosen) / logits.abs().amax(-1).clamp(min=1e-12)).max())


def _joined(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> list[Tensor]:
    """Return each row's logits (answer, vocab) as the gateway computes them.

    The second row joins the batch when the first has two tokens, and goes on alone when the first has ended.
    """
    found: list[list[Tensor]] = [[], []]
    cache, mask = new_cache(model), torch.ones_like(_row(prompts[0], model))
    found[0].append(_prefill(model, prompts[0], cache))
    mask = _step(model, cache, mask, [answers[0][:1]], [found[0]])
    other = new_cache(model)
    found[1].append(_prefill(model, prompts[1], other))
    length = max(mask.shape[1], len(prompts[1]))
    join(cache, other, length)
    mask = torch.cat([_left(mask, length), _left(torch.ones_like(_row(prompts[1], model)), length)])
    for place in range(1, ANSWER - 1):
        newest = [answers[0][place : place + 1], answers[1][place - 1 : place]]
        mask = _step(model, cache, mask, newest, found)
    start = int(mask[1].argmax())
    select(cache, [1], start)
    mask = mask[1:, start:]
    _step(model, cache, mask, [answers[1][ANSWER - 2 : ANSWER - 1]], found[1:])
    return [torch.stack(rows) for rows in found]


def _prefill(model: Any, prompt: list[int], cache: Any) -> Tensor:
    ids = _row(prompt, model)
    positions = torch.arange(len(prompt), device=ids.device)[None]
    return forward(model, ids, torch.ones_like(ids), positions, cache, whole=False)[0, -1].float()


def _step(model: Any, cache: Any, mask: Tensor, newest: list[list[int]], found: list[list[Tensor]]) -> Tensor:
    """Feed each row its newest token, append the logits to `found`, and return the extended mask."""
    positions = mask.sum(-1, keepdim=True)
    mask = torch.cat([mask, torch.ones_like(positions)], dim=1)
    ids = torch.tensor(newest, device=mask.device)
    logits = forward(model, ids, mask, positions, cache, whole=False)[:, -1].float()
    for rows, row in zip(found, logits, strict=True):
        rows.append(row)
    return mask


def _left(mask: Tensor, length: int) -> Tensor:
    return pad(mask, (length - mask.shape[1], 0))


# --- packing ---


@torch.inference_mode()
def packs(loaded: Loaded) -> bool:
    """Return whether a row has the same logits after another row in its window as alone.

    The window is computed as on a GPU: positions restart with each row, and there is no mask. Where the base
    reads pictures or recordings, rows with them are tried as well.
    """
    chat = loaded.chat.showing(_media())
    texts = [Encoded(chat.encode_prompt(asked), []) for asked in (ASKED, ASKED_LONGER)]
    tried = [texts]
    for kind in chat.reads:
        # Their media stand at other places: transformers 5.23 places those of Gemma 3 by the first row's.
        first, last = (chat.encode(_shown(*each)) for each in ((SHOWN[kind][2], "Look:"), (SHOWN[kind][0],)))
        tried += [[first, last], [first, texts[0], last]]
    try:
        return all(_apart_in_window(loaded.model, chat, rows) <= loaded.tolerance for rows in tried)
    except (TypeError, ValueError, RuntimeError):  # the model takes no position_ids
        return False


def _apart_in_window(model: Any, chat: ChatFormat, rows: Sequence[Encoded]) -> float:
    """Return by how much the logits of the last row differ after the others in its window and alone."""

    def logits(part: Sequence[Encoded]) -> Tensor:
        ids = _row([token for row in part for token in row.ids], model)
        positions = torch.tensor(
            [[place for row in part for place in range(len(row.ids))]], device=ids.device
        )
        inputs = chat.inputs([[name for row in part for name in row.media]], ids)
        found: Tensor = model(
            input_ids=ids, position_ids=place_rows(model, ids, positions, inputs), **inputs, use_cache=False
        ).logits[0, -len(part[-1].ids) :]
        return found.float()

    return _apart(logits(rows[-1:]), logits(rows))


def tell_packing(packed: bool) -> Finding:
    if packed:
        return Finding("packing", "ok", "rows in one window leave each other alone")
    what = "rows in one window would read each other, so each is computed by itself on a GPU as well"
    return Finding("packing", "adapted", what)


# --- training ---


def tell_targets(model: Any, config: AdapterConfig) -> Finding:
    targets = linear_modules(model)
    if inside := language_model(model):
        what = f"`all-linear` is in {inside}; projector: {config.projector}, tower: {config.tower}"
        return Finding("targets", "ok", what)
    if targets == ALL_LINEAR:
        return Finding("targets", "ok", "`all-linear` is every linear layer but the output")
    return Finding(
        "targets", "adapted", f"`all-linear` is {', '.join(targets)}: no router and no expert is trained"
    )


def prove_training(loaded: Loaded, config: AdapterConfig) -> Finding:
    """Train two steps on two rows: the loss must be finite, and each adapter weight must get a gradient."""
    base, chat = loaded.model, loaded.chat
    if config.method in PREFIXED and is_hybrid(base):
        what = f"`adapter.method: {config.method}` needs keys and values in all layers, and some have none"
        return Finding("training", "refused", what, "set `adapter.method: lora`")
    whole = config.method == "full"
    if whole:
        freeze_outside(base, config)
    else:
        base = prepare_quantised(base) if config.method == "qlora" else base
        base = add_adapter(base, config, seed=0)
    rows = [
        chat.encode(make_example([*asked, Message("assistant", said)], {}))
        for asked, said in zip((ASKED, ASKED_LONGER), ANSWERED, strict=True)
    ]
    chat = chat.showing(_media())
    rows += [chat.encode(_shown(SHOWN[kind][0])) for kind in chat.reads]
    reached, losses = _two_steps(base, rows, chat)
    if not all(map(torch.isfinite, losses)):
        return Finding("training", "refused", "the loss is not finite", "take a base with other weights")
    missed = [] if whole else sorted({name for name, yes in reached.items() if not yes})
    if missed:
        what = f"no gradient reaches {len(missed)} of {len(reached)} weights, the first {missed[0]}"
        return Finding("training", "refused", what, "take these layers out of `adapter.target_modules`")
    return Finding("training", "ok", "two steps: the loss is finite, gradients reach all weights")


def _two_steps(model: Any, rows: Sequence[Encoded], chat: ChatFormat) -> tuple[dict[str, bool], list[Tensor]]:
    """Return which weights had a gradient in at least one step, and the losses.

    One step is not enough: in the first one LoRA's A has no gradient, because B begins as zero.
    """
    length, pad_id = max(len(row.ids) for row in rows), chat.pad_id
    device = without_adapter(model).device
    ids = torch.tensor([row.ids + [pad_id] * (length - len(row.ids)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row.ids) + [0] * (length - len(row.ids)) for row in rows], device=device)
    learned = torch.tensor([row.learned + [False] * (length - len(row.ids)) for row in rows], device=device)
    chosen = learned[:, 1:]
    batch = {"input_ids": ids, "attention_mask": mask}
    batch |= chat.inputs([row.media for row in rows], ids)
    head = without_adapter(model).get_output_embeddings()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.SGD(weights.values(), lr=1.0)
    reached, losses = dict.fromkeys(weights, False), []
    model.train()
    with torch.enable_grad():
        for _ in range(2):
            logits = logits_at(model, head, batch, chosen)
            loss = cross_entropy(logits, ids[:, 1:][chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for name, weight in weights.items():
                reached[name] |= weight.grad is not None and bool(weight.grad.any())
            optimizer.step()
            losses.append(loss.detach())
    return reached, losses


def _row(ids: list[int], model: Any) -> Tensor:
    return torch.tensor([ids], device=model.device)  # (1, seq)


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference of two logits (seq, vocab), as a share of the largest logit."""
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-12))
