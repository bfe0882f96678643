"""Check that the gateway serves what was trained: the same token ids, greedy answers and ends of answers.

Logits are compared along the trainer's answers. A different token that rounding explains is a tie
(`ratchet/parity/compare.py`). Not covered: HTTP, sampling, and a separate upstream server (`gateway.engine:
openai`).
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from ratchet.config.params import Config
from ratchet.data.examples import Example, Tool
from ratchet.engines.loaded_model import LoadedModel
from ratchet.errors import RatchetError
from ratchet.files import sha256_file
from ratchet.models.adapters import load_trained
from ratchet.models.chat_template import ChatFormat
from ratchet.models.loading import load_chat, quiet
from ratchet.models.manifests import MANIFEST, TrainedManifest, read_trained_manifest
from ratchet.models.merging import load_merged, why_unmergeable
from ratchet.parity.compare import (
    compare_answers,
    compare_prompts,
    compare_row,
    first_difference,
    make_mismatch,
    make_part,
)
from ratchet.parity.paths import (
    Answer,
    Top,
    differences,
    engine_answers,
    engine_forward,
    for_one,
    llama_cpp_answers,
    model_answers,
    model_forward,
    replayed_answer,
    strongest,
    whole_text,
)
from ratchet.parity.report import Mismatch, Part, Report
from ratchet.serving.admission import check_adapter_fits
from ratchet.serving.bundle import Bundle, check_harmless
from ratchet.training.packing import Window


class Trained(NamedTuple):
    """A training row and its token ids."""

    row: Example
    ids: list[int]
    ends: bool  # whether its last token is learned


class Asked(NamedTuple):
    """The test rows, both tokenizers, and the settings by which the rows are answered."""

    rows: Sequence[Example]
    ours: ChatFormat  # the base's, with which the training tokenized
    theirs: ChatFormat  # the served version's
    max_new_tokens: int
    batch_size: int

    @property
    def ids(self) -> list[str]:
        return [row.id for row in self.rows]

    @property
    def prompts(self) -> list[list[int]]:
        return [self.ours.encode_prompt(row.prompt, row.tools) for row in self.rows]

    @property
    def tools(self) -> list[tuple[Tool, ...]]:
        return [row.tools for row in self.rows]

    @property
    def media(self) -> list[tuple[str, ...]]:
        return [row.media for row in self.rows]

    @property
    def greedy(self) -> dict[str, int]:
        return {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}

    @property
    def batches(self) -> dict[str, Any]:
        return {"chat": self.ours, "batch_size": self.batch_size}


class Reference(NamedTuple):
    """The answers and logits of the trained model as the trainer loads it."""

    answers: list[Answer]
    tops: list[Top]
    half: bool  # whether it computes in half precision


def check_parity(
    rows: Sequence[Example],
    trained: Sequence[Trained],
    base: Path,
    candidate: Path,
    bundle: Bundle,
    config: Config,
    scratch: Path,
    media: Mapping[str, bytes] = MappingProxyType({}),
) -> Report:
    """Compare the candidate with `bundle`, which is the candidate as it would be served.

    `media` has the rows' pictures. llama.cpp's file, if `gateway.engine` wants one, is written to `scratch`.

    Raises RatchetError only where the candidate itself cannot be loaded.
    """
    manifest = read_trained_manifest(candidate)
    parts = [check_files(bundle, manifest)]
    ours = load_chat(base, media)
    try:
        check_harmless(bundle.adapter)
        check_adapter_fits(bundle)
        theirs = load_chat(bundle.adapter, media)
    except RatchetError as error:
        parts.append(Part("intake", 1, 1, f"the gateway would refuse this version: {error}"))
    else:
        asked = Asked(rows, ours, theirs, config.evaluate.max_new_tokens, config.evaluate.batch_size)
        parts.append(check_training(trained, bundle, ours, theirs))
        parts += check_answers(asked, base, candidate, bundle, config, scratch)
    return Report(manifest.adapter_sha256, len(rows), len(trained), parts)


def find_trained(examples: Sequence[Example], windows: Sequence[Window], chat: ChatFormat) -> list[Trained]:
    """Return each example with its tokenized row.

    Where no row equals what the chat format makes of the example today, the most similar row is taken.
    """
    encoded = [chat.encode(example).ids for example in examples]
    wanted = set(map(tuple, encoded))
    known = {key: row for row in windows if (key := tuple(row.input_ids)) in wanted}
    found: list[Trained] = []
    for example, ids in zip(examples, encoded, strict=True):
        row = known.get(tuple(ids)) or max(windows, key=partial(_alike, ids))
        found.append(Trained(example, row.input_ids, row.labels[-1] == row.input_ids[-1]))
    return found


def _alike(ids: Sequence[int], row: Window) -> int:
    """Count the leading tokens that both share."""
    place = first_difference(ids, row.input_ids)
    return len(ids) if place is None else place


def check_files(bundle: Bundle, manifest: TrainedManifest) -> Part:
    """Check that the served files, tokenizer and template included, are byte for byte the trained ones."""
    wanted = manifest.files
    seen = {
        path.name: sha256_file(path)
        for path in sorted(bundle.adapter.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    odd = sorted(name for name in wanted.keys() | seen.keys() if wanted.get(name) != seen.get(name))
    reason = (
        f"{', '.join(odd)} of the served version: not what the training wrote"
        if odd
        else f"{len(wanted)} files are byte for byte what the training wrote"
    )
    return Part("files", len(wanted), len(odd), reason)


def check_training(trained: Sequence[Trained], bundle: Bundle, ours: ChatFormat, theirs: ChatFormat) -> Part:
    """Send training rows through the gateway's own code, with the trained tokens in place of a model's.

    The prompt and the text of the answer have to be the same, and the stop token has to end the answer.
    """
    faults = [_check_row(row, bundle, ours, theirs) for row in trained]
    reason = (
        f"{len(trained)} training rows have the gateway's prompts, "
        "and what they teach to say ends there by the stop token, its text unchanged"
    )
    return make_part("training", len(trained), [fault for fault in faults if fault], reason)


def _check_row(trained: Trained, bundle: Bundle, ours: ChatFormat, theirs: ChatFormat) -> Mismatch | None:
    row, ids, ends = trained
    encoded, prompt = ours.encode(row).ids, len(ours.encode_prompt(row.prompt, row.tools))
    place = first_difference(encoded, ids)
    if place is not None:
        wanted, seen = encoded[place : place + 1], ids[place : place + 1]
        what = "it was tokenised for the training in another way"
        return make_mismatch(row.id, place, wanted, seen, ours, ours, what)
    if not ends or ids[-1] != ours.stop_id:
        what = "the training did not learn the stop token at its end"
        return make_mismatch(row.id, len(ids) - 1, [ours.stop_id], ids[-1:], ours, ours, what)
    text = whole_text(ours.read_answer(ours.decode_answer(ids[prompt:]), row.tools))
    answer = Answer(ids[:prompt], ids[prompt:], text, "stop")
    told = replayed_answer(bundle, theirs, row, prompt, answer.ids)
    return compare_row(row.id, answer, told, ours, theirs)


def check_answers(
    asked: Asked, base: Path, candidate: Path, bundle: Bundle, config: Config, scratch: Path
) -> list[Part]:
    """Compare the trainer's answers with the engine's and the merged model's, one model at a time."""
    formats = asked.ours, asked.theirs
    with quiet():
        reference = make_reference(load_trained(base, candidate).eval(), asked)
        tolerance = config.parity.half_tolerance if reference.half else config.parity.tolerance
        _make_room()
        told, apart, context = _engine_path(asked, reference, bundle)
        gateway = compare_answers(
            "gateway", asked.ids, *reference[:2], told, apart, tolerance, *formats, context=context
        )
        parts = [compare_prompts(asked.ids, reference.answers, told, *formats), gateway]
        _make_room()
        if config.gateway.engine == "llama_cpp":
            parts.append(_check_llama_cpp(asked, reference, bundle, config, scratch))
        if config.parity.merged and not why_unmergeable(candidate):
            merged = load_merged(base, candidate)
            parts.append(compare_model("merged", merged, asked, reference, tolerance))
    return parts


