"""Does the gateway say what was trained? Token ids, greedy answers and the end of an answer, by the trainer's way and by the gateway's.

Logits are compared along the trainer's answers, and what floats explain is a tie (`ratchet/parity/compare.py`). Not covered: HTTP,
sampling, and an upstream server of one's own (`gateway.engine: openai`).
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ratchet.config.evaluation import ParityConfig
from ratchet.data.examples import Example
from ratchet.errors import RatchetError
from ratchet.files import read_json, sha256_file
from ratchet.models.adapters import load_trained
from ratchet.models.chat_template import ChatFormat
from ratchet.models.loading import MANIFEST, load_tokenizer, quiet
from ratchet.models.merging import load_merged, why_unmergeable
from ratchet.parity.compare import (
    Part,
    compare_answers,
    compare_prompts,
    compare_row,
    first_difference,
    make_part,
    mismatch,
)
from ratchet.parity.paths import (
    Answer,
    Top,
    differences,
    engine_answers,
    engine_forward,
    model_answers,
    model_forward,
    replayed_answer,
    strongest,
)
from ratchet.serving.admission import check_adapter_fits
from ratchet.serving.bundle import Bundle, check_harmless
from ratchet.serving.loaded_model import LoadedModel
from ratchet.training.packing import Window


class Trained(NamedTuple):
    """A training row, and the tokens that the loss was computed on."""

    row: Example
    ids: list[int]
    ends: bool  # whether its last token is learned


class Asked(NamedTuple):
    """The test rows by both tokenizers, and how they are answered."""

    rows: Sequence[Example]
    ours: ChatFormat  # the base's, of the training
    theirs: ChatFormat  # the served version's
    max_new_tokens: int
    batch_size: int

    @property
    def ids(self) -> list[str]:
        return [row.id for row in self.rows]

    @property
    def prompts(self) -> list[list[int]]:
        return [self.ours.encode_prompt(row.prompt) for row in self.rows]

    @property
    def greedy(self) -> dict[str, int]:
        return {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}

    @property
    def batches(self) -> dict[str, int]:
        return {"pad_id": self.ours.pad_id, "batch_size": self.batch_size}


class Reference(NamedTuple):
    """The trainer's way."""

    answers: list[Answer]
    tops: list[Top]
    half: bool  # whether it computes in half precision


