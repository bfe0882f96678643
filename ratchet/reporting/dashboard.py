"""Make the project's page: one HTML file without scripts and without anything from outside.

`ratchet report` writes it, and the gateway serves it at `/`. It reads only files, git and the request log, so
it works while MLflow and Prefect are down. A part that cannot be read shows the reason instead.
"""

from __future__ import annotations

import json
import os
import time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar
from urllib.parse import quote

import msgspec

from ratchet.config.params import Config
from ratchet.errors import RatchetError
from ratchet.federation.status import Federation, see_federation
from ratchet.files import write_text
from ratchet.media.pictures import shrink
from ratchet.monitoring.pictures import KeptPictures
from ratchet.monitoring.request_log import open_log
from ratchet.monitoring.request_records import Traffic
from ratchet.monitoring.verdicts import REPORTS, Recorded, read_verdicts
from ratchet.pipeline.checkout import git
from ratchet.promotion.champion import Champion, read_champion
from ratchet.promotion.gate_tags import is_gate_of
from ratchet.promotion.plain_words import tell_verdict
from ratchet.promotion.rollout import Rollout, read_ended, read_rollout
from ratchet.promotion.verdict import Check, decode_verdict, read_verdict
from ratchet.reporting.evaluation_page import KEPT as PAGES
from ratchet.reporting.evaluation_page import kept_page
from ratchet.reporting.retention import OLD_SAVED, SAVED, Retention
from ratchet.services.status import Move, read_moves
from ratchet.serving.bundle import ServingState, read_state

T = TypeVar("T")
HOME = Path(".ratchet")  # the page stands in it, with the files that it links
THUMBNAIL = 160  # pixels of the longer side
DAYS = 14  # days of traffic and feedback that are shown
MOST_VERDICTS, MOST_PROMOTIONS, MOST_ROLLOUTS = 200, 8, 8
REMEMBERED = ("past", "golden", "region")  # a gate's checks of old rows and of drifted topics


def write_page(root: Path, config: Config, path: Path) -> Path:
    base = Path(os.path.relpath(root / HOME, path.parent)).as_posix()
    write_text(path, render_page(root, config, base))
    return path


def render_page(root: Path, config: Config, base: str = ".") -> str:
    """Render the dashboard as HTML.

    Texts of users are escaped; halves of surrogate pairs become question marks. `base` is the path from the
    page to the folder `.ratchet`, for links; the gateway serves its linked files beside the page.
    """
    from ratchet.reporting.dashboard_view import render

    return render(gather(root, config, base)).encode("utf-8", "replace").decode()


class Part(NamedTuple, Generic[T]):
    """A part of the page. If it cannot be read, `fault` says why, and `found` is None."""

    found: T | None
    fault: str = ""


class Kept(NamedTuple):
    """A promotion: why, in one sentence, and its checks of past batches, golden rows and drifted topics.

    `link` leads to the evaluation's page; empty where this checkout has none.
    """

    version: int
    rival: int | None
    checks: list[Check]
    fault: str = ""
    sentence: str = ""
    link: str = ""


class Newest(NamedTuple):
    """The newest candidate: its verdict in one sentence, and a link to its evaluation's page or nothing."""

    sentence: str
    link: str


class Page(NamedTuple):
    """The data from which the page is drawn; times are in seconds since 1970."""

    project: str
    at: float
    false_alarm_rate: float
    min_prompts: int
    margins: dict[str, float]
    days: int
    passing: str  # what happens to a candidate that passes the gate
    champion: Part[Champion | None]
    serving: Part[ServingState | None]
    rollout: Part[Rollout | None]
    past: Part[list[Rollout]]  # the newest first
    traffic: Part[list[Traffic]]
    verdicts: Part[list[Recorded]]
    pictures: Part[dict[str, str]]  # of the newest verdict, by name: small ones as data URIs
    ledger: Part[list[Move]]
    table: Part[Retention | None]
    forgetting: Part[list[Kept]]
    newest: Part[Newest | None]  # where it is not the champion
    drift_report: str  # link to Evidently's report of the newest verdict; empty without one
    federation: Part[Federation | None]  # where this checkout is a coordinator or a node


def gather(root: Path, config: Config, base: str = ".") -> Page:
    now = time.time()
    ledger, champion = _part(lambda: read_moves(root)), _part(lambda: read_champion(root))
    verdicts = _part(lambda: read_verdicts(root, MOST_VERDICTS))
    return Page(
        project=config.project.name,
        at=now,
        false_alarm_rate=config.monitor.false_alarm_rate,
        min_prompts=config.monitor.min_prompts,
        margins={
            "feedback": config.rollout.min_gain,
            "errors": config.rollout.error_margin,
            "empty": config.rollout.empty_margin,
            "latency": config.rollout.latency_margin,
        },
        days=DAYS,
        passing=tell_passing(config, first=champion.found is None),
        champion=champion,
        serving=_part(lambda: read_state(root)),
        rollout=_part(lambda: read_rollout(root)),
        past=_part(lambda: read_ended(root)[: -MOST_ROLLOUTS - 1 : -1]),
        traffic=_part(lambda: _traffic(root, config, now - DAYS * 86_400)),
        verdicts=verdicts,
        pictures=_part(lambda: _thumbnails(root, verdicts.found or [])),
        ledger=ledger,
        table=_part(lambda: _table(root)),
        forgetting=_part(lambda: _forgetting(root, ledger.found or [], base)),
        newest=_part(lambda: _newest(root, champion.found, base)),
        drift_report=_link_report(root, verdicts.found or [], base),
        federation=_part(lambda: _federation(root)),
    )


