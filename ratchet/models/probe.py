"""Prove a base before anything is spent on it: what training, evaluation and gateway will ask of it.

Each proof is a finding: ok, adapted or refused. What was adapted is written into the base's files, so that
every later loading does the same. It takes a load of the model and some forward passes over a few tokens.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig
from ratchet.data.examples import Message, make_example
from ratchet.errors import BaseModelError, RatchetError
from ratchet.files import read_json, sha256_file, write_json
from ratchet.models.adapters import ALL_LINEAR, PREFIXED, add_adapter, linear_modules, prepare_quantised
from ratchet.models.cache import forward, is_hybrid, join, new_cache, select
from ratchet.models.chat_template import ChatFormat, Encoded
from ratchet.models.generation import greedy_ids
from ratchet.models.loading import (
    Checkpoint,
    load_checkpoint,
    load_tokenizer,
    quiet,
    read_config,
    without_adapter,
)
from ratchet.models.logits import logits_at
from ratchet.models.manifests import (
    MANIFEST,
    PROOF,
    Finding,
    Proof,
    read_base_manifest,
    write_generation,
)
from ratchet.models.template_probe import adapt_template
from ratchet.pipeline.stage import say

# Differences of logits as a share of the largest one. In float32 two orders of the same sums differ by 1e-5
# at most, and a convolution of three tokens that reads its neighbour by 3e-4 (untrained, width 32).
TOLERANCE = {torch.float32: 1e-4}
HALF_TOLERANCE = 5e-2
ANSWER = 6  # tokens that a probe lets the model say
# What generation settings may say of tokens; anything else of theirs would change answers.
TOKEN_KEYS = {"eos_token_id", "bos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
NEUTRAL = (None, False, 0, 1)  # what changes nothing, for a penalty, a length or a switch
ASKED = (Message("user", "What is it?"),)
ASKED_LONGER = (Message("user", "What is it, and what is it good for?"),)
ANSWERED = ("It is a test.", "Nothing at all.")


class _Loaded(NamedTuple):
    """Hold what the proofs look at."""

    model: Any
    chat: ChatFormat
    tolerance: float


def prove_base(folder: Path, config: Config) -> Proof:
    """Prove the base in `folder`, adapt its files, and print one page.

    Needs its manifest and its files to be there. Raises BaseModelError with all that was refused.
    """
    manifest = read_base_manifest(folder)
    findings, changed = list(_find(folder, config)), read_json(folder / MANIFEST)
    proof = Proof(str(manifest.model), [finding for finding, _ in findings])
    for line in proof.page():
        say(line)
    if refused := proof.refused:
        raise BaseModelError(
            f"{manifest.model} cannot be trained and served here: "
            + "; ".join(f"{finding.name}: {finding.what}" for finding in refused),
            remedy=refused[0].remedy,
        )
    write_json(folder / PROOF, msgspec.to_builtins(proof))
    for _, facts in findings:
        changed |= facts
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    changed["files"] = {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}
    write_json(folder / MANIFEST, changed)
    return proof


def _find(folder: Path, config: Config) -> Iterator[tuple[Finding, dict[str, Any]]]:
    """Yield each finding with what it adds to the manifest."""
    if quantised := _quantised(folder):
        yield quantised, {}
        return
    tokenizer = load_tokenizer(folder)
    before = tokenizer.chat_template
    found = adapt_template(tokenizer, dt.date.fromisoformat(config.base.date))
    yield from ((finding, {}) for finding in found)
    if tokenizer.chat_template != before:
        _save_tokenizer(tokenizer, folder)
    try:
        with quiet():
            adapter = config.adapter
            model, checkpoint = load_checkpoint(
                folder, method=adapter.method, quantisation=adapter.quantisation
            )
    except (RatchetError, RuntimeError, ValueError, OSError) as error:
        remedy = getattr(error, "remedy", "") or "take another model, or another revision of it"
        yield Finding("weights", "refused", _first_line(error), remedy), {}
        return
    weights = _weights(checkpoint)
    yield weights, {}
    attention = str(model.config._attn_implementation)
    yield _attention(attention), {"attention": attention}
    if "refused" in {finding.result for finding in (*found, weights)}:
        return  # the rest would tell nothing about the model that is meant
    ends, chat = _ends(tokenizer, checkpoint, model, folder)
    yield ends, {}
    if not chat:
        return
    model.eval()  # type: ignore[no-untyped-call]
    loaded = _Loaded(model, chat, TOLERANCE.get(model.dtype, HALF_TOLERANCE))
    with quiet():
        yield _try("cache", loaded, lambda: _cache(loaded)), {}
        packs = _packs(loaded)
        yield _packing(packs), {"packs": packs}
        yield _targets(model), {}
        yield _try("training", loaded, lambda: _training(loaded, adapter)), {}


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the adapted template in place of the former ones, of which there may have been several."""
    further = folder / "additional_chat_templates"
    for path in further.glob("*"):
        path.unlink()
    if further.exists():
        further.rmdir()
    tokenizer.save_pretrained(folder)


