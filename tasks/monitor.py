"""Compare a window of the request log with the data that the champion was trained and tested on, and decide
whether to retrain.

This is a task of the flow `monitor`, not a stage, because the request log is no versioned file. The reference
comes from the champion's own commit, so it changes with the champion. Not covered: the turns of a
conversation before its last question, and what recordings say (only how they sound).
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ratchet.config.params import Config
from ratchet.data.examples import Example, normalise, read_examples
from ratchet.data.words import terms_of
from ratchet.files import own_files, sha256_file, whole_folder, write_bytes, write_json
from ratchet.media.store import FOLDER as MEDIA
from ratchet.media.store import MediaStore
from ratchet.monitoring.drift import PROMPTS, judge
from ratchet.monitoring.families import LEAST_PROMPTS, Answered, Question, Reference, all_families, by_prompt
from ratchet.monitoring.novelty import Familiar
from ratchet.monitoring.picture_features import FILE as FEATURES
from ratchet.monitoring.picture_features import read_features
from ratchet.monitoring.pictures import (
    CONTENT,
    FAMILY,
    SHOWN,
    Look,
    farthest,
    look_at_all,
    show,
    told,
    with_features,
)
from ratchet.monitoring.request_records import Feedback, Logged
from ratchet.monitoring.sounds import hear_all
from ratchet.monitoring.topics import find_topics
from ratchet.monitoring.verdicts import VERDICTS, Decision, Quality, Recorded, Topic, Verdict
from ratchet.pipeline.integrity import MANIFEST, is_whole
from ratchet.pipeline.workspace import get_output
from ratchet.promotion.champion import Champion

FOLDER = Path(".ratchet/monitor")
LOOKS, HEARD = "pictures.json", "sounds.json"
MOST_PICTURES = 2000  # of each side, and recordings; measuring one takes about 10 ms
NOT_TAUGHT = {"errors", "latency"}  # families of columns that no training can improve

LEAST_NEW = 20  # labelled rows that a retraining needs at least, however few the champion has seen


class Looks(msgspec.Struct, frozen=True):
    """How the champion's rows look, or sound; the content of LOOKS or HEARD in a reference's folder."""

    held_out: list[Look]
    trained: list[Look]


class Facts(NamedTuple):
    """What a decision depends on besides the verdict; `_week` means the last seven days."""

    new_rows: int | None  # None: not counted, because there is no drift
    retrains_week: int
    gpu_hours_week: float
    hours_since_retrain: float | None
    rollout_of: int | None = None  # the version with an open rollout
    under_way: bool = False  # whether a retraining is running
    known_rows: int | None = None  # rows of the batches that the champion has seen


def read_reference(root: Path, config: Config, champion: Champion) -> Reference:
    """Read the champion's reference, which is fetched once per champion and then kept; if damaged, again.

    Raises CommandError when the data of the champion's commit cannot be fetched.
    """
    folder = root / FOLDER / f"reference-v{champion.version}-{champion.commit[:8]}"
    if not is_whole(folder):
        for old in (root / FOLDER).glob("reference-*"):
            shutil.rmtree(old, ignore_errors=True)
        with whole_folder(folder) as filling:
            for path in ("data/prepared", "reports/evaluation"):
                get_output(root, champion.commit, path, filling / Path(path).name)
            for file, looks in _look_at(filling / "prepared").items():
                write_bytes(filling / file, [msgspec.json.encode(looks)])
            kept = [path for path in sorted(filling.rglob("*")) if path.is_file()]
            files = {path.relative_to(filling).as_posix(): sha256_file(path) for path in kept}
            write_json(filling / MANIFEST, {"files": files})
    own_files(folder)  # DVC's cache may have given links, in earlier releases as well
    return load_reference(folder / "prepared", folder / "evaluation")


def load_reference(prepared: Path, evaluation: Path) -> Reference:
    import pandas as pd

    training = [row.question for row in read_examples(prepared / "train.jsonl")]
    asked = dict.fromkeys(Question(row.question, row.media) for row in _held_out(prepared))
    prompts = [question.prompt for question in asked]
    looks, heard = (
        msgspec.json.decode((prepared.parent / name).read_bytes(), type=Looks)
        if (prepared.parent / name).exists()  # references of older releases have none
        else Looks([], [])
        for name in (LOOKS, HEARD)
    )
    seen = read_features(evaluation / FEATURES)
    scores = pd.read_parquet(evaluation / "scores.parquet")
    own = scores[scores.model == "candidate"]
    surprise = own.prompt_nll if "prompt_nll" in own else [None] * len(own)
    answers = [Answered(answer, _finite(asked)) for answer, asked in zip(own.answer, surprise, strict=True)]
    return Reference(
        Familiar(training),
        training,
        prompts,
        answers,
        with_features(looks.held_out, seen.held_out),
        with_features(looks.trained, seen.trained),
        heard.held_out,
        heard.trained,
    )


def _held_out(prepared: Path) -> Iterator[Example]:
    for split in ("validation", "test"):
        yield from read_examples(prepared / f"{split}.jsonl")


def _look_at(prepared: Path) -> dict[str, Looks]:
    """Measure the pictures and the recordings of the champion's rows, which is done once per champion."""
    media = MediaStore.read(prepared / MEDIA)
    held_out, trained = (
        {name for row in rows for name in row.media}
        for rows in (_held_out(prepared), read_examples(prepared / "train.jsonl"))
    )
    return {
        file: Looks(measure_all(media, held_out, MOST_PICTURES), measure_all(media, trained, MOST_PICTURES))
        for file, measure_all in ((LOOKS, look_at_all), (HEARD, hear_all))
    }


