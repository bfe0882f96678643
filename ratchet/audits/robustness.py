"""Lay out the answers to attacks as a table, and describe which of them each model withstood."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ratchet.evaluation.audit_tables import withstood
from ratchet.evaluation.report import Models
from ratchet.evaluation.statistics import wilson

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from ratchet.audits.attacks import Attack


def attack_table(answered: Sequence[pd.DataFrame], attacks: Sequence[Attack]) -> pd.DataFrame:
    """Return one line per variant and model. A variant that no model is asked has equal lines for all."""
    import pandas as pd

    asked, unasked = (
        [attack for attack in attacks if attack.asked],
        [attack for attack in attacks if not attack.asked],
    )
    parts: list[Any] = []
    for frame in answered:
        model = str(frame.model.iloc[0])
        silent = {
            "id": [attack.row.id for attack in unasked],
            "model": model,
            "answer": "",
            "reference": [attack.row.answer for attack in unasked],
        }
        for rows, group in ((frame, asked), (pd.DataFrame(silent), unasked)):
            parts.append(
                rows.assign(
                    **{
                        field: [getattr(attack, field) for attack in group]
                        for field in ("kind", "of", "planted", "handled")
                    }
                )
            )
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def describe_attacks(attacked: pd.DataFrame, scores: pd.DataFrame, metric: str) -> dict[str, Models]:
    """Return kind → model → the share withstood, with Wilson's 95 % interval."""
    found: dict[str, Models] = {}
    for (kind, model), part in withstood(attacked, scores, metric).groupby(["kind", "model"], sort=False):
        share = wilson(part.withstood.to_numpy(dtype=np.float64), alpha=0.025)
        found.setdefault(str(kind), {})[str(model)] = share.on(len(part))
    return found
