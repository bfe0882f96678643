"""Pin the champion as an ordinary input of the DAG: models/incumbent, versioned by DVC.

champion.json moves at every promotion; the DAG must not go stale by it, or every retraining would be followed
by another. So a retraining that has something to train pins today's champion first, and one that has nothing
leaves the pin alone.
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
from ratchet.pipeline.dvc import Workspace
from ratchet.pipeline.workspace import get_output
from ratchet.promotion.champion import Champion, read_champion, read_ledger
from ratchet.promotion.verdict import read_verdict
from ratchet.serving.bundle import base_hash

INCUMBENT = Path("models/incumbent")
OLDEST = "oldest.parquet"
READERS = {"tokenize", "train", "evaluate", "gate"}  # stages that read it
TRAINING = {"base", "prepare", "tokenize", "train"}
NOBODY: dict[str, Any] = {"version": None, "batches": []}


def needs_pin(workspace: Workspace, stale: set[str], *, force: bool) -> bool:
    """Whether there is something to train, or nothing pinned yet."""
    return force or bool(stale & TRAINING) or not (workspace.path / f"{INCUMBENT}.dvc").exists()


def pin(workspace: Workspace) -> bool:
    """Put today's champion into models/incumbent. Whether that changed anything.

    Raises CheckoutError when its adapter cannot be had.
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
    """The ledger's first champion, when another one is in charge and `gate.oldest` is on."""
    if not load_config(workspace.path / "params.yaml").gate.oldest:
        return None
    entries, champion = read_ledger(workspace.path), read_champion(workspace.path)
    return entries[-1][1] if entries and champion and entries[-1][1].version != champion.version else None


def _fetch_scores(workspace: Workspace, oldest: Champion, target: Path) -> None:
    """A row's score by the oldest champion, as its own evaluation gave it: test and golden rows stay, so no
    model has to answer again. Raises CheckoutError.
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
    """Count the last verdict before the next candidate is judged (`ratchet.gate.alpha_budget`).

    Whether that changed the file.

    Only where there is something to train: a gate that is run once more on the same candidate is no new look.
    """
    verdict, path = workspace.path / "reports/gate.json", workspace.path / LOOKS
    looks = read_looks(path) if path.exists() else {}
    judged = with_verdict(looks, read_verdict(verdict)) if verdict.exists() else looks
    if judged == looks and path.exists():
        return False
    write_json(path, {"judged": judged})
    return True


def _fetch(workspace: Workspace, champion: Champion, folder: Path) -> None:
    """The champion's adapter from the commit that made it; its base as well when today's is another."""
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
