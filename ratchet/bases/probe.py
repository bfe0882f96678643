"""Check before any expensive work that a base can do what training, evaluation and gateway need.

The result of each check is a finding: ok, adapted or refused. Adaptations are written into the base's files,
so that they apply whenever it is loaded. The checks take one loading of the model and some forward passes
over a few tokens.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from ratchet.bases.files import first_line
from ratchet.bases.model_probe import (
    ASKED,
    HALF_TOLERANCE,
    TOLERANCE,
    Loaded,
    packs,
    prove_cache,
    prove_media,
    prove_training,
    tell_packing,
    tell_targets,
)
from ratchet.bases.template_probe import adapt_template
from ratchet.config.params import Config
from ratchet.errors import BaseModelError, RatchetError
from ratchet.models.chat_template import ChatFormat
from ratchet.models.loading import (
    Checkpoint,
    load_checkpoint,
    load_tokenizer,
    quiet,
    without_adapter,
)
from ratchet.models.manifests import (
    Finding,
    Proof,
    read_base_manifest,
    write_generation,
)
from ratchet.models.processors import MediaProcessor, load_processor
from ratchet.pipeline.stage import say

# Generation settings that only name tokens; all others would change answers.
TOKEN_KEYS = {"eos_token_id", "bos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
NEUTRAL = (None, False, 0, 1)  # values of a penalty, a length or a switch that have no effect


class Facts(TypedDict, total=False):
    """Facts about the base that every later loading needs; keys of its manifest."""

    attention: str
    packs: bool


def prove_base(folder: Path, config: Config) -> tuple[Proof, Facts]:
    """Check the base in `folder`, adapt its files, print the findings, and return them with the new facts.

    The base's files and a manifest have to exist. Raises BaseModelError that lists everything refused.
    """
    manifest, findings = read_base_manifest(folder), list(_find(folder, config))
    proof = Proof(str(manifest.model), [finding for finding, _ in findings])
    for line in proof.page():
        say(line)
    if refused := proof.refused:
        raise BaseModelError(
            f"{manifest.model} cannot be trained and served here: "
            + "; ".join(f"{finding.name}: {finding.what}" for finding in refused),
            remedy=refused[0].remedy,
        )
    facts: Facts = {}
    for _, found in findings:
        facts |= found
    return proof, facts


def _find(folder: Path, config: Config) -> Iterator[tuple[Finding, Facts]]:
    """Yield each finding with the facts that it adds to the manifest."""
    tokenizer = load_tokenizer(folder)
    before, processor = tokenizer.chat_template, load_processor(folder)
    found = adapt_template(
        tokenizer, dt.date.fromisoformat(config.base.date), config.base.reasoning, processor
    )
    for finding in found:
        yield finding, {}
    if tokenizer.chat_template != before:
        tokenizer.save_pretrained(folder)
    try:
        with quiet():
            adapter = config.adapter
            model, checkpoint = load_checkpoint(
                folder, method=adapter.method, quantisation=adapter.quantisation
            )
    except (RatchetError, RuntimeError, ValueError, OSError) as error:
        remedy = getattr(error, "remedy", "") or "take another model, or another revision of it"
        yield Finding("weights", "refused", first_line(error), remedy), {}
        return
    weights = _weights(checkpoint)
    yield weights, {}
    attention = str(model.config._attn_implementation)
    yield _attention(attention), {"attention": attention}
    if "refused" in {finding.result for finding in (*found, weights)}:
        return  # without a right template and all weights, further checks would test another model
    ends, chat = _ends(tokenizer, checkpoint, model, folder, processor)
    yield ends, {}
    if not chat:
        return
    model.eval()  # type: ignore[no-untyped-call]
    loaded = Loaded(model, chat, TOLERANCE.get(model.dtype, HALF_TOLERANCE))
    with quiet():
        for kind in chat.reads:
            yield _try(kind, loaded, partial(prove_media, loaded, kind)), {}
        yield _try("cache", loaded, lambda: prove_cache(loaded)), {}
        packed = packs(loaded)
        yield tell_packing(packed), {"packs": packed}
        yield tell_targets(model, adapter), {}
        yield _try("training", loaded, lambda: prove_training(loaded, adapter)), {}


def _try(name: str, loaded: Loaded, prove: Callable[[], Finding]) -> Finding:
    """Run a check; turn any error into a refusal, since a model of an unknown kind may raise anything."""
    try:
        return prove()
    except RatchetError as error:
        return Finding(name, "refused", first_line(error), error.remedy)
    except Exception as error:  # noqa: BLE001  (any kind of model: the error is reported, and nothing is trained)
        kind = type(without_adapter(loaded.model)).__name__
        what = f"{kind} raised {type(error).__name__}: {first_line(error)}"
        return Finding(name, "refused", what, "take a base of another architecture")


# --- checkpoint and tokens ---


def _weights(checkpoint: Checkpoint) -> Finding:
    """Refuse weights that the model has no place for; the loading refuses missing ones."""
    if names := checkpoint.unexpected:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        what = f"the model has no place for {len(names)} weights: {shown}"
        return Finding("weights", "refused", what, "take a whole checkpoint of this architecture")
    return Finding("weights", "ok", "all are in the checkpoint")


def _attention(name: str) -> Finding:
    if name == "sdpa":
        return Finding("attention", "ok", name)
    return Finding("attention", "adapted", f"{name}: this model has no faster one (sdpa)")


def _ends(
    tokenizer: Any, checkpoint: Checkpoint, model: Any, folder: Path, processor: MediaProcessor | None
) -> tuple[Finding, ChatFormat | None]:
    """Collect all tokens that end an answer, and write generation_config.json.

    Return the finding, and the chat format unless the tokens do not fit the model.
    """
    named = checkpoint.generation.get("eos_token_id")
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    # A config without an end token has its class's default id, which may be a letter in this vocabulary.
    control = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    chat, rows = ChatFormat(tokenizer, ids & control, processor), model.get_input_embeddings().weight.shape[0]
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
        tokenizer.save_pretrained(folder)
        chat = ChatFormat(tokenizer, ids & control, processor)
        said, adapted = [*said, "the pad token has no embedding: the end pads"], True
    asks = checkpoint.generation.items()
    if odd := sorted(key for key, value in asks if key not in TOKEN_KEYS and value not in NEUTRAL):
        said, adapted = [*said, f"answers are greedy, without the checkpoint's {', '.join(odd)}"], True
    write_generation(folder, chat.stop_ids, chat.pad_id)
    return Finding("ends", "adapted" if adapted else "ok", "; ".join(said)), chat
