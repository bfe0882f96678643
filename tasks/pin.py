"""Pin the champion as an ordinary input of the DAG: models/incumbent, versioned by DVC.

champion.json changes at every promotion, which must not make the DAG stale: each retraining would be followed
by another. So a retraining that has something to train pins today's champion first, and one that has nothing
to train leaves the pin as it is.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from ratchet.config.params import load_config
from ratchet.errors import CheckoutError, CommandError
from ratchet.files import read_json, whole_folder, write_json
from ratchet.gate.alpha_budget import FILE as LOOKS
from ratchet.gate.alpha_budget import read_looks, with_verdict
from ratchet.models.loading import MANIFEST, adapter_sha256
from ratchet.models.manifests import read_trained_manifest
from ratchet.pipeline.dvc import Workspace
from ratchet.pipeline.workspace import get_output
from ratchet.privacy.ledger import FILE as LEDGER
from ratchet.privacy.ledger import Spending, add_spending
from ratchet.promotion.champion import Champion, read_champion, read_ledger
from ratchet.promotion.verdict import read_verdict
from ratchet.serving.bundle import base_hash

INCUMBENT, CANDIDATE = Path("models/incumbent"), Path("models/candidate")
OLDEST = "oldest.parquet"
READERS = {"tokenize", "train", "evaluate", "gate"}  # stages that read models/incumbent
TRAINING = {"base", "prepare", "tokenize", "train"}  # if one of them is stale, there is something to train
NOBODY: dict[str, Any] = {"version": None, "batches": []}  # the manifest before the first promotion


def needs_pin(workspace: Workspace, stale: set[str], *, force: bool) -> bool:
    """Return whether to pin the champion: there is something to train, nothing is pinned yet, or `force`."""
    return force or bool(stale & TRAINING) or not (workspace.path / f"{INCUMBENT}.dvc").exists()


def pin(workspace: Workspace) -> bool:
    """Put today's champion into models/incumbent, and return whether that changed anything.

    Raises CommandError when its adapter cannot be fetched, CheckoutError when the adapter is not the ledger's
    or the scores of the oldest champion cannot be fetched.
    """
    champion, oldest = read_champion(workspace.path), _oldest(workspace)
    wanted = (
        NOBODY
        if champion is None
        else {
            "version": champion.version,
            "adapter_sha256": champion.adapter_sha256,
            "batches": champion.batches,
        }
    )
    wanted = wanted | {"oldest": oldest.version if oldest else None}
    target = workspace.path / INCUMBENT
    if (target / MANIFEST).exists() and all(
        read_json(target / MANIFEST).get(key) == value for key, value in wanted.items()
    ):
        return False
    with whole_folder(target) as folder:
        if champion is not None:
            _fetch(workspace, champion, folder)
        if oldest is not None:
            _fetch_scores(workspace, oldest, folder / OLDEST)
        kept = read_json(folder / MANIFEST) if champion is not None else {}
        write_json(folder / MANIFEST, {**kept, **wanted})
    workspace.dvc("add", "--quiet", str(INCUMBENT))
    return True


def _oldest(workspace: Workspace) -> Champion | None:
    """Return the ledger's first champion if another one is in charge and `gate.oldest` is on."""
    if not load_config(workspace.path / "params.yaml").gate.oldest:
        return None
    entries, champion = read_ledger(workspace.path), read_champion(workspace.path)
    return entries[-1][1] if entries and champion and entries[-1][1].version != champion.version else None


def _fetch_scores(workspace: Workspace, oldest: Champion, target: Path) -> None:
    """Fetch the score of each row from the oldest champion's own evaluation. Raises CheckoutError.

    Test and golden rows do not change, so no model has to answer again.
    """
    import pandas as pd

    with tempfile.TemporaryDirectory(prefix="ratchet-pin-") as scratch:
        try:
            get_output(workspace.path, oldest.commit, "reports/evaluation", Path(scratch) / "evaluation")
            scores = pd.read_parquet(Path(scratch) / "evaluation/scores.parquet")
        except (CommandError, OSError, ValueError) as error:
            raise CheckoutError(
                f"the scores of v{oldest.version}, the first champion, cannot be had from "
                f"{oldest.commit[:8]}: "
                f"{' '.join(str(error).split())[:300]}",
                remedy="dvc pull; if they are gone for good: `gate.oldest: false`",
            ) from None
    texts = ["question", "reference", "answer"]
    scores[scores.model == "candidate"].drop(columns=texts, errors="ignore").assign(
        model=f"v{oldest.version}"
    ).to_parquet(target, index=False)


def pin_looks(workspace: Workspace) -> bool:
    """Count the last verdict as a look (`ratchet.gate.alpha_budget`), and return whether the file changed.

    Call this before a training only: a gate that runs again on the same candidate takes no new look.
    """
    verdict, path = workspace.path / "reports/gate.json", workspace.path / LOOKS
    looks = read_looks(path) if path.exists() else {}
    judged = with_verdict(looks, read_verdict(verdict)) if verdict.exists() else looks
    if judged == looks and path.exists():
        return False
    write_json(path, {"judged": judged})
    return True


def pin_privacy(workspace: Workspace) -> bool:
    """Count what the candidate's training has spent of its rows' privacy, and return whether it was new.

    The training has done so itself, unless DVC took its candidate from the cache of earlier runs.
    """
    promise = read_trained_manifest(workspace.path / CANDIDATE).privacy
    if promise is None:
        return False
    fields = {name: getattr(promise, name) for name in Spending.__struct_fields__}
    return add_spending(workspace.path / LEDGER, Spending(**fields))


def _fetch(workspace: Workspace, champion: Champion, folder: Path) -> None:
    """Fetch the champion's adapter from the commit that made it, and its base as well when today's
    differs.
    """
    with tempfile.TemporaryDirectory(prefix="ratchet-pin-") as scratch:
        adapter = Path(scratch) / "adapter"
        get_output(workspace.path, champion.commit, "models/candidate", adapter)
        if (seen := adapter_sha256(adapter)) != champion.adapter_sha256:
            raise CheckoutError(
                f"the adapter of v{champion.version} at {champion.commit[:8]} has sha256 {seen[:12]}…, the "
                f"ledger says {champion.adapter_sha256[:12]}…",
                remedy="dvc pull; if it stays so, the cache is damaged: take the version's "
                "artifact from MLflow",
            )
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        theirs = base_hash(workspace.path, champion.commit)
        if theirs and theirs != base_hash(workspace.path, "HEAD"):
            get_output(workspace.path, champion.commit, "models/base", folder / "base")