def check_parity(
    rows: Sequence[Example],
    trained: Sequence[Trained],
    base: Path,
    candidate: Path,
    bundle: Bundle,
    config: ParityConfig,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> dict[str, Any]:
    """`bundle` is the candidate as it would be served. Returns the report; raises RatchetError only where the candidate itself cannot be loaded."""
    manifest = read_json(candidate / MANIFEST)
    parts = [check_files(bundle, manifest)]
    ours = ChatFormat(load_tokenizer(base))
    try:
        check_harmless(bundle.adapter)
        check_adapter_fits(bundle)
        theirs = ChatFormat(load_tokenizer(bundle.adapter))
    except RatchetError as error:
        parts.append(Part("intake", 1, 1, f"the gateway would refuse this version: {error}"))
    else:
        parts += [
            check_training(trained, bundle, ours, theirs),
            *check_answers(
                Asked(rows, ours, theirs, max_new_tokens, batch_size), base, candidate, bundle, config
            ),
        ]
    return {
        "candidate": manifest["adapter_sha256"],
        "rows": len(rows),
        "training_rows": len(trained),
        "parts": [part.as_dict() for part in parts],
    }


def find_trained(examples: Sequence[Example], windows: Sequence[Window], chat: ChatFormat) -> list[Trained]:
    """Each example with its tokenised row; with the likest one where none is what the chat format makes of it today."""
    encoded = [chat.encode(example).ids for example in examples]
    wanted = set(map(tuple, encoded))
    known = {key: row for row in windows if (key := tuple(row.input_ids)) in wanted}
    found: list[Trained] = []
    for example, ids in zip(examples, encoded, strict=True):
        row = known.get(tuple(ids)) or max(windows, key=partial(_alike, ids))
        found.append(Trained(example, row.input_ids, row.labels[-1] == row.input_ids[-1]))
    return found


def _alike(ids: Sequence[int], row: Window) -> int:
    """Tokens that both begin with."""
    place = first_difference(ids, row.input_ids)
    return len(ids) if place is None else place


def check_files(bundle: Bundle, manifest: dict[str, Any]) -> Part:
    """The bytes that were trained are the ones that would be served, tokenizer and template with them."""
    wanted = manifest["files"]
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
    """Training rows through the gateway's own code, the model replaced by the very tokens that it was taught: the same prompt before them, the same text, ended by the stop token."""
    found: list[dict[str, Any]] = []
    for row, ids, ends in trained:
        encoded, prompt = ours.encode(row).ids, len(ours.encode_prompt(row.prompt))
        place = first_difference(encoded, ids)
        if place is not None:
            found.append(
                mismatch(
                    row.id,
                    place,
                    encoded[place : place + 1],
                    ids[place : place + 1],
                    ours,
                    ours,
                    "it was tokenised for the training in another way",
                )
            )
        elif not ends or ids[-1] != ours.stop_id:
            found.append(
                mismatch(
                    row.id,
                    len(ids) - 1,
                    [ours.stop_id],
                    ids[-1:],
                    ours,
                    ours,
                    "the training did not learn the stop token at its end",
                )
            )
        else:
            wanted = Answer(ids[:prompt], ids[prompt:], ours.decode_answer(ids[prompt:]), "stop")
            found += compare_row(
                row.id, wanted, replayed_answer(bundle, theirs, row.prompt, prompt, wanted.ids), ours, theirs
            )
    reason = f"{len(trained)} training rows have the gateway's prompts, and what they teach to say ends there by the stop token, its text unchanged"
    return make_part("training", len(trained), found, reason)


def check_answers(
    asked: Asked, base: Path, candidate: Path, bundle: Bundle, config: ParityConfig
) -> list[Part]:
    """One model in memory at a time."""
    with quiet():
        reference = _trainer_path(asked, base, candidate)
        tolerance = config.half_tolerance if reference.half else config.tolerance
        _make_room()
        told, apart, context = _engine_path(asked, reference, bundle)
        parts = [
            compare_prompts(asked.ids, reference.answers, told, asked.ours, asked.theirs),
            compare_answers(
                "gateway",
                asked.ids,
                *reference[:2],
                told,
                apart,
                tolerance,
                asked.ours,
                asked.theirs,
                context=context,
            ),
        ]
        _make_room()
        if config.merged and not why_unmergeable(candidate):
            merged = load_merged(base, candidate)
            parts.append(compare_model("merged", merged, asked, reference, tolerance))
    return parts


def compare_model(name: str, model: Any, asked: Asked, reference: Reference, tolerance: float) -> Part:
    """Another model, asked as the trainer's was."""
    told = model_answers(model, asked.ours, asked.prompts, **asked.greedy)
    apart = differences(
        model_forward(model), model.device, reference.answers, reference.tops, **asked.batches
    )
    return compare_answers(name, asked.ids, *reference[:2], told, apart, tolerance, asked.ours, asked.ours)


def _trainer_path(asked: Asked, base: Path, candidate: Path) -> Reference:
    return make_reference(load_trained(base, candidate).eval(), asked)


def make_reference(model: Any, asked: Asked) -> Reference:
    answers = model_answers(model, asked.ours, asked.prompts, **asked.greedy)
    return Reference(
        answers,
        strongest(model_forward(model), model.device, answers, **asked.batches),
        model.dtype != torch.float32,
    )


def _engine_path(
    asked: Asked, reference: Reference, bundle: Bundle
) -> tuple[list[Answer], list[Tensor], int]:
    loaded = LoadedModel(bundle)
    told = engine_answers(loaded, bundle, asked.theirs, [row.prompt for row in asked.rows], **asked.greedy)
    apart = differences(
        engine_forward(loaded, bundle.version),
        loaded.device,
        reference.answers,
        reference.tops,
        **asked.batches,
    )
    return told, apart, bundle.max_length - loaded.num_virtual(bundle.version)


def _make_room() -> None:
    """The model before is gone when the next one comes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