def measure(
    window: list[Logged],
    feedback: dict[str, list[Feedback]],
    earlier: list[Logged],
    reference: Reference,
    config: Config,
) -> Verdict:
    """Measure the window.

    A repeated question counts once among prompts and answers, because a hundred people who ask the same
    question are no new subject.
    """
    monitor, prompts = config.monitor, list(by_prompt(window))
    too_few = Verdict("too few", None, len(window), len(prompts), monitor.min_prompts)
    if window and not any(request.messages for request in window):
        return msgspec.structs.replace(
            too_few,
            missing=["the request log keeps no texts (request_log.texts): prompts cannot be compared"],
        )
    if len(reference.prompts) < LEAST_PROMPTS:
        return msgspec.structs.replace(
            too_few,
            missing=[
                f"the champion has {len(reference.prompts)} validation and test rows to compare "
                f"with; wanted {LEAST_PROMPTS}"
            ],
        )
    if len(prompts) < monitor.min_prompts:
        return too_few
    families, missing = all_families(window, feedback, earlier, reference, monitor)
    found = judge(families, rate=monitor.false_alarm_rate, resamples=monitor.resamples, seed=monitor.seed)
    topics: list[Topic] = []
    if found.drift and set(found.moved) & set(PROMPTS):
        topics = find_topics(
            [question.prompt for question in prompts],
            reference.prompts,
            reference.training,
            most=monitor.topics,
            seed=monitor.seed,
        )
        shown = [(normalise(request.prompt), request.pictures) for request in window if request.pictures]
        topics = [show(topic, shown) for topic in topics]
    return Verdict(
        "drift" if found.drift else "no drift",
        found.p,
        len(window),
        len(prompts),
        monitor.min_prompts,
        found.columns,
        topics,
        missing,
        found.moved,
        told(_examples(window, reference, found.moved) if found.drift else []),
    )


def _examples(window: list[Logged], reference: Reference, moved: list[str]) -> list[Look]:
    """Choose pictures to show if those of the window differ: by what they show, if that differs."""
    if not {CONTENT, FAMILY} & set(moved):
        return []
    looks = (look for request in window for look in request.pictures)
    return farthest(looks, reference.trained_pictures, SHOWN, by_content=CONTENT in moved)


def with_quality(verdict: Verdict, quality: Quality | None) -> Verdict:
    """Add what is known of the quality: if the share of right answers fell, the verdict is drift."""
    if quality is None or not quality.alarm:
        return msgspec.structs.replace(verdict, quality=quality)
    return msgspec.structs.replace(
        verdict, verdict="drift", moved=["quality", *verdict.moved], quality=quality
    )


