"""The bytes of data and versions are those that were stored."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ruamel.yaml import YAML

from ratchet.config.params import Config
from ratchet.errors import DamagedError, RatchetError
from ratchet.files import sha256_file
from ratchet.models.loading import WEIGHTS, WHOLE
from ratchet.pipeline.checkout import git
from ratchet.pipeline.integrity import check_inputs, find_damage, object_path, tracked_hashes
from ratchet.pipeline.workspace import read_at
from ratchet.promotion.champion import Champion, read_ledger
from ratchet.serving.bundle import SERVING, check_adapter
from ratchet.verification.finding import Finding, judge

REMEDY = "rm the damaged copy, then `dvc pull`, or `ratchet retrain` makes it again (docs/operations.md)"


def find_data(root: Path, config: Config) -> Finding:
    """Check that the working tree's data have the bytes that dvc.lock and the .dvc files name."""
    lock = root / "dvc.lock"
    stages = (YAML(typ="safe").load(lock.read_text(encoding="utf-8")) or {}) if lock.exists() else {}
    names = [out["path"] for stage in stages.get("stages", {}).values() for out in stage.get("outs", [])]
    names += [name.removesuffix(".dvc") for name in git(root, "ls-files", "--", "*.dvc").splitlines()]
    present = [name for name in names if (root / name).exists() and name != "data/code"]
    faults = []
    for name in present:
        try:
            check_inputs(root, [name])
        except DamagedError as error:
            faults.append(str(error).splitlines()[0])
    return judge("data", f"{len(present)} of {len(names)} are here, with their bytes", faults, "", REMEDY)


def find_versions(root: Path, config: Config) -> Finding:
    """Check that every version that was in charge has the bytes of its commit and of the ledger."""
    entries = {entry.version: entry for _, entry in read_ledger(root)}
    faults, away = [], 0
    for version, entry in sorted(entries.items()):
        try:
            away += not _check_version(root, entry)
        except (RatchetError, OSError) as error:
            faults.append(f"v{version}: {str(error).splitlines()[0]}")
    elsewhere = f", {away} of them not on this machine" if away else ""
    return judge("versions", f"{len(entries)} versions{elsewhere}", faults, "", REMEDY)


def _check_version(root: Path, entry: Champion) -> bool:
    """Check a version in DVC's cache and where it is served; return False if the cache does not have it."""
    served = root / SERVING / f"v{entry.version}-{entry.adapter_sha256[:12]}" / "adapter"
    if served.exists():
        check_adapter(served, entry.adapter_sha256)
    hashes = tracked_hashes(root, Path("models/candidate"), partial(read_at, root, entry.commit)) or {}
    objects = {name: object_path(root, digest.removeprefix("md5:")) for name, digest in hashes.items()}
    if not objects or not all(path.exists() for path in objects.values()):
        return False
    for name, path in objects.items():
        if damage := find_damage(path, {"": hashes[name]}):
            raise DamagedError(f"{name} in {path}: {damage[0].seen}, wanted {damage[0].wanted}")
    weights = [path for name, path in objects.items() if name in (WEIGHTS, WHOLE)]
    if weights and all(sha256_file(path) != entry.adapter_sha256 for path in weights):
        raise DamagedError(f"its weights are not those of the ledger, {entry.adapter_sha256[:12]}…")
    return True
