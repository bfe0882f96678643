"""No secret stands in what Ratchet writes: the files that it commits, and its logs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ratchet.config.params import Config
from ratchet.data.pii import find_secret
from ratchet.pipeline.checkout import git
from ratchet.verification.finding import Finding, judge

WRITTEN = ("params.yaml", "champion.json", "dvc.lock", ".dvc/config", "data", "models", "reports")
LOGS = (".ratchet/logs/*.log*", ".ratchet/*.json", ".ratchet/*.jsonl", ".ratchet/monitor/*.json")
GUARDED = ("keys.json",)  # hashes of API keys, readable by the owner alone
RANDOM = "random string"  # hashes and ids look like that; only the kinds that have a form of their own count


def find_secrets(root: Path, config: Config) -> Finding:
    """Check that no file holds what the checks of rows take for a secret, such as an API key."""
    files, faults = 0, []
    for path in _files(root):
        files += 1
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if (kind := find_secret(line)) and kind != RANDOM:
                    faults.append(f"{path.relative_to(root)}:{number} holds a secret ({kind})")
                    break
    remedy = "change it where it is valid, then remove it here; in git it stays in the history"
    return judge("secrets", f"none in {files} files", faults, "none", remedy)


def _files(root: Path) -> Iterator[Path]:
    committed = git(root, "ls-files", "-z", "--", *WRITTEN).split("\0")
    yield from (root / name for name in committed if name and (root / name).is_file())
    for pattern in LOGS:
        yield from (path for path in sorted(root.glob(pattern)) if path.name not in GUARDED)
