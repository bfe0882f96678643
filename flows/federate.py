"""Train together with nodes that keep their rows, and judge what comes out like any candidate: the flow
`federate`.

The rounds take the place of the stage `train`; evaluation, parity, gate, registration, rollout and history
are those of `flows.retrain`.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.retrain import Retrained, bring_up_to_date, require_nodes, retraining, train_with_nodes
from ratchet.config.params import Config, load_config
from ratchet.errors import UserError
from ratchet.federation.link.flower import FOLDER, read_names
from ratchet.pipeline.checkout import locked
from ratchet.pipeline.stage import project_root
from ratchet.promotion.lineage import taught_by
from ratchet.tracking.registry import list_versions


@flow(name="federate", flow_run_name="federate: {reason}", persist_result=False)
def federate(root: str | None = None, reason: str = "by hand") -> Retrained:
    """Run the rounds, then promote the candidate, start its rollout, or keep the champion.

    Raises CheckoutError: another run goes on; UserError: too few nodes take part; ServiceError: the link to
    the nodes does not run; and the errors of `retrain`.
    """
    home = project_root(root)
    config = load_config(home / "params.yaml")
    with locked(home, "federate", wait=False):
        require_nodes(home, config)
        with retraining(home, config) as workspace:
            return train_with_nodes(workspace, config, reason, bring_up_to_date(workspace, force=True))


def forget(root: Path, config: Config, name: str, reason: str) -> list[int]:
    """Put a node out, and return the versions that hold its share. The next training starts without it.

    Raises CheckoutError: a run goes on, which may need the node; UserError: nobody has that name;
    ServiceError: MLflow or the link does not answer.
    """
    from ratchet.federation.link.invitations import forget_node

    with locked(root, "federate", wait=False):
        names = sorted(read_names(root / FOLDER).values())
        versions = taught_by(list_versions(config.project.name), name)
        if name not in names and not versions:
            raise UserError(
                f"no node is called {name}, and no version was taught by one; there are "
                f"{', '.join(names) or 'none'}",
                remedy="ratchet federate status",
            )
        forget_node(root, config, name, reason)
    return versions
