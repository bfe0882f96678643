"""Read and write champion.json, which says which version is in charge. Its git history is the ledger.

The file decides; MLflow's alias `champion` follows it, so that a rollback works while MLflow is down.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from ratchet.errors import CheckoutError, CommandError
from ratchet.files import to_json, write_json
from ratchet.pipeline.checkout import git
from ratchet.storage.database import find_database
from ratchet.storage.documents import read_document, write_document

FILE = "champion.json"
PENDING = ".ratchet/alias-pending"  # names the version that MLflow's alias may not have followed yet


class Data(msgspec.Struct, frozen=True):
    """The rows that a version was made of: DVC's hash of data/raw, and how many rows there are.

    A federation's `nodes` keep their rows; then `rows` counts those, and data/raw is what it was judged on.
    `share` tells which part of a personal version a node trained on its own rows.
    """

    dvc: str = ""
    batches: int = 0
    rows: int = 0
    accepted: int = 0
    rejected: int = 0
    duplicate: int = 0
    nodes: list[str] = []
    share: str = ""

    @property
    def told(self) -> str:
        if self.nodes:
            names = ", ".join(self.nodes)
            share = f", {self.share}" if self.share else ""
            return f"{self.rows} rows at {len(self.nodes)} nodes ({names}){share}; judged on DVC {self.dvc}"
        return f"{self.rows} rows in {self.batches} batches, DVC {self.dvc}"


class GateLine(msgspec.Struct, frozen=True):
    """The gate's verdict in one line, with the success metric's gain over the rival (None: the base)."""

    verdict: str
    rival: int | None
    metric: str = ""
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    rows: int | None = None

    @property
    def gain(self) -> str:
        """Format it as `metric mean [low, high]`; empty where there are no figures."""
        if self.mean is None:
            return ""
        return f"{self.metric} {self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


class Champion(msgspec.Struct, frozen=True):
    """One entry of the ledger.

    The dvc.lock of `commit` holds the adapter. `previous` is the version before, to which a rollback returns.
    """

    name: str
    version: int
    previous: int | None
    commit: str
    run_key: str
    run_id: str
    adapter_sha256: str
    batches: list[str]
    data: Data
    gate: GateLine
    at: str
    by: str
    why: str
    move: str  # "promote" or "rollback"
    replaced: int | None  # the version in charge before this entry


def read_champion(root: Path) -> Champion | None:
    """Read the champion's entry; None before the first promotion.

    Raises CheckoutError for a file that holds no entry.
    """
    path = root / FILE
    if not path.exists():
        return None
    return decode_champion(path.read_bytes(), str(path))


def alias_is_pending(root: Path) -> bool:
    """Return whether MLflow still has to be told who is in charge.

    A note of another version than the champion is of a move that was killed before it landed.
    """
    try:
        noted = (root / PENDING).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return False
    champion = read_champion(root)
    return champion is not None and noted == f"v{champion.version}"


def publish_champion(root: Path, champion: Champion) -> None:
    """Tell the gateways that share a database who is in charge; without one they read the file.

    Raises ServiceError, LeaseError.
    """
    if find_database(root) is not None:
        write_document(root, Path(FILE), to_json(msgspec.to_builtins(champion)))


def publish_newer(root: Path) -> None:
    """Publish this checkout's champion.json if it is newer than what the gateways know.

    It is after a promotion during which the database was down. Raises CheckoutError, ServiceError.
    """
    if find_database(root) is None or (champion := read_champion(root)) is None:
        return
    known = read_document(root, Path(FILE))
    if known is None or decode_champion(known, f"the shared {FILE}").at < champion.at:
        publish_champion(root, champion)


def write_champion(root: Path, champion: Champion) -> None:
    write_json(root / FILE, msgspec.to_builtins(champion))


def read_ledger(root: Path) -> list[tuple[str, Champion]]:
    """Read (commit that moved the champion, entry) of all entries, the newest first."""
    return list(_entries(root))


def last_entry(root: Path, version: int) -> Champion | None:
    """Return the newest entry in which that version was in charge.

    Older entries are not read, so a rollback works in a shallow clone.
    """
    return next((entry for _, entry in _entries(root) if entry.version == version), None)


def was_promoted(root: Path, adapter: str, rival: int | None) -> bool:
    """Return whether that adapter (its sha256) was ever promoted after the comparison with `rival`."""
    return any(
        (entry.adapter_sha256, entry.gate.rival) == (adapter, rival)
        for _, entry in _entries(root)
        if entry.move == "promote"
    )


def _entries(root: Path) -> Iterator[tuple[str, Champion]]:
    try:
        commits = git(root, "log", "--format=%H", "--diff-filter=AM", "--", FILE).split()
    except CommandError:
        return
    for commit in commits:
        yield (
            commit,
            decode_champion(git(root, "show", f"{commit}:{FILE}").encode(), f"{FILE} at {commit[:8]}"),
        )


def decode_champion(raw: bytes, where: str) -> Champion:
    try:
        return msgspec.json.decode(raw, type=Champion)
    except msgspec.DecodeError as error:
        raise CheckoutError(
            f"{where} is no champion entry: {error}",
            remedy=f"git checkout HEAD -- {FILE}; the file is written by `ratchet promote` "
            "and `ratchet rollback`",
        ) from None
