"""Measure a window of the request log against what the champion was trained and tested on, and decide whether it is worth a retraining.

A flow's task, not a stage: the traffic is no file. The reference comes from the champion's own commit, so that it is right for whoever
is in charge. Not covered: images, and conversations beyond their last question.
"""

from __future__ import annotations

import math
import shutil
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from ratchet.champion import Champion
from ratchet.config import Config, MonitorConfig
from ratchet.drift import Family, Verdict, higher, judge, lower, mix, novelty, other, subjects
from ratchet.examples import normalise, read_examples
from ratchet.files import whole_folder, write_json
from ratchet.regions import Topic
from ratchet.request_log import Feedback, Logged
from ratchet.surprise import Familiar, words_of
from ratchet.topics import find_topics
from ratchet.workspace import dvc

FOLDER = Path(".ratchet/monitor")
VERDICTS = FOLDER / "verdicts.jsonl"
LEAST_ROWS = 30  # rows of a side under which a family is left out
MOST_ROWS = 5000  # rows of a reference; at ten times the window, more would add nothing but time
Row = TypeVar("Row")
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
    too_few = Verdict("too few", None, len(window), len(prompts), monitor.min_requests)
    if window and not any(request.messages for request in window):
        return msgspec.structs.replace(too_few, missing=["the request log keeps no texts (request_log.texts): prompts cannot be compared"])
    if len(reference.prompts) < LEAST_ROWS:
        return msgspec.structs.replace(too_few, missing=[f"the champion has {len(reference.prompts)} validation and test rows to compare with; wanted {LEAST_ROWS}"])
    if len(prompts) < monitor.min_requests:
        return too_few
    families, missing = all_families(window, feedback, earlier, reference, monitor)
    verdict, p, columns = judge(families, rate=monitor.false_alarm_rate, resamples=monitor.resamples, seed=monitor.seed)
    topics: list[Topic] = []
    if verdict == "drift":
        topics = find_topics(prompts, reference.prompts, reference.training, most=monitor.topics, seed=monitor.seed)
    return Verdict(verdict, p, len(window), len(prompts), monitor.min_requests, columns, topics, missing)


def all_families(window: list[Logged], feedback: dict[str, list[Feedback]], earlier: list[Logged], reference: Reference, monitor: MonitorConfig) -> tuple[list[Family], list[str]]:
    """Those that have a reference, and why the others have none."""
    asked = by_prompt(window)
    families, missing = input_families(list(asked), reference.prompts, reference.familiar, monitor), []
    for name, family in (("answers", answer_family(asked, reference, monitor)), ("service", service_family(window, feedback, earlier))):
        if isinstance(family, Family):
            families.append(family)
        else:
            missing.append(f"{name}: {family}")
    return families, missing


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


def answer_family(asked: dict[str, Logged], reference: Reference, monitor: MonitorConfig) -> Family | str:
    """How it is answered, against the champion's answers on its own test rows; or why that cannot be told."""
    mine = [Answered(request.answer, request.prompt_nll) for request in asked.values() if request.status == 200]
    theirs = _at_most(reference.answers, monitor.seed)
    if min(len(mine), len(theirs)) < LEAST_ROWS:
        return f"{len(mine)} answers and {len(theirs)} of the reference; wanted {LEAST_ROWS}"
    both, size = [*mine, *theirs], len(mine)
    measures = [
        other("answer length (log characters)", np.array([math.log1p(len(one.answer)) for one in both]), size),
        mix("mix of answers", _kinds([one.answer for one in both]), size),
        higher("empty answers", np.array([float(not one.answer.strip()) for one in both]), size),
        higher("refusals", np.array([float(one.answer.lower().startswith(REFUSALS)) for one in both]), size),
    ]
    surprise = np.array([math.nan if one.prompt_nll is None else one.prompt_nll for one in both])
    if _is_told(surprise, size):
        measures.append(higher("prompt NLL (nats a token)", surprise, size))
    return Family("answers", size, len(theirs), measures)


def _kinds(answers: list[str]) -> Any:
    """Whole short answers, else their first word: labels stay labels, prose is told by how it begins."""
    names = [answer.strip().lower() if len(answer) <= 40 else " ".join(words_of(answer)[:1]) for answer in answers]
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def service_family(window: list[Logged], feedback: dict[str, list[Feedback]], earlier: list[Logged]) -> Family | str:
    """Errors, latency and feedback against the same champion's earlier traffic."""
    if min(len(window), len(earlier)) < LEAST_ROWS:
        return f"{len(earlier)} earlier requests to this champion; wanted {LEAST_ROWS}"
    both, size = [*window, *earlier], len(window)
    measures = [higher("errors", np.array([float(one.status >= 500) for one in both]), size)]
    latency = np.array([math.log1p(one.latency_ms) if one.status == 200 else math.nan for one in both])
    if _is_told(latency, size):
        measures.append(higher("latency (log ms)", latency, size))
    scores = np.array([_score(feedback.get(one.id, [])) for one in both])
    if _is_told(scores, size):
        measures.append(lower("feedback", scores, size))
    return Family("service", size, len(earlier), measures)


def _is_told(values: Any, size: int) -> bool:
    """Whether both sides have values enough."""
    told = ~np.isnan(values)
    return bool(min(told[:size].sum(), told[size:].sum()) >= LEAST_ROWS)


def _at_most(rows: list[Row], seed: int) -> list[Row]:
    """MOST_ROWS of them, drawn; all where they are fewer."""
    if len(rows) <= MOST_ROWS:
        return rows
    return [rows[place] for place in sorted(np.random.default_rng(seed).choice(len(rows), MOST_ROWS, replace=False))]


def _score(feedback: list[Feedback]) -> float:
    scores = [said.score for said in feedback if said.score is not None]
    return sum(scores) / len(scores) if scores else math.nan


def decide(verdict: Verdict, facts: Facts, config: Config) -> Decision:
    """Drift and enough labelled rows and budget and cool-down; each reason with its figure."""
    monitor = config.monitor
    reasons = [*verdict.missing, f"{verdict.distinct} distinct prompts, wanted {verdict.needed}"]
    said = reasons[0] if verdict.p is None else f"p = {verdict.p:.4f}, monitor.false_alarm_rate {monitor.false_alarm_rate:g}"
    since = facts.hours_since_retrain
    checks = [
        (verdict.verdict == "drift", f"{verdict.verdict} ({said})"),
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