def _try(name: str, loaded: _Loaded, prove: Callable[[], Finding]) -> Finding:
    """Make a refusal of whatever a model of an unknown kind raises."""
    try:
        return prove()
    except RatchetError as error:
        return Finding(name, "refused", _first_line(error), error.remedy)
    except Exception as error:  # noqa: BLE001  (models of all kinds: it is told, and nothing is trained)
        kind = type(without_adapter(loaded.model)).__name__
        what = f"{kind} raised {type(error).__name__}: {_first_line(error)}"
        return Finding(name, "refused", what, "take a base of another architecture")


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]


# --- checkpoint and tokens ---


def _quantised(folder: Path) -> Finding | None:
    """Refuse weights that are quantised already: what is trained on them can be merged by nothing."""
    kept = getattr(read_config(folder), "quantization_config", None)
    if kept is None:
        return None
    how = kept.get("quant_method") if isinstance(kept, dict) else getattr(kept, "quant_method", None)
    return Finding(
        "weights",
        "refused",
        f"the checkpoint is quantised already ({getattr(how, 'value', how)})",
        "take the model that it was made from, with `adapter.method: qlora` to quantise it here",
    )


def _weights(checkpoint: Checkpoint) -> Finding:
    """Refuse missing weights, which transformers would fill at random, and those without a place."""
    remedy = "take a whole checkpoint of this architecture"
    for what, names in (
        ("the checkpoint lacks", checkpoint.missing),
        ("the model has no place for", checkpoint.unexpected),
    ):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            return Finding("weights", "refused", f"{what} {len(names)} weights: {shown}", remedy)
    return Finding("weights", "ok", "all are in the checkpoint")


def _attention(name: str) -> Finding:
    if name == "sdpa":
        return Finding("attention", "ok", name)
    return Finding("attention", "adapted", f"{name}: this model has no faster one (sdpa)")


def _ends(
    tokenizer: Any, checkpoint: Checkpoint, model: Any, folder: Path
) -> tuple[Finding, ChatFormat | None]:
    """Gather all tokens that end an answer, and write the one setting of generation."""
    named = checkpoint.generation.get("eos_token_id")
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    # A config that names no end has the default of its class, which is any letter in another's vocabulary.
    control = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    chat, rows = ChatFormat(tokenizer, ids & control), model.get_input_embeddings().weight.shape[0]
    ends = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(chat.stop_ids))))
    if (highest := max(*chat.stop_ids, *chat.encode_prompt(ASKED))) >= rows:
        what = f"the template writes the token {highest}, the model has embeddings for {rows}"
        return Finding("ends", "refused", what, "take the tokenizer that belongs to these weights"), None
    said, adapted = [ends], False
    if ids - control:
        plain = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(ids - control))))
        said, adapted = [*said, f"plain text ends nothing: {plain}"], True
    if chat.pad_id >= rows:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chat.stop_id)
        _save_tokenizer(tokenizer, folder)
        chat = ChatFormat(tokenizer, ids & control)
        said, adapted = [*said, "the pad token has no embedding: the end pads"], True
    asks = checkpoint.generation.items()
    if odd := sorted(key for key, value in asks if key not in TOKEN_KEYS and value not in NEUTRAL):
        said, adapted = [*said, f"answers are greedy, without the checkpoint's {', '.join(odd)}"], True
    write_generation(folder, chat.stop_ids, chat.pad_id)
    return Finding("ends", "adapted" if adapted else "ok", "; ".join(said)), chat


# --- cache ---


@torch.inference_mode()
def _cache(loaded: _Loaded) -> Finding:
    """Compare answers of evaluation and gateway, in batches with padding, with the model without a cache."""
    model, chat = loaded.model, loaded.chat
    other = "take a base of another architecture"
    prompts = [chat.encode_prompt(ASKED), chat.encode_prompt(ASKED_LONGER)]
    endless = ChatFormat(chat.tokenizer)
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
    """Return the logits of each token of an answer, (answer, vocab), without a cache."""
    logits: Tensor = model(input_ids=_row(prompt + answer, model), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].float()


def _behind(answer: list[int], logits: Tensor) -> float:
    """Return how far an answer's tokens are behind the strongest ones, as a share of the largest logit.

    It is 0 for a greedy answer, and next to 0 where two tokens tie.
    """
    chosen = logits.gather(1, torch.tensor(answer, device=logits.device)[:, None])[:, 0]
    return float(((logits.amax(-1) - chosen) / logits.abs().amax(-1).clamp(min=1e-12)).max())