def compare_model(name: str, model: Any, asked: Asked, reference: Reference, tolerance: float) -> Part:
    """Ask another model in the way in which the trainer's was asked, and compare the two."""
    told = model_answers(
        model, asked.ours, asked.prompts, tools=asked.tools, media=asked.media, **asked.greedy
    )
    apart = differences(
        model_forward(model), model.device, reference.answers, reference.tops, **asked.batches
    )
    return compare_answers(name, asked.ids, *reference[:2], told, apart, tolerance, asked.ours, asked.ours)


def make_reference(model: Any, asked: Asked) -> Reference:
    """Ask a model as the evaluation does, and return its answers and strongest logits."""
    answers = model_answers(
        model, asked.ours, asked.prompts, tools=asked.tools, media=asked.media, **asked.greedy
    )
    return Reference(
        answers,
        strongest(model_forward(model), model.device, answers, **asked.batches),
        model.dtype != torch.float32,
    )


def _engine_path(
    asked: Asked, reference: Reference, bundle: Bundle
) -> tuple[list[Answer], list[Tensor], int]:
    loaded = LoadedModel(bundle)
    told = engine_answers(loaded, bundle, asked.theirs, asked.rows, **asked.greedy)
    apart = differences(
        engine_forward(loaded, bundle.version),
        loaded.device,
        reference.answers,
        reference.tops,
        **asked.batches,
    )
    return told, apart, bundle.max_length - loaded.num_virtual(bundle.version)


def _check_llama_cpp(
    asked: Asked, reference: Reference, bundle: Bundle, config: Config, scratch: Path
) -> Part:
    """Compare tokens and texts; llama.cpp does not tell its logits, and its weights are float16."""
    bundle, config = for_one(bundle, asked.rows, config)
    told = llama_cpp_answers(bundle, asked.rows, config, scratch, max_new_tokens=asked.max_new_tokens)
    formats, tolerance = (asked.ours, asked.theirs), config.parity.half_tolerance
    part = compare_answers("llama.cpp", asked.ids, *reference[:2], told, [], tolerance, *formats)
    if part.mismatches:
        return part
    reason = f"llama.cpp gives the same greedy answers to {part.rows} test rows ({part.ties} ties)"
    return msgspec.structs.replace(part, reason=reason, largest=None)


def _make_room() -> None:
    """Free the memory of the previous model before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
