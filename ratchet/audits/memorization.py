"""How much a model gives away of planted canaries: the rank of each one's likelihood among other codes of the
same form (arXiv 1802.08232, section 4).

exposure = log2(codes) - log2(rank): 7 bits where the true code is the likeliest of 128, 1.4 bits on average
where the model knows nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ratchet.data.canaries import Canary, alternatives
from ratchet.errors import BaseModelError
from ratchet.evaluation.audit_tables import CODES
from ratchet.evaluation.statistics import bootstrap_mean

if TYPE_CHECKING:
    import pandas as pd

    from ratchet.models.chat_template import ChatFormat


def measure_exposure(
    model: Any, chat: ChatFormat, canaries: Sequence[Canary], *, batch_size: int
) -> list[dict[str, Any]]:
    """Return a line per canary: name, rank, exposure in bits.

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
    ranks = 1 + (losses[:, 1:] < losses[:, :1]).sum(axis=1)
    return [
        {"name": canary.name, "rank": int(rank), "exposure": math.log2(CODES / rank)}
        for canary, rank in zip(canaries, ranks, strict=True)
    ]


def describe_exposure(table: pd.DataFrame) -> dict[str, Any]:
    """model → planted, reference → {rows, mean, low, high} in bits, with 95 % intervals."""
    found: dict[str, Any] = {}
    for (model, planted), part in table.groupby(["model", "planted"]):
        interval = bootstrap_mean(
            part.exposure.to_numpy(dtype=np.float64), alpha=0.025, resamples=1000, seed=0
        )
        found.setdefault(str(model), {})["planted" if planted else "reference"] = {
            "rows": len(part),
            **interval._asdict(),
        }
    return found