def _joined(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> list[Tensor]:
    """Return each row's logits (answer, vocab) as the gateway computes them.

    The second row joins when the first one has two tokens; after it the first one leaves.
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
    """Give each row its next token, keep its logits, and return the longer mask."""
    positions = mask.sum(-1, keepdim=True)
    mask = torch.cat([mask, torch.ones_like(positions)], dim=1)
    ids = torch.tensor(newest, device=mask.device)
    logits = forward(model, ids, mask, positions, cache, whole=False)[:, -1].float()
    for rows, row in zip(found, logits, strict=True):
        rows.append(row)
    return mask


def _left(mask: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(mask, (length - mask.shape[1], 0))


# --- packing ---


@torch.inference_mode()
def _packs(loaded: _Loaded) -> bool:
    """Return whether a row gives the same logits behind a neighbour in its window as alone.

    As a GPU computes windows: positions that begin anew, and no mask.
    """
    model, chat = loaded.model, loaded.chat
    before, row = chat.encode_prompt(ASKED), chat.encode_prompt(ASKED_LONGER)
    positions = torch.tensor([[*range(len(before)), *range(len(row))]], device=model.device)
    try:
        together = model(input_ids=_row(before + row, model), position_ids=positions, use_cache=False).logits
        alone = model(input_ids=_row(row, model), use_cache=False).logits
    except (TypeError, ValueError, RuntimeError):  # it takes no positions
        return False
    return _apart(alone[0].float(), together[0, len(before) :].float()) <= loaded.tolerance


def _packing(packs: bool) -> Finding:
    if packs:
        return Finding("packing", "ok", "rows in one window leave each other alone")
    what = "rows in one window would read each other, so each is computed by itself on a GPU as well"
    return Finding("packing", "adapted", what)


# --- training ---


def _targets(model: Any) -> Finding:
    targets = linear_modules(model)
    if targets == ALL_LINEAR:
        return Finding("targets", "ok", "`all-linear` is every linear layer but the output")
    return Finding(
        "targets", "adapted", f"`all-linear` is {', '.join(targets)}: no router and no expert is trained"
    )


def _training(loaded: _Loaded, config: AdapterConfig) -> Finding:
    """Train two steps on two rows: the loss has to be finite, every weight of an adapter to be reached."""
    base, chat = loaded.model, loaded.chat
    if config.method in PREFIXED and is_hybrid(base):
        what = f"`adapter.method: {config.method}` needs keys and values in all layers, and some have none"
        return Finding("training", "refused", what, "set `adapter.method: lora`")
    whole = config.method == "full"
    if not whole:
        base = prepare_quantised(base) if config.method == "qlora" else base
        base = add_adapter(base, config, seed=0)
    rows = [
        chat.encode(make_example([*asked, Message("assistant", said)], {}))
        for asked, said in zip((ASKED, ASKED_LONGER), ANSWERED, strict=True)
    ]
    reached, losses = _two_steps(base, rows, chat.pad_id)
    if not all(map(torch.isfinite, losses)):
        return Finding("training", "refused", "the loss is not finite", "take a base with other weights")
    missed = [] if whole else sorted({name for name, yes in reached.items() if not yes})
    if missed:
        what = f"no gradient reaches {len(missed)} of {len(reached)} weights, the first {missed[0]}"
        return Finding("training", "refused", what, "take these layers out of `adapter.target_modules`")
    return Finding("training", "ok", "two steps: the loss is finite, gradients reach all weights")


def _two_steps(model: Any, rows: Sequence[Encoded], pad_id: int) -> tuple[dict[str, bool], list[Tensor]]:
    """Return which weights had a gradient in one of the steps, and the losses.

    In the first step the half of LoRA's weights that faces the input has none.
    """
    length = max(len(row.ids) for row in rows)
    device = without_adapter(model).device
    ids = torch.tensor([row.ids + [pad_id] * (length - len(row.ids)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row.ids) + [0] * (length - len(row.ids)) for row in rows], device=device)
    learned = torch.tensor([row.learned + [False] * (length - len(row.ids)) for row in rows], device=device)
    chosen = learned[:, 1:]
    head = without_adapter(model).get_output_embeddings()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.SGD(weights.values(), lr=1.0)
    reached, losses = dict.fromkeys(weights, False), []
    model.train()
    with torch.enable_grad():
        for _ in range(2):
            logits = logits_at(model, head, {"input_ids": ids, "attention_mask": mask}, chosen)
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
    """Return the largest difference of logits (seq, vocab), as a share of the largest one."""
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-12))
