"""Take the version that the coordinator of a federation delivered into this node's own project: the flow
`take`.

The delivered adapter takes the place of the stage `train`; evaluation, parity, gate, registration, rollout
and history are those of `flows.retrain`, on the node's own rows and against its own champion.
"""

from __future__ import annotations

from prefect import flow

from flows.console import say
from flows.retrain import Retrained, bring_up_to_date, go_round, retraining
from ratchet.config.params import load_config
from ratchet.pipeline.dvc import Workspace
from ratchet.pipeline.stage import project_root


@flow(name="take", flow_run_name="take: {reason}", persist_result=False)
def take(root: str | None = None, reason: str = "by hand", *, personal: bool = False) -> Retrained:
    """Make the delivered version a candidate, and promote it, start its rollout, or keep the champion.

    `personal` mixes it with an adapter that is trained on the node's own rows. Raises UserError: nothing was
    delivered, or it cannot be taken; and the errors of `retrain`.
    """
    from tasks.take import check_delivery  # loads torch
    from tasks.take import take as make_candidate

    home = project_root(root)
    config = load_config(home / "params.yaml")
    check_delivery(home, config, personal=personal)

    def train(inside: Workspace) -> None:
        make_candidate(inside, config, personal=personal, say=say)

    with retraining(home, config) as workspace:
        stale = bring_up_to_date(workspace, force=True)
        return go_round(workspace, config, reason, stale | {"train"}, train)
