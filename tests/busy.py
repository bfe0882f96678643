"""Make a checkout in the middle of its life, for the page.

It has promotions, a rollback, an open rollout, two weeks of traffic, drift, and hostile words.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
from evaluation_reports import RETENTION, TABLE, make_reports
from PIL import Image, ImageDraw
from places import commit, make_repository, write_files

from ratchet.config.params import Config
from ratchet.files import write_json
from ratchet.monitoring.pictures import KeptPictures
from ratchet.monitoring.request_log import open_log
from ratchet.monitoring.request_records import Feedback, Logged
from ratchet.monitoring.verdicts import REPORTS, VERDICTS
from ratchet.promotion.champion import Champion, write_champion
from ratchet.promotion.rollout import Rollout, end_rollout, write_rollout
from ratchet.promotion.verdict import Rival
from ratchet.reporting.evaluation_page import gather, keep_page
from ratchet.reporting.retention import SAVED

HOSTILE = "<script>document.title = 'taken'</script>\u202e&\"'<img src=https://example.org/x.png>"
REPORT = str(REPORTS / "20260101T000000Z")
DAY, HOUR = 86_400.0, 3_600.0
CONFIG = Config.model_validate({"project": {"name": "pydoc-helper"}})


def make_busy(path: Path, now: float | None = None) -> Path:
    """v3 is in charge, v4 is at a quarter of the users."""
    now = now or time.time()
    make_repository(path)
    write_ledger(path, now)
    write_traffic(path, now)
    write_verdicts(path, now)
    write_rollouts(path, now)
    write_json(path / SAVED, TABLE)
    write_linked(path)
    return path


def write_linked(root: Path) -> None:
    """Evidently's report of the newest verdict, and the page of the evaluation of v3 against v2."""
    with TemporaryDirectory() as scratch:
        found = gather(make_reports(Path(scratch)), "v3", RETENTION)
    judged = msgspec.structs.replace(found.decision, rival=Rival("champion", 2))
    keep_page(root, msgspec.structs.replace(found, decision=judged))
    write_files(root, {f"{REPORT}/report.html": "<!doctype html><title>Evidently</title>what it saw"})


def text_of(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%dT%H:%M:%SZ}"


def write_ledger(root: Path, now: float) -> None:
    past = [
        check("golden", -0.02, -0.06, 0.02, -0.08),
        check("past", -0.01, -0.03, 0.01, -0.05),
        check("past:one.jsonl", -0.03, -0.09, 0.03, -0.05, "unclear"),
    ]
    promote(root, 1, None, now - 13 * DAY, why="the first model that beats the base")
    promote(root, 2, 1, now - 9 * DAY, why="more rows of the standard library", checks=past[:2])
    promote(
        root,
        3,
        2,
        now - 5 * DAY,
        why=HOSTILE,
        checks=[*past, check("answer_nll", 0.1, 0.0, 0.2, -0.05)],
        regions=[check("region:numpy", 0.31, 0.22, 0.4, 0.0)],
    )
    promote(root, 2, 3, now - 4 * DAY, why="answers about dates were wrong", move="rollback")
    promote(root, 3, 2, now - 3 * DAY, why=f"it was the client {HOSTILE}", checks=past)


def check(
    name: str, mean: float, low: float, high: float, wanted: float, result: str = "pass"
) -> dict[str, Any]:
    return {
        "name": name,
        "metric": "exact_match",
        "rows": 300,
        "mean": mean,
        "low": low,
        "high": high,
        "wanted": wanted,
        "result": result,
        "reason": "…",
    }


def promote(
    root: Path,
    version: int,
    before: int | None,
    at: float,
    *,
    why: str,
    move: str = "promote",
    checks: list[Any] | None = None,
    regions: list[Any] | None = None,
) -> None:
    gate = {
        "verdict": "promote",
        "reasons": ["it is better"],
        "rival": {"model": "champion" if before else "base", "version": before},
        "candidate": {"run_key": "k" * 32, "adapter_sha256": "a" * 64},
        "checks": checks or [],
        "regions": regions or [],
        "at": at,
    }  # `at`, so that there is something to commit
    write_files(root, {"reports/gate.json": json.dumps(gate)})
    entry = Champion(
        name="pydoc-helper",
        version=version,
        previous=before,
        commit=commit(root, f"Retrain v{version}"),
        run_key="k" * 32,
        run_id="r" * 32,
        adapter_sha256="a" * 64,
        batches=["one.jsonl", "two.jsonl"],
        data={"rows": 4200 * version, "batches": version, "dvc": "d.dir"},
        gate={
            "verdict": "promote",
            "rival": before,
            "metric": "exact_match",
            "mean": 0.2,
            "low": 0.1,
            "high": 0.3,
        },
        at=text_of(at),
        by="Ana",
        why=why,
        move=move,
        replaced=before,
    )
    write_champion(root, entry)
    commit(root, f"{move} v{version}")