def tell_passing(config: Config, *, first: bool) -> str:
    """Say what `promotion` does with a candidate that passes the gate; `first`: there is no champion yet."""
    if config.promotion == "manual":
        return "A candidate that passes the gate waits for a person (promotion: manual)."
    if config.promotion == "auto":
        return "A candidate that passes the gate takes charge at once, without a rollout (promotion: auto)."
    if first:
        return "The first version that passes the gate takes charge; later ones start a rollout."
    if config.rollout.steps[0] >= 1:
        return "A candidate that passes the gate takes charge at once (the first of rollout.steps is 1)."
    return "A candidate that passes the gate starts one."


def _part(read: Callable[[], T]) -> Part[T]:
    try:
        return Part(read())
    except (RatchetError, OSError, ValueError, TypeError) as error:
        # One malformed file must not hide the other parts of the page; msgspec's errors are ValueErrors.
        return Part(None, str(error) or type(error).__name__)


def _traffic(root: Path, config: Config, since: float) -> list[Traffic]:
    """Read the traffic since a moment from the request log, by hour, version and arm."""
    log = open_log(root, config)
    try:
        return log.traffic(since=since)
    finally:
        log.close()


def _thumbnails(root: Path, verdicts: list[Recorded]) -> dict[str, str]:
    """Return small copies of the pictures that the newest verdict names and the checkout keeps."""
    kept, newest = KeptPictures(root), verdicts[-1] if verdicts else Recorded(at=0)
    named = [*newest.pictures, *(picture for topic in newest.topics for picture in topic.pictures)]
    found = {}
    for name in dict.fromkeys(picture.name for picture in named if picture.name in kept):
        try:
            found[name] = f"data:image/jpeg;base64,{b64encode(shrink(kept[name], THUMBNAIL)).decode()}"
        except (OSError, ValueError, KeyError):  # removed since, or broken on the disk: its words are shown
            continue
    return found


def _table(root: Path) -> Retention | None:
    """Read the retention table as it was last saved, because building it takes seconds per version."""
    path = root / SAVED if (root / SAVED).exists() else root / OLD_SAVED
    found = msgspec.json.decode(path.read_bytes(), type=Retention) if path.exists() else None
    return found if found and found.versions else None


# --- what each promotion kept -------------------------------------------------------------------------------


def _federation(root: Path) -> Federation | None:
    found = see_federation(root)
    return found if found.nodes or found.node or found.last else None


def _newest(root: Path, champion: Champion | None, base: str) -> Newest | None:
    path = root / "reports/gate.json"
    verdict = read_verdict(path) if path.exists() else None
    if verdict is None or (champion and is_gate_of(champion, verdict)):
        return None
    return Newest(tell_verdict(verdict), _link(root, kept_page(verdict), base))


def _link_report(root: Path, verdicts: list[Recorded], base: str) -> str:
    """Link Evidently's report of the newest verdict, which is a folder of this checkout."""
    found = verdicts[-1].report if verdicts else None
    return _link(root, Path(found) / "report.html", base) if found and is_linked(Path(found)) else ""


def is_linked(folder: Path) -> bool:
    """Return whether the page may link that folder's pages, and the gateway may serve them."""
    return folder == PAGES or (folder.parent == REPORTS and folder.name not in (".", ".."))


def read_linked(root: Path, asked: str) -> str | None:
    """Return a file that the page links, by its path at the gateway; None where there is none."""
    path = HOME / asked.lstrip("/")
    if path.suffix != ".html" or not is_linked(path.parent) or not (root / path).is_file():
        return None
    return (root / path).read_text(encoding="utf-8")


def _link(root: Path, path: Path, base: str) -> str:
    """Return a relative link to a file under `.ratchet`; empty where it does not exist."""
    if not (root / path).is_file():
        return ""
    return quote((Path(base) / path.relative_to(HOME)).as_posix())


def _forgetting(root: Path, moves: list[Move], base: str) -> list[Kept]:
    """Return what each of the newest promotions kept.

    A version that returned is listed once, since its gate is the same.
    """
    promotions = {move.to: move for move in reversed(moves) if move.move == "promote"}
    newest = sorted(promotions.values(), key=lambda move: -move.to)[:MOST_PROMOTIONS]
    return [_kept(root, move, base) for move in newest]


def _kept(root: Path, move: Move, base: str) -> Kept:
    try:
        gate = decode_verdict(json.loads(git(root, "show", f"{move.model_commit}:reports/gate.json")))
    except (RatchetError, ValueError):
        why = f"reports/gate.json cannot be read at {move.model_commit[:8]}"
        return Kept(move.to, move.gate.rival, [], f"{why} (git fetch --unshallow, if the history is cut off)")
    checks = [check for check in [*gate.checks, *gate.regions] if check.name.partition(":")[0] in REMEMBERED]
    sentence, link = tell_verdict(gate, promoted=True), _link(root, kept_page(gate), base)
    return Kept(move.to, move.gate.rival, checks, sentence=sentence, link=link)
