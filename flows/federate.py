"""Train together with nodes that keep their rows, and judge what comes out like any candidate: the flow
`federate`.

The rounds take the place of the stage `train`; evaluation, parity, gate, registration, rollout and history
are those of `flows.retrain`.
"""

from __future__ import annotations

from prefect import flow

from flows.console import say
from flows.retrain import Retrained, bring_up_to_date, go_round
from ratchet.config.params import load_config
from ratchet.federation.rounds import Link
from ratchet.pipeline.checkout import check_lock, locked
from ratchet.pipeline.dvc import Workspace
from ratchet.pipeline.stage import project_root
from ratchet.pipeline.workspace import open_workspace
from tasks.federate import check_trainable, forget_run, train_together


@flow(name="federate", flow_run_name="federate: {reason}", persist_result=False)
def federate(root: str | None = None, reason: str = "by hand") -> Retrained:
    """Run the rounds, then promote the candidate, start its rollout, or keep the champion.

    Raises UserError: too few nodes take part; ServiceError: the link to the nodes does not run; and the
    errors of `retrain`.
    """
    from ratchet.federation.flower import FlowerLink

    home = project_root(root)
    return together(home, FlowerLink(home), reason)


def together(home: object, link: Link, reason: str) -> Retrained:
    """Do what `federate` does over any link."""
    root = project_root(str(home))
    config = load_config(root / "params.yaml")
    check_trainable(config)

    def train(workspace: Workspace) -> None:
        train_together(workspace.path, root, config, link, say)

    with (
        locked(root, "retrain"),
        open_workspace(root, "retrain", say, keep_failed=config.retrain.keep_workspaces) as workspace,
    ):
        check_lock(root)
        stale = bring_up_to_date(workspace, force=True) | {"train"}
        found = go_round(workspace, config, reason, stale, train)
    forget_run(root)
    return found