def write_traffic(root: Path, now: float) -> None:
    """A request each 20 minutes, of every sixth a score; v4 answers every fourth in the newest day."""
    log = open_log(root, CONFIG)
    for number in range(13 * 72):
        at = now - 60 - number * 1200
        version = (
            1 if number > 9 * 72 else 2 if number > 5 * 72 else 4 if number < 72 and not number % 4 else 3
        )
        arm, status = ("challenger" if version == 4 else "champion"), (500 if number % 90 == 7 else 200)
        log.put(
            Logged(
                f"q{number}",
                at,
                f"u{number % 70}",
                arm,
                version,
                messages=(("user", HOSTILE),),
                answer="json",
                status=status,
                latency_ms=200.0 + number % 50,
            )
        )
        if not number % 6:
            log.add_feedback(Feedback(f"q{number}", "ana", at, score=float(number % 10 < 4 + version)))
    assert log.flush(20)
    log.close()


def write_verdicts(root: Path, now: float) -> None:
    """Sixty, the newest with all that a verdict holds; then a line that is half written."""
    pictures = kept_pictures()
    KeptPictures(root).keep(pictures)
    lines: list[dict[str, Any]] = [
        {
            "at": text_of(now - hour * HOUR),
            "verdict": "no drift",
            "version": 3,
            "rows": 500,
            "p": 0.05 + (hour * 37 % 95) / 100,
        }
        for hour in range(60, 3, -1)
    ]
    lines[0] |= {"verdict": "too few", "p": None, "rows": 80, "needed": 200}
    newest = {
        "at": text_of(now - HOUR),
        "version": 3,
        "verdict": "drift",
        "p": 0.0004,
        "rows": 500,
        "columns": [
            {"name": "unseen words", "family": "novelty", "value": 0.21, "reference": 0.06, "p": 0.0004},
            {"name": "characters", "value": 61.0, "reference": 58.2, "p": 0.3},
        ],
        "topics": [
            {
                "name": "numpy, array",
                "terms": ["numpy"],
                "share": 0.18,
                "reference_share": 0.004,
                "examples": ["a contiguous array?", HOSTILE, "long " * 200],
                "pictures": [
                    *({"name": name, "looks": "240x160 pixels, bright, colourful"} for name in pictures),
                    {"name": f"{'0' * 64}.png", "looks": f"1x1 pixels, dark, {HOSTILE}"},
                ],
            }
        ],
        "pictures": [{"name": HOSTILE, "looks": "640x480 pixels, dark, grey"}],
        "missing": ["answers: the champion has no answers on record"],
        "report": REPORT,
        "decision": {
            "retrain": False,
            "for": ["drift on 500 requests"],
            "against": ["120 new rows, wanted 200"],
        },
    }
    path = root / VERDICTS
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, newest]) + '{"at": "2026-', encoding="utf-8"
    )


def kept_pictures() -> dict[str, bytes]:
    """Return two pictures of requests, which the checkout keeps, by name."""
    drawn = {}
    for colour in ("teal", "orange"):
        stored = io.BytesIO()
        picture = Image.new("RGB", (240, 160), "white")
        ImageDraw.Draw(picture).ellipse((60, 20, 180, 140), fill=colour)
        picture.save(stored, "PNG")
        drawn[f"{hashlib.sha256(stored.getvalue()).hexdigest()}.png"] = stored.getvalue()
    return drawn


def write_rollouts(root: Path, now: float) -> None:
    bounds = {
        "feedback": (0.118, -0.012, 0.248),
        "errors": (0.001, -0.006, 0.008),
        "empty": (-0.004, -0.009, -0.001),
        "latency": (0.3, 0.25, 0.4),
    }
    measures = {
        name: {
            kind: {"mean": mean, "low": low, "high": high, "champion": 412, "challenger": 139}
            for kind in ("gain", "harm", "pass")
        }
        for name, (mean, low, high) in bounds.items()
    }
    usual = Rollout(
        id="open",
        name="pydoc-helper",
        version=4,
        champion=3,
        commit="c" * 40,
        adapter_sha256="a" * 64,
        salt="s",
        step=1,
        shares=[0.05, 0.25, 0.5, 1.0],
        state="open",
        opened=now - DAY,
        step_since=now - 8 * HOUR,
        why="about 160 more users' feedback",
        last={
            "measures": measures,
            "steps": [
                {"step": 0, "champion": 180, "challenger": 11},
                {"step": 1, "champion": 232, "challenger": 128},
            ],
        },
    )
    for number, (version, state) in enumerate([(2, "promoted"), (3, "rolled_back"), (3, "no_evidence")]):
        end_rollout(
            root,
            msgspec.structs.replace(
                usual,
                id=str(number),
                version=version,
                champion=version - 1,
                state=state,
                why=HOSTILE,
                ended=now - (9 - number) * DAY,
            ),
        )
    write_rollout(root, usual)
