"""Measure a window of the request log against what the champion was trained and tested on, and decide whether it is worth a retraining.

A flow's task, not a stage: the traffic is no file. The reference comes from the champion's own commit, so that it is right for whoever
is in charge. Not covered: images, and conversations beyond their last question.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from ratchet.config.params import Config
from ratchet.config.serving import MonitorConfig
from ratchet.data.examples import normalise, read_examples
from ratchet.files import whole_folder, write_json
from ratchet.monitoring.drift import PROMPTS, Family, Measure, Verdict, higher, judge, lower, mix, novelty, other, subjects
from ratchet.monitoring.novelty import Familiar, words_of
from ratchet.monitoring.request_log import Feedback, Logged
from ratchet.monitoring.topics import find_topics
from ratchet.pipeline.workspace import dvc
from ratchet.promotion.champion import Champion
from ratchet.regions import Topic

FOLDER = Path(".ratchet/monitor")
VERDICTS = FOLDER / "verdicts.jsonl"
LEAST_ROWS = 30  # rows of a side under which a family is left out
MOST_ROWS = 5000  # rows of a reference; at ten times the window, more would add nothing but time
Row = TypeVar("Row")
NOT_TAUGHT = {"errors", "latency"}  # families that no training mends
REFUSALS = ("i cannot", "i can't", "i am unable", "i'm unable", "i'm sorry", "i am sorry", "as an ai")


class Answered(NamedTuple):
    """One answer of the champion: in the window, or on its own test rows. (The NLL of answers has no reference: tests score the right ones.)"""

    answer: str
    prompt_nll: float | None


class Reference(NamedTuple):
    """What the champion knows: prompts it was trained on, prompts like its traffic was when it was tested, and how it answered them."""

    familiar: Familiar
    training: list[str]
    prompts: list[str]
    answers: list[Answered]


class Facts(NamedTuple):
    """What a decision is made from, beside the verdict."""

    new_rows: int
    retrains_week: int
    gpu_hours_week: float
    hours_since_retrain: float | None
    rollout_of: int | None = None  # the version that is tried on users already
    under_way: bool = False  # a retraining


class Decision(NamedTuple):
    retrain: bool
    for_: list[str]
    against: list[str]


def read_reference(root: Path, config: Config, champion: Champion) -> Reference:
    """Fetched once a champion. Raises CommandError when its commit's data cannot be had."""
    folder = root / FOLDER / f"reference-v{champion.version}-{champion.commit[:8]}"
    if not folder.exists():
        for old in (root / FOLDER).glob("reference-*"):
            shutil.rmtree(old, ignore_errors=True)
        with whole_folder(folder) as filling:
            for path in ("data/prepared", "reports/evaluation"):
                dvc(root, "get", "--quiet", ".", path, "--rev", champion.commit, "--out", str(filling / Path(path).name))
    return load_reference(folder / "prepared", folder / "evaluation")


def load_reference(prepared: Path, evaluation: Path) -> Reference:
    import pandas as pd

    training = [row.question for row in read_examples(prepared / "train.jsonl")]
    prompts = [row.question for split in ("validation", "test") for row in read_examples(prepared / f"{split}.jsonl")]
    scores = pd.read_parquet(evaluation / "scores.parquet")
    own = scores[scores.model == "candidate"]
    surprise = own.prompt_nll if "prompt_nll" in own else [None] * len(own)
    answers = [Answered(answer, _finite(asked)) for answer, asked in zip(own.answer, surprise, strict=True)]
    return Reference(Familiar(training), training, list(dict.fromkeys(prompts)), answers)


def measure(window: list[Logged], feedback: dict[str, list[Feedback]], earlier: list[Logged], reference: Reference, config: Config) -> Verdict:
    """A question that was asked many times counts once among prompts and answers: a hundred people with one question are no new subject."""
    monitor, prompts = config.monitor, list(by_prompt(window))
    too_few = Verdict("too few", None, len(window), len(prompts), monitor.min_prompts)
    if window and not any(request.messages for request in window):
        return msgspec.structs.replace(too_few, missing=["the request log keeps no texts (request_log.texts): prompts cannot be compared"])
    if len(reference.prompts) < LEAST_ROWS:
        return msgspec.structs.replace(too_few, missing=[f"the champion has {len(reference.prompts)} validation and test rows to compare with; wanted {LEAST_ROWS}"])
    if len(prompts) < monitor.min_prompts:
        return too_few
    families, missing = all_families(window, feedback, earlier, reference, monitor)
    found = judge(families, rate=monitor.false_alarm_rate, resamples=monitor.resamples, seed=monitor.seed)
    topics: list[Topic] = []
    if found.drift and set(found.moved) & set(PROMPTS):
        topics = find_topics(prompts, reference.prompts, reference.training, most=monitor.topics, seed=monitor.seed)
    return Verdict("drift" if found.drift else "no drift", found.p, len(window), len(prompts), monitor.min_prompts, found.columns, topics, missing, found.moved)


