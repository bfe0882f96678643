"""Refuse a claim of privacy that its own canaries refute, or that was made for weights that did not move."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ratchet.config.evaluation import GateConfig
from ratchet.errors import RatchetError
from ratchet.evaluation.paired import AGAIN
from ratchet.gate.checks import unmeasured
from ratchet.privacy.audit import Bound, lower_bound
from ratchet.privacy.ledger import Promise
from ratchet.promotion.verdict import Check


def judge_privacy(promise: Promise, audited: pd.DataFrame | None, wanted: int, config: GateConfig) -> Check:
    """Check what the training promised.

    `audited` holds a line a canary and model: `name`, `planted`, `nll` in nats a token; None: `wanted` is 0.
    Raises RatchetError unless each of the `wanted` canaries was measured once by candidate and base.
    """
    told = f"guardrail privacy: {promise.told}"
    if promise.moved <= 0:
        reason = f"{told}, but the weights that were written are those from which the training started"
        return unmeasured("privacy", "epsilon", promise.units, "fail", reason)
    told += f"; the weights moved by {promise.moved:.3g}"
    if audited is None:
        return unmeasured("privacy", "epsilon", promise.units, "pass", f"{told}; not audited")
    bound = _bound_of(audited, wanted, promise.delta, config)
    refuted = bound.epsilon > promise.epsilon
    told += (
        f"; audit: {bound.right} of {bound.guesses} guesses about {wanted} canaries are right, so ε is "
        f"{bound.epsilon:.2f} or more: {'the claim is refuted' if refuted else 'that does not refute it'}"
    )
    return unmeasured("privacy", "epsilon", promise.units, "fail" if refuted else "pass", told)


def _bound_of(audited: pd.DataFrame, wanted: int, delta: float, config: GateConfig) -> Bound:
    sides = {
        name: audited[audited.model == name].set_index("name").sort_index() for name in ("candidate", "base")
    }
    mine, theirs = sides["candidate"], sides["base"]
    if len(mine) != wanted or mine.index.nunique() != wanted or not mine.index.equals(theirs.index):
        raise RatchetError(
            f"{len(mine)} canaries of the audit were measured, the evaluation says {wanted}", remedy=AGAIN
        )
    gains = (theirs.nll - mine.nll).to_numpy(dtype=np.float64)
    if not np.isfinite(gains).all():
        raise RatchetError("the likelihood of the audit's canaries is not finite", remedy=AGAIN)
    return lower_bound(gains, mine.planted.to_numpy(dtype=bool), delta=delta, alpha=config.guardrail_alpha)
