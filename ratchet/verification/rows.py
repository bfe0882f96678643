"""Every batch came in once, and every row is accounted for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ratchet.config.params import Config
from ratchet.data.batches import read_manifest
from ratchet.data.mixture import undesirable
from ratchet.data.profile import GROUPS, SPLITS
from ratchet.files import read_json
from ratchet.pipeline.checkout import git
from ratchet.verification.finding import Finding, judge

RAW, PREPARED = Path("data/raw"), Path("data/prepared")
TRAILERS = "--format=%(trailers:key=Batch,valueonly)%x00%(trailers:key=Reverts-batch,valueonly)%x01"


def find_batches(root: Path, config: Config) -> Finding:
    """Check that each batch is in the manifest with rows of its own, and that one commit brought it."""
    batches = read_manifest(root / RAW)
    if git(root, "rev-parse", "--is-shallow-repository").strip() == "true":
        return Finding("batches", "unknown", "the history is cut off: git fetch --unshallow")
    came = Counter[str]()
    for commit in git(root, "log", TRAILERS).split("\x01"):
        added, _, reverted = commit.partition("\x00")
        came.update(added.split())
        came.subtract(reverted.split())
    contents = Counter(batch.content for batch in batches)
    faults = [f"{batch.name} came {came[batch.name]} times" for batch in batches if came[batch.name] != 1]
    faults += [f"{batch.name} has rows of another batch" for batch in batches if contents[batch.content] > 1]
    names = {batch.name for batch in batches}
    faults += [f"{name} is not in {RAW}" for name, count in came.items() if count > 0 and name not in names]
    seen = f"{len(batches)} batches, {sum(batch.rows for batch in batches)} rows"
    remedy = "dvc checkout data/raw.dvc; a batch too many: ratchet data revert BATCH"
    return judge("batches", seen, faults, "each once", remedy)


def find_rows(root: Path, config: Config) -> Finding:
    """Check that rows = accepted + rejected + duplicate, in the profile and in the files."""
    if not (root / PREPARED / "profile.json").exists():
        return Finding("rows", "unknown", "no rows are prepared yet")
    profile = read_json(root / PREPARED / "profile.json")
    total, known = profile["total"], {batch.name: batch.rows for batch in read_manifest(root / RAW)}
    faults = [
        f"{name}: {counts['rows']} rows, {sum(counts[group]['rows'] for group in GROUPS)} accounted for"
        for name, counts in {"all batches": total, **profile["batches"]}.items()
        if counts["rows"] != sum(counts[group]["rows"] for group in GROUPS)
    ]
    faults += [
        f"{name}: {counts['rows']} rows prepared, {known[name]} came in"
        for name, counts in profile["batches"].items()
        if name in known and counts["rows"] != known[name]
    ]
    wanted = {"rejected": total["rejected"]["rows"], "golden": profile["golden"]}
    wanted |= {
        name: total["accepted"].get(name, 0) for split in SPLITS for name in (split, undesirable(split))
    }
    for name, rows in wanted.items():
        if (lines := _count_lines(root / PREPARED / f"{name}.jsonl")) != rows:
            faults.append(f"{name}.jsonl has {lines} rows, the profile says {rows}")
    seen = ", ".join([f"{total['rows']} rows", *(f"{total[group]['rows']} {group}" for group in GROUPS)])
    return judge("rows", seen, faults, "equal sums", "ratchet retrain prepares them anew")


def _count_lines(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as lines:
        return sum(1 for _ in lines)