def decide(verdict: Verdict, facts: Facts, config: Config) -> Decision:
    """Decide whether to retrain, and give each reason with its figure.

    Retraining needs drift in something that training can change, enough new labelled rows, budget left, the
    cool-down over, and neither a retraining nor a rollout under way.
    """
    monitor = config.monitor
    reasons = [*verdict.missing, f"{verdict.distinct} distinct prompts, wanted {verdict.needed}"]
    said = (
        reasons[0]
        if verdict.p is None
        else f"p = {verdict.p:.4f}, monitor.false_alarm_rate {monitor.false_alarm_rate:g}"
    )
    if verdict.quality and verdict.quality.alarm:
        said = verdict.quality.describe()
    since = facts.hours_since_retrain
    moved = ", ".join(verdict.moved)
    wanted = monitor.min_new_rows
    if facts.known_rows is not None:
        # A tenth of the known rows is enough where that is fewer, so that a small project can retrain.
        wanted = min(wanted, max(LEAST_NEW, facts.known_rows // 10))
    checks = [
        (
            verdict.verdict == "drift",
            f"the verdict is {verdict.verdict} ({said})" + (f": {moved}" if moved else ""),
        ),
        (monitor.retrain, f"monitor.retrain is {str(monitor.retrain).lower()}"),
        (
            facts.retrains_week < monitor.max_retrains_per_week,
            f"{facts.retrains_week} retrainings in seven days, monitor.max_retrains_per_week "
            f"{monitor.max_retrains_per_week}",
        ),
        (
            facts.gpu_hours_week < monitor.max_gpu_hours_per_week,
            f"{facts.gpu_hours_week:.2f} h of training in seven days, monitor.max_gpu_hours_per_week "
            f"{monitor.max_gpu_hours_per_week:g}",
        ),
        (
            since is None or since >= monitor.cooldown_hours,
            "no retraining before"
            if since is None
            else f"{since:.1f} h since the last retraining, "
            f"monitor.cooldown_hours {monitor.cooldown_hours:g}",
        ),
    ]
    if facts.new_rows is not None:
        told = (
            f"monitor.min_new_rows {wanted}"
            if wanted == monitor.min_new_rows
            else f"wanted {wanted}, as it has seen {facts.known_rows} (monitor.min_new_rows)"
        )
        seen = f"{facts.new_rows} labelled rows that the champion has not seen, {told}"
        checks.insert(2, (facts.new_rows >= wanted, seen))
    if facts.under_way:
        checks.append((False, "a retraining is under way, which may end the drift"))
    if facts.rollout_of is not None:
        checks.append((False, f"the rollout of v{facts.rollout_of} is open, which may end the drift"))
    if verdict.verdict == "drift" and set(verdict.moved) <= NOT_TAUGHT:
        checks.append((False, f"only {moved} moved, which no training can improve"))
    return Decision(
        all(fine for fine, _ in checks),
        [words for fine, words in checks if fine],
        [words for fine, words in checks if not fine],
    )


def append_verdict(
    root: Path, champion: Champion, verdict: Verdict, decision: Decision, folder: Path | None
) -> Recorded:
    """Append the verdict and the decision to verdicts.jsonl as one line, and return that record."""
    found = Recorded(
        **msgspec.structs.asdict(verdict),
        at=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        version=champion.version,
        decision=decision,
        report=str(folder.relative_to(root)) if folder else None,
    )
    (root / VERDICTS).parent.mkdir(parents=True, exist_ok=True)
    with (root / VERDICTS).open("ab") as out:
        out.write(msgspec.json.encode(found) + b"\n")
    return found


def write_report(verdict: Verdict, reference: Reference, window: list[Logged], folder: Path) -> Path:
    """Write Evidently's report.html and report.json and our verdict.json, and return the folder.

    Evidently tests its columns by its own methods; the verdict does not depend on them.
    """
    asked = by_prompt(window)
    answers = [
        Answered(request.answer, request.prompt_nll) for request in asked.values() if request.status == 200
    ]
    with whole_folder(folder) as filling:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of Evidently's dependencies
            _evidently(
                _table([question.prompt for question in asked], answers, reference.familiar),
                _table(reference.prompts, reference.answers, reference.familiar),
                filling,
            )
        write_json(filling / "verdict.json", msgspec.to_builtins(verdict))
    return folder


def _table(prompts: list[str], answers: list[Answered], familiar: Familiar) -> Any:
    """Build Evidently's table, one line per prompt or answer.

    A line's prompt and answer may belong to different rows, so only whole columns can be compared.
    """
    import pandas as pd

    asked = {
        "characters": [len(text) for text in prompts],
        "words": [len(terms_of(text)) for text in prompts],
        **familiar.columns(prompts),
    }
    told = {
        "answer characters": [len(one.answer) for one in answers],
        "answer words": [len(terms_of(one.answer)) for one in answers],
        "empty answers": [float(not one.answer.strip()) for one in answers],
        "prompt NLL": [one.prompt_nll for one in answers],
    }
    return pd.concat([pd.DataFrame(asked, dtype=float), pd.DataFrame(told, dtype=float)], axis=1)


def _evidently(current: Any, reference: Any, folder: Path) -> None:
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset, DataSummaryPreset

    told = [name for name in current.columns if current[name].notna().any() and reference[name].notna().any()]
    definition = DataDefinition(numerical_columns=told)
    sides = [Dataset.from_pandas(table[told], data_definition=definition) for table in (current, reference)]
    found = Report([DataDriftPreset(), DataSummaryPreset()]).run(*sides)
    found.save_html(str(folder / "report.html"))
    found.save_json(str(folder / "report.json"))


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