def all_families(window: list[Logged], feedback: dict[str, list[Feedback]], earlier: list[Logged], reference: Reference, monitor: MonitorConfig) -> tuple[list[Family], list[str]]:
    """Those that have a reference, and why the others have none."""
    asked = by_prompt(window)
    families = input_families(list(asked), reference.prompts, reference.familiar, monitor)
    others = [*answer_families(asked, reference, monitor), *service_families(window, feedback, earlier, monitor.latency_margin)]
    return [*families, *(one for one in others if isinstance(one, Family))], [one for one in others if isinstance(one, str)]


def by_prompt(window: list[Logged]) -> dict[str, Logged]:
    """Each prompt with the newest request that was answered, or the newest of all."""
    found: dict[str, Logged] = {}
    for request in window:
        prompt = normalise(request.prompt)
        if prompt and (prompt not in found or request.status == 200 or found[prompt].status != 200):
            found[prompt] = request
    return found


def input_families(prompts: list[str], reference: list[str], familiar: Familiar, monitor: MonitorConfig) -> list[Family]:
    """What is asked: new subjects, less familiar words, other lengths, known subjects in another mix."""
    before, window = _at_most(reference, monitor.seed), len(prompts)
    texts = [*prompts, *before]
    columns = familiar.columns(texts)
    rarity = columns.pop("rarity")
    form = [
        other("prompt length (log characters)", np.log([max(1, len(text)) for text in texts]), window),
        subjects("mix of known subjects", familiar.words(texts), familiar.subjects(texts), window),
    ]
    families = {"novelty": [novelty(rarity, familiar.stems(texts), window)], "surprise": [higher(name, values, window) for name, values in columns.items()], "form and mix": form}
    return [Family(name, window, len(before), measures) for name, measures in families.items()]


def answer_families(asked: dict[str, Logged], reference: Reference, monitor: MonitorConfig) -> list[Family | str]:
    """How it is answered, and how the prompts surprise the model itself, against the champion's own test rows."""
    mine = [Answered(request.answer, request.prompt_nll) for request in asked.values() if request.status == 200]
    theirs = _at_most(reference.answers, monitor.seed)
    both, size = [*mine, *theirs], len(mine)
    if min(size, len(theirs)) < LEAST_ROWS:
        return [f"answers: {size} in this window and {len(theirs)} of the champion's test rows; wanted {LEAST_ROWS}"]
    measures = [
        other("answer length (log characters)", np.array([math.log1p(len(one.answer)) for one in both]), size),
        mix("mix of answers", _kinds([one.answer for one in both]), size),
        higher("empty answers", np.array([float(not one.answer.strip()) for one in both]), size),
        higher("refusals", np.array([float(one.answer.lower().startswith(REFUSALS)) for one in both]), size),
    ]
    surprise = [[one.prompt_nll for one in side if one.prompt_nll is not None] for side in (mine, theirs)]
    return [Family("answers", size, len(theirs), measures), _one_column("prompt NLL", "prompt NLL (nats a token)", higher, surprise[0], surprise[1])]


def _kinds(answers: list[str]) -> Any:
    """Whole short answers, else their first word: labels stay labels, prose is told by how it begins."""
    names = [answer.strip().lower() if len(answer) <= 40 else " ".join(words_of(answer)[:1]) for answer in answers]
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def service_families(window: list[Logged], feedback: dict[str, list[Feedback]], earlier: list[Logged], latency_margin: float) -> list[Family | str]:
    """Feedback (a value a user), errors and latency (one a request that has it), against the same champion's earlier traffic.

    One busy hour is slower than the next: latency has to be higher by a margin, a share of what it was.
    """
    scores = [_by_user(side, feedback) for side in (window, earlier)]
    failed = [[float(one.status >= 500) for one in side] for side in (window, earlier)]
    waited = [[math.log1p(one.latency_ms) for one in side if one.status == 200] for side in (window, earlier)]
    return [
        _one_column("feedback", "feedback", lower, *scores),
        _one_column("errors", "errors", higher, *failed),
        _one_column("latency", "latency (log ms)", partial(higher, margin=math.log1p(latency_margin)), *waited),
    ]


def _one_column(family: str, name: str, measured: Callable[[str, Any, int], Measure], window: list[float], before: list[float]) -> Family | str:
    if min(len(window), len(before)) < LEAST_ROWS:
        return f"{family}: {len(window)} in this window and {len(before)} to compare with; wanted {LEAST_ROWS}"
    return Family(family, len(window), len(before), [measured(name, np.array([*window, *before]), len(window))])


