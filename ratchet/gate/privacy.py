"""Refuse a claim of privacy that its own canaries refute, or that was made for weights that did not move."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pandas as pd

from ratchet.config.evaluation import GateConfig
from ratchet.errors import RatchetError
from ratchet.evaluation.paired import AGAIN
from ratchet.files import read_json
from ratchet.gate.checks import unmeasured
from ratchet.privacy.audit import Bound, Claim, bound_of, lower_bound
from ratchet.privacy.ledger import Promise
from ratchet.promotion.verdict import Check, Result


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
    told += f"; {_tell(bound, f'{wanted} canaries', refuted=refuted)}"
    return unmeasured("privacy", "epsilon", promise.units, "fail" if refuted else "pass", told)


def judge_claim(path: Path, config: GateConfig) -> list[Check]:
    """Check what a federation's training promised of the rows at its nodes; none without a claim at `path`.

    Where an audit was asked for and no node made it, the claim is not believed.
    """
    if not path.exists():
        return []
    claim = msgspec.convert(read_json(path), Claim)
    result, told = _result_of(claim, config)
    promised = f"ε = {claim.epsilon:g}, δ = {claim.delta:g} for each of {claim.rows:,} rows at the nodes"
    without = f"; without {', '.join(sorted(claim.left_out))}" if claim.left_out else ""
    reason = f"guardrail privacy: {promised}{told}{without}"
    return [unmeasured("privacy", "epsilon", claim.rows, result, reason)]


def _result_of(claim: Claim, config: GateConfig) -> tuple[Result, str]:
    if claim.moved <= 0:
        return "fail", ", but the weights are those from which the training started"
    told = f"; the weights moved by {claim.moved:.3g}"
    if not claim.canaries:
        return "pass", f"{told}; not audited (`federate.audit_canaries` is 0)"
    if claim.guesses is None:
        return "fail", f"{told}; no node made the audit, so nothing supports the claim"
    bound = bound_of(claim.guesses, delta=claim.delta, alpha=config.guardrail_alpha)
    refuted = bound.epsilon > claim.epsilon
    canaries = f"{claim.guesses.canaries} canaries of {len(claim.nodes)} nodes"
    return "fail" if refuted else "pass", f"{told}; {_tell(bound, canaries, refuted=refuted)}"


def _tell(bound: Bound, canaries: str, *, refuted: bool) -> str:
    return (
        f"audit: {bound.right} of {bound.guesses} guesses about {canaries} are right, so ε is "
        f"{bound.epsilon:.2f} or more: {'the claim is refuted' if refuted else 'that does not refute it'}"
    )


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
