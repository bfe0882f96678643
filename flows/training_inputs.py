"""Make the inputs of trainings outside the DAG, by the DAG's own stages.

They are made in a workspace whose results are not committed; DVC's cache keeps them for the next retraining.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ratchet.config.edit import edit_params
from ratchet.errors import DataError
from ratchet.files import write_text
from ratchet.pipeline.dvc import Workspace, check_out, run_stage
from ratchet.pipeline.integrity import check_inputs
from ratchet.pipeline.workspace import open_workspace
from ratchet.training.launch import Material
from ratchet.training.search_space import Changes
from tasks.pin import INCUMBENT, pin

STAGES = ("base", "prepare", "tokenize")
TOKENS, BASE, PREPARED = Path("data/tokenized"), Path("models/base"), Path("data/prepared")

Say = Callable[[str], None]


@contextmanager
def open_bench(root: Path, purpose: str, say: Say) -> Iterator[Workspace]:
    """Open a workspace with the newest data and today's champion pinned."""
    with open_workspace(root, purpose, say, keep_failed=0) as workspace:
        if not (workspace.path / "data/raw.dvc").exists():
            raise DataError(
                f"{root} holds no batch of rows yet", remedy="ratchet ingest --path FILE takes rows in"
            )
        check_out(workspace)
        pin(workspace)
        yield workspace


def make_material(workspace: Workspace, changes: Changes, say: Say) -> Material:
    """Make base, prepared rows and tokens for params.yaml with `changes` (dotted key → value).

    Raises StageError.
    """
    text = (workspace.root / "params.yaml").read_text(encoding="utf-8")
    write_text(workspace.path / "params.yaml", edit_params(text, changes))
    for stage in STAGES:
        run_stage(workspace, stage, say)
    check_inputs(workspace.path, [str(path) for path in (TOKENS, BASE, PREPARED, INCUMBENT)])
    return material_of(workspace.path)


def material_of(folder: Path) -> Material:
    return Material(folder / TOKENS, folder / BASE, folder / INCUMBENT)
