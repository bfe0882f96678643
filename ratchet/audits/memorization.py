"""Exposure of planted canaries by a model: the rank of the true code's likelihood among other codes of the
same form (Carlini et al. 2019, arXiv 1802.08232, section 4).

exposure = log2(codes) - log2(rank): 7 bits where the true code is the likeliest of 128, 1.4 bits on average
where the model knows nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ratchet.errors import BaseModelError
from ratchet.evaluation.audit_tables import CODES
from ratchet.evaluation.canaries import Canary, alternatives
from ratchet.evaluation.report import Exposure
from ratchet.evaluation.statistics import Estimate, bootstrap_mean

if TYPE_CHECKING:
    import pandas as pd

    from ratchet.models.chat_template import ChatFormat


class Exposed(NamedTuple):
    """A canary's rank among its alternatives, and its exposure in bits."""

    name: str
    rank: int
    exposure: float


def measure_exposure(
    model: Any, chat: ChatFormat, canaries: Sequence[Canary], *, batch_size: int
) -> list[Exposed]:
    """Return one line per canary: name, rank, exposure in bits.

    Raises BaseModelError for a likelihood that is not finite.
    """
    from ratchet.models.generation import answer_likelihoods

    rows = [
        chat.encode(canary.row(code))
        for canary in canaries
        for code in (canary.secret, *alternatives(canary))
    ]
    losses = np.array(
        [found.nll for found in answer_likelihoods(model, rows, pad_id=chat.pad_id, batch_size=batch_size)]
    ).reshape(len(canaries), CODES)
    if not np.isfinite(losses).all():
        raise BaseModelError(
            "the likelihood of canaries is not finite", remedy="the weights are broken: train again"
        )
    # Losses are (canaries, codes) in nats; the first column is the true code.
    ranks = 1 + (losses[:, 1:] < losses[:, :1]).sum(axis=1)
    return [
        Exposed(canary.name, int(rank), math.log2(CODES / rank))
        for canary, rank in zip(canaries, ranks, strict=True)
    ]


def measure_losses(
    model: Any, chat: ChatFormat, canaries: Sequence[Canary], *, batch_size: int
) -> list[float]:
    """Return the loss of each canary's code under the model, (canaries,), in nats a token."""
    from ratchet.models.generation import answer_likelihoods

    rows = [chat.encode(canary.row()) for canary in canaries]
    return [one.nll for one in answer_likelihoods(model, rows, pad_id=chat.pad_id, batch_size=batch_size)]


def describe_exposure(table: pd.DataFrame) -> dict[str, Exposure]:
    """Return model → mean exposure of planted and of unplanted canaries, with 95 % intervals."""

    def mean(part: pd.DataFrame) -> Estimate:
        values = part.exposure.to_numpy(dtype=np.float64)
        return bootstrap_mean(values, alpha=0.025, resamples=1000, seed=0).on(len(part))

    return {
        str(model): Exposure(mean(part[part.planted]), mean(part[~part.planted]))
        for model, part in table.groupby("model")
    }
