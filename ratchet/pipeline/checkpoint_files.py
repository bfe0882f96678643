"""Find and copy the checkpoints of a training, which `ratchet/training/checkpoints.py` writes."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from ratchet.files import whole_folder

FOLDER = Path(".ratchet/checkpoints")  # FOLDER/<run key>/step-00000012/
MANIFEST = "manifest.json"  # written last
STEP = re.compile(r"step-(\d{8})")


def list_whole(folder: Path) -> list[Path]:
    """List the folders of complete checkpoints in `folder`/<run key>, the one with the most steps last."""
    found = [path.parent for path in folder.glob(f"*/step-*/{MANIFEST}") if STEP.fullmatch(path.parent.name)]
    return sorted(found, key=lambda path: path.name)


def link(source: Path, target: Path) -> None:
    """Link the files of a checkpoint into the folder `target`; where that is impossible, copy them.

    Raises OSError if the training has removed the checkpoint meanwhile.
    """
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        try:
            os.link(path, target / path.name)
        except PermissionError:  # a filesystem without links
            shutil.copyfile(path, target / path.name)


def restore(carried: Path, home: Path) -> list[Path]:
    """Copy the checkpoints in `carried` to where a training in the checkout `home` looks for them.

    Return those that were not there. A training checks them before use.
    """
    new = []
    for source in list_whole(carried):
        target = home / FOLDER / source.relative_to(carried)
        if not target.exists():
            with whole_folder(target) as folder:
                for path in source.iterdir():
                    shutil.copyfile(path, folder / path.name)
            new.append(target)
    return new
