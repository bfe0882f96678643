"""Find questions to reword where the champion is weak: near its mistakes, and in drifted topics.

Test rows stay out of training, also reworded. So a test row with a wrong answer only points to the most
similar training rows, and these are reworded. Prompts of a drifted topic come from users and have no answer
yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import xxhash

from ratchet.config.params import Config
from ratchet.data.examples import MEDIA_MARK, Example, read_examples
from ratchet.errors import UserError
from ratchet.evaluation.baseline import vectors
from ratchet.files import read_json
from ratchet.monitoring.request_log import REDACTED
from ratchet.monitoring.verdicts import last_verdict
from ratchet.promotion.champion import read_champion
from ratchet.synthesis.requests import Subject

WRONG = 0.5  # an answer with a lower score counts as wrong
NEAREST = 2  # training rows to which one wrong row points
SCORES, METRICS = Path("reports/evaluation/scores.parquet"), Path("reports/evaluation/metrics.json")


def find_subjects(root: Path, config: Config) -> list[Subject]:
    """Find training rows similar to the champion's mistakes, then prompts of the drifted topics.

    Raises UserError if there are neither.
    """
    train = root / "data/prepared/train.jsonl"
    rows = list(read_examples(train)) if train.exists() else []
    found = [*_near_mistakes(root, config, rows), *_of_topics(root)]
    if not found:
        raise UserError(
            "there is nothing to word anew: the last evaluation holds no mistake with training rows near "
            "to it, and the monitor's last verdict names no topic",
            remedy="`ratchet retrain` writes reports/evaluation, `ratchet monitor` looks for topics; "
            "--mode documents and --mode seeds need neither",
        )
    return found


def _near_mistakes(root: Path, config: Config, train: Sequence[Example]) -> list[Subject]:
    single = [row for row in train if sum(message.role == "user" for message in row.messages) == 1]
    wrong = _mistakes(root, config)
    if not single or not wrong:
        return []
    import numpy as np

    known, asked = vectors([row.question for row in single], [question for question, _ in wrong])
    answers = np.array([row.answer for row in single], dtype=object)
    chosen: dict[str, Example] = {}
    for place, (_, reference) in enumerate(wrong):
        alike = (asked[place] @ known.T).toarray()[0]  # cosine similarity of each training row
        rank = np.where(alike > 0, alike + (answers == reference), 0.0)  # the same answer ranks first
        chosen |= {
            single[index].id: single[index]
            for index in np.argsort(-rank, kind="stable")[:NEAREST]
            if rank[index] > 0
        }
    return [_subject(row, "near to a mistake") for row in chosen.values()]


def _mistakes(root: Path, config: Config) -> list[tuple[str, str]]:
    """List (question, reference) of the test rows that the champion answered wrongly, the worst first.

    Golden rows are left out, so that nothing is derived from them.
    """
    if not (root / SCORES).exists():
        return []
    import pandas as pd

    table, champion = pd.read_parquet(root / SCORES), read_champion(root)
    models = set(table.model)
    compared = read_json(root / METRICS).get("champion") if (root / METRICS).exists() else None
    model = "champion" if "champion" in models and champion and champion.version == compared else "candidate"
    metric = config.gate.metric if config.gate.metric != "answer_nll" else "token_f1"
    rows = table[(table.model == model) & (table.batch != "golden") & (table[metric] < WRONG)].sort_values(
        [metric, "id"]
    )
    return list(zip(map(str, rows.question), map(str, rows.reference), strict=True))


def _subject(row: Example, why: str) -> Subject:
    return Subject(
        row.id,
        row.question.replace(MEDIA_MARK, "").strip(),
        row.answer,
        why,
        row.messages[0].content if row.messages[0].role == "system" else "",
        row.media,
    )


def _of_topics(root: Path) -> list[Subject]:
    verdict = last_verdict(root)
    topics = verdict.topics if verdict and verdict.verdict == "drift" else []
    found = [(prompt, topic.name) for topic in topics for prompt in topic.examples]
    return [
        Subject(xxhash.xxh3_128_hexdigest(prompt.encode()), prompt, "", f"drifted topic {name}")
        for prompt, name in found
        if prompt.strip() and REDACTED not in prompt and MEDIA_MARK not in prompt  # its picture is not here
    ]