def _at_most(rows: list[Row], seed: int) -> list[Row]:
    """MOST_ROWS of them, drawn; all where they are fewer."""
    if len(rows) <= MOST_ROWS:
        return rows
    return [rows[place] for place in sorted(np.random.default_rng(seed).choice(len(rows), MOST_ROWS, replace=False))]


def _by_user(requests: list[Logged], feedback: dict[str, list[Feedback]]) -> list[float]:
    """The mean score of each user's requests: thirty votes of one person are one opinion."""
    scores: dict[str, list[float]] = {}
    for request in requests:
        scores.setdefault(request.user or request.id, []).extend(said.score for said in feedback.get(request.id, []) if said.score is not None)
    return [sum(found) / len(found) for found in scores.values() if found]


def decide(verdict: Verdict, facts: Facts, config: Config) -> Decision:
    """Drift in something that training can change, enough labelled rows, budget and cool-down; each reason with its figure."""
    monitor = config.monitor
    reasons = [*verdict.missing, f"{verdict.distinct} distinct prompts, wanted {verdict.needed}"]
    said = reasons[0] if verdict.p is None else f"p = {verdict.p:.4f}, monitor.false_alarm_rate {monitor.false_alarm_rate:g}"
    since = facts.hours_since_retrain
    moved = ", ".join(verdict.moved)
    checks = [
        (verdict.verdict == "drift", f"{verdict.verdict} ({said})" + (f": {moved}" if moved else "")),
        (monitor.retrain, f"monitor.retrain is {str(monitor.retrain).lower()}"),
        (facts.new_rows >= monitor.min_new_rows, f"{facts.new_rows} labelled rows that the champion has not seen, monitor.min_new_rows {monitor.min_new_rows}"),
        (facts.retrains_week < monitor.max_retrains_per_week, f"{facts.retrains_week} retrainings in seven days, monitor.max_retrains_per_week {monitor.max_retrains_per_week}"),
        (
            facts.gpu_hours_week < monitor.max_gpu_hours_per_week,
            f"{facts.gpu_hours_week:.2f} h of training in seven days, monitor.max_gpu_hours_per_week {monitor.max_gpu_hours_per_week:g}",
        ),
        (
            since is None or since >= monitor.cooldown_hours,
            "no retraining before" if since is None else f"{since:.1f} h since the last retraining, monitor.cooldown_hours {monitor.cooldown_hours:g}",
        ),
    ]
    if facts.under_way:
        checks.append((False, "a retraining is under way: it may be the cure"))
    if facts.rollout_of is not None:
        checks.append((False, f"the rollout of v{facts.rollout_of} is open: it may be the cure"))
    if verdict.verdict == "drift" and set(verdict.moved) <= NOT_TAUGHT:
        checks.append((False, f"only {moved} moved, which no training mends"))
    return Decision(all(fine for fine, _ in checks), [words for fine, words in checks if fine], [words for fine, words in checks if not fine])


def append_verdict(root: Path, champion: Champion, verdict: Verdict, decision: Decision, folder: Path | None) -> dict[str, Any]:
    """One line more in verdicts.jsonl; what it says."""
    found = {
        "at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "version": champion.version,
        **msgspec.to_builtins(verdict),
        "decision": {"retrain": decision.retrain, "for": decision.for_, "against": decision.against},
        "report": str(folder.relative_to(root)) if folder else None,
    }
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    with (root / VERDICTS).open("ab") as out:
        out.write(msgspec.json.encode(found) + b"\n")
    return found


def write_report(verdict: Verdict, reference: Reference, window: list[Logged], folder: Path) -> Path:
    """report.html and report.json by Evidently (its own methods, on the same columns), and verdict.json. Returns the folder."""
    asked = by_prompt(window)
    answers = [Answered(request.answer, request.prompt_nll) for request in asked.values() if request.status == 200]
    with whole_folder(folder) as filling:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Evidently's own dependencies
            _evidently(_table(list(asked), answers, reference.familiar), _table(reference.prompts, reference.answers, reference.familiar), filling)
        write_json(filling / "verdict.json", msgspec.to_builtins(verdict))
    return folder


def _table(prompts: list[str], answers: list[Answered], familiar: Familiar) -> Any:
    """Prompts and answers are of different rows in the reference: every column stands for itself."""
    import pandas as pd

    asked = {"characters": [len(text) for text in prompts], "words": [len(words_of(text)) for text in prompts], **familiar.columns(prompts)}
    told = {
        "answer characters": [len(one.answer) for one in answers],
        "answer words": [len(words_of(one.answer)) for one in answers],
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
