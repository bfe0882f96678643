"""Measure the loss of validation rows as a training measures it, without a training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from ratchet.config.training import TrainConfig
from ratchet.errors import DataError
from ratchet.media.store import FOLDER as MEDIA
from ratchet.media.store import MediaStore
from ratchet.models.cache import logits_at, place_rows
from ratchet.models.loading import load_chat, quiet
from ratchet.models.manifests import read_base_manifest
from ratchet.training.collation import make_batches
from ratchet.training.kernels import fast_attention
from ratchet.training.loss import AnswerLoss, PreferenceLoss
from ratchet.training.packing import read_windows


class Validation:
    """The validation rows of `tokens`, in the batches of a training.

    `model` is the base, from whose answers preferences count. Raises DataError: there are no such rows.
    """

    def __init__(self, model: Any, tokens: Path, base: Path, config: TrainConfig) -> None:
        windows = read_windows(tokens / "validation.arrow")
        if not windows:
            raise DataError(
                "there are no validation rows to measure a loss on",
                remedy="raise `prepare.validation_share`, or ingest more rows",
            )
        chat = load_chat(base, MediaStore.read(tokens / MEDIA))
        batches = make_batches(
            windows,
            windows,
            config.batch_windows,
            accumulate=1,
            pad_id=chat.pad_id,
            apart=None if read_base_manifest(base).packs else True,
            inputs=chat.inputs,
            place=partial(place_rows, model),
        )
        self._loss: AnswerLoss | PreferenceLoss = AnswerLoss()
        if config.objective != "sft":
            self._loss = PreferenceLoss(
                beta=config.preference_beta,
                chosen_weight=config.chosen_weight,
                undesirable_weight=config.undesirable_weight,
            )
        self._batches = self._loss.prepare(model, batches._replace(train=[]))

    def measure(self, model: Any) -> float:
        """Return the mean loss: in nats a learned token, or a unit of preferences."""
        total, count = 0.0, 0
        held_out, size = self._batches.validation, self._batches.items
        device = next(model.parameters()).device
        model.eval()
        with torch.no_grad(), quiet(), fast_attention(model, self._batches.longest):
            for start in range(0, len(held_out), size):
                columns = self._batches.collate(held_out[start : start + size])
                batch = {name: column.to(device) for name, column in columns.items()}
                predict = partial(logits_at, model, model.get_output_embeddings(), batch)
                losses = self._loss.validate(batch, predict)
                total, count = total + float(losses.sum()), count + len(losses)
        return total / count
