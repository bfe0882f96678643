"""Run one stage of another machine's retraining: the flow `stage`, which a worker of a work pool starts.

The worker's checkout gives the git remote, the DVC remote's credentials, the cache and the place for
checkpoints. Code, params and dvc.lock come from the branch of the attempt.
"""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger
from prefect.states import Cancelled, Completed, Crashed, Failed

from ratchet.errors import RatchetError, StageError, SupersededError
from ratchet.pipeline.stage import project_root
from ratchet.pipeline.work_branch import BEGUN, Attempt, compute, open_attempt

LOGGER = "stage"  # child of Prefect's logger: lines of the stage, apart from Prefect's own


@flow(name="stage", flow_run_name="{stage}: attempt {number} of {branch}", persist_result=False)
def stage(branch: str, commit: str, number: int, stage: str) -> Any:
    """Run `stage` at the branch's attempt `number`, which began with `commit`, and push its outputs.

    The state says what the asking machine does next: Failed carries the stage's exit code in its name,
    Crashed asks for another attempt, Cancelled says that there is one already.
    """
    root = project_root()
    logger: Any = get_run_logger()
    say = logger.getChild(LOGGER).info
    attempt = Attempt(branch, commit, number, BEGUN)
    try:
        with open_attempt(root, attempt, say) as workspace:
            compute(workspace, stage, attempt, say)
    except SupersededError as error:
        return Cancelled(message=str(error))
    except StageError as error:
        if error.killed:
            return Crashed(message=str(error))
        return Failed(message=str(error), name=f"Exit {error.exit_code}")
    except RatchetError as error:
        return Failed(message=f"{type(error).__name__}: {error}", name=f"Exit {error.exit_code}")
    return Completed(message=f"{stage} is pushed")
