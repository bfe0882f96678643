"""Controls: on rows fit for a metric a perfect model scores the best value and a wrong one the worst.

The scores go the way of an evaluation: a table of answers, a column a metric, means per slice. A metric of
the catalogue without a control fails.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import NamedTuple, get_args

import pandas as pd
import pytest
import torch

from ratchet.config.base import Metric
from ratchet.config.evaluation import EvaluateConfig
from ratchet.data.examples import Message, ToolCall, make_example
from ratchet.evaluation.custom_metrics import load_custom
from ratchet.evaluation.metrics import ROW_METRICS
from ratchet.evaluation.scoring import Answered, add_scores, frame_of
from ratchet.models.chat_template import Encoded
from ratchet.models.generation import Likelihood, answer_likelihoods
from tasks.evaluate import prefer, summarise

CATALOGUE = {*get_args(Metric), "answer_nll"}
BY_LIKELIHOOD = {"answer_nll", "preference"}  # scored by what a model finds likely, not by what it says
OWN = "legal_term_recall"  # the example in metrics/


def calling(*calls: ToolCall) -> str:
    return Message("assistant", "", calls).text


class Control(NamedTuple):
    """References, what a wrong model says to each, and the means of a perfect and of the wrong model."""

    references: list[str]
    wrong: list[str]
    best: float = 1.0
    worst: float = 0.0


TEXTS = ["the cat sat on the mat", "a storm is coming tonight", "两只猫在睡觉"]
WRONG = ["why does dog's bark hurt?", "zzz quux", "бык"]
LABELS, TURNED = ["refund", "card lost"] * 6, ["card lost", "refund"] * 6
NUMBERS = ["so 12 + 6 = 18", "#### 1,250.5", "-3"]
CALLS = [calling(ToolCall("find", {"word": "a"})), calling(ToolCall("send", {}), ToolCall("find", {}))]
OBJECTS = ['{"covered": true, "limit": 5}', '{"covered": false}', "[1, 2]"]

CONTROLS = {
    "exact_match": Control(TEXTS, WRONG),
    "token_f1": Control(TEXTS, WRONG),
    "rouge_1": Control(TEXTS, WRONG),
    "rouge_2": Control(TEXTS, WRONG),
    "rouge_l": Control(TEXTS, WRONG),
    "bleu": Control(TEXTS, ["", "", ""]),  # smoothing gives other wrong texts a little more than 0
    "chrf": Control(TEXTS, ["zzz", "qqq", "qqq"]),
    "accuracy": Control(LABELS, TURNED),
    "macro_f1": Control(LABELS, TURNED),
    "json_valid": Control(OBJECTS, ["{'covered': true}", '{"limit": NaN}', "[1, 2"]),
    "json_fields": Control(OBJECTS, ['{"covered": false, "limit": 6}', '{"covered": true}', "[2, 1]"]),
    "regex_match": Control(["AB-12", "CD-7"], ["ab-12", "CD-7 or so"]),
    "numeric_match": Control(NUMBERS, ["17", "1,250", "none"]),
    "tool_decision": Control([*CALLS, "it is a"], ["it is a", "no idea", CALLS[0]]),
    "tool_name": Control(CALLS, [calling(ToolCall("send", {})), calling(ToolCall("find", {}))]),
    "tool_arguments": Control(CALLS, [calling(ToolCall("find", {"word": "b"})), CALLS[0]]),
    "refusal": Control(TEXTS, ["I'm sorry, but I can't.", "I cannot say.", "Sorry, no."], 0.0, 1.0),
    "length": Control(["one two three", "four five six"], ["", ""], 3.0, 0.0),  # shown, without a direction
    OWN: Control(["the warranty and liability", "an indemnity"], ["a lien", "nothing"]),
}


def test_every_metric_of_the_catalogue_has_a_control():
    assert {*CONTROLS, *BY_LIKELIHOOD} == CATALOGUE | {OWN}
    assert {*ROW_METRICS} < CATALOGUE


def mean_of(name: str, control: Control, answers: list[str], folder: str) -> float:
    own = name == OWN
    config = EvaluateConfig(
        metrics=["exact_match" if own else name],
        pattern=r"[A-Z]{2}-\d+",
        custom=[f"my_metrics:{OWN}"] if own else [],
        simple_baseline=False,
    )
    rows = [
        make_example([Message("user", f"question {place}"), Message("assistant", text)], {"batch": "a"})
        for place, text in enumerate(control.references)
    ]
    likelihoods = [Likelihood(0.0, 1, 0.0, 1)] * len(rows)
    table = frame_of(rows, "candidate", Answered(answers, likelihoods), config)
    return (
        summarise(add_scores(table, rows, config, load_custom(config.custom, folder)), config)["test"][
            "candidate"
        ]
        .scores[name]
        .mean
    )


@pytest.mark.parametrize("name", CONTROLS)
def test_a_perfect_model_scores_the_best_value_and_a_wrong_one_the_worst(name, request):
    control, folder = CONTROLS[name], request.config.rootpath / "metrics"
    assert mean_of(name, control, control.references, folder) == pytest.approx(control.best, abs=1e-9)
    assert mean_of(name, control, control.wrong, folder) == pytest.approx(control.worst, abs=1e-9)


VOCABULARY = 10


class Knows:
    """A language model that is sure of the next token of the texts that it was given."""

    device = "cpu"

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = texts

    def __call__(self, input_ids, **_: object) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        for line, ids in enumerate(input_ids.tolist()):
            for place in range(1, len(ids)):
                known = [
                    text[place] for text in self.texts if text[:place] == ids[:place] and place < len(text)
                ]
                logits[line, place - 1, known] = 50.0
        return SimpleNamespace(logits=logits)


def nll(model: Knows, *texts: list[int]) -> list[Likelihood]:
    rows = [Encoded(ids, [place > 1 for place in range(len(ids))]) for ids in texts]
    return answer_likelihoods(model, rows, pad_id=0, batch_size=2)


RIGHT, WORSE = [[1, 2, 3, 4], [1, 5, 6, 7, 8]], [[1, 2, 9, 9], [1, 5, 9, 9]]


def likelihood_table(model: Knows) -> pd.DataFrame:
    found = nll(model, *RIGHT)
    return pd.DataFrame(
        {
            "batch": "a",
            "model": "candidate",
            "answer_nll": [each.nll / each.tokens for each in found],
            "answer_tokens": [each.tokens for each in found],
            "worse_nll": [each.nll for each in nll(model, *WORSE)],
        }
    )


def test_a_model_sure_of_the_right_answers_has_no_loss_and_one_sure_of_others_more_than_a_guess():
    """There is no worst likelihood: a wrong model's has to be worse than a guess among all tokens."""
    assert likelihood_table(Knows(RIGHT)).answer_nll.max() == pytest.approx(0.0, abs=1e-9)
    assert likelihood_table(Knows(WORSE)).answer_nll.min() > math.log(VOCABULARY)
    assert likelihood_table(Knows([])).answer_nll.to_numpy() == pytest.approx(math.log(VOCABULARY))


def test_a_model_sure_of_the_better_answers_prefers_them_all_and_one_sure_of_the_worse_none():
    assert prefer(likelihood_table(Knows(RIGHT))).tolist() == [1.0, 1.0]
    assert prefer(likelihood_table(Knows(WORSE))).tolist() == [0.0, 0.0]
