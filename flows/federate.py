"""Train together with nodes that keep their rows, and judge what comes out like any candidate: the flow
`federate`.

The rounds take the place of the stage `train`; evaluation, parity, gate, registration, rollout and history
are those of `flows.retrain`.
"""

from __future__ import annotations

from prefect import flow

from flows.retrain import Retrained, bring_up_to_date, retraining, train_with_nodes
from ratchet.config.params import load_config
from ratchet.pipeline.checkout import locked
from ratchet.pipeline.stage import project_root


@flow(name="federate", flow_run_name="federate: {reason}", persist_result=False)
def federate(root: str | None = None, reason: str = "by hand") -> Retrained:
    """Run the rounds, then promote the candidate, start its rollout, or keep the champion.

    Raises CheckoutError: another run goes on; UserError: too few nodes take part; ServiceError: the link to
    the nodes does not run; and the errors of `retrain`.
    """
    home = project_root(root)
    config = load_config(home / "params.yaml")
    with locked(home, "federate", wait=False), retraining(home, config) as workspace:
        return train_with_nodes(workspace, config, reason, bring_up_to_date(workspace, force=True))
