"""Metrics of the user's own: found, bounded, and a fault in one names the row."""

from __future__ import annotations

from pathlib import Path

import pytest

from ratchet.config.params import parse_config
from ratchet.data.examples import Example, Message, make_example
from ratchet.errors import ConfigError, DataError
from ratchet.evaluation.custom_metrics import custom_score, load_custom

ROOT = Path(__file__).parents[2]


def row(answer: str = "the warranty and liability", **meta: str) -> Example:
    return make_example(
        [Message("user", "which terms?"), Message("assistant", answer)], {"batch": "a", **meta}
    )


def own(folder: Path, body: str, name: str = "mine") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(body)
    return folder


def test_the_example_in_the_repository_works():
    metric = load_custom(["my_metrics:legal_term_recall"], ROOT / "metrics")["legal_term_recall"]
    assert custom_score("legal_term_recall", metric, "only the Warranty", row()) == 0.5
    assert custom_score("legal_term_recall", metric, "", row("nothing legal")) == 1.0
    assert (
        custom_score(
            "legal_term_recall", metric, "a lien", row("the lien and the warranty", terms="lien, deed")
        )
        == 0.5
    )


def test_a_file_may_have_a_librarys_name_and_import_its_neighbour(tmp_path):
    own(tmp_path / "own", "SHARE = 0.25\n", "neighbour")
    own(
        tmp_path / "own",
        "from neighbour import SHARE\ndef score(prediction, reference, example_meta):\n    return SHARE\n",
        "json",
    )
    assert load_custom(["json:score"], tmp_path / "own")["score"]("", "", {}) == 0.25


def test_loading_leaves_no_compiled_file(tmp_path):
    folder = own(tmp_path / "own", "def score(p, r, m):\n    return 1\n")
    load_custom(["mine:score"], folder)
    assert [path.name for path in folder.iterdir()] == ["mine.py"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("x = 1\n", "has no function score"),
        ("score = 3\n", "has no function score"),
        ("def score(:\n", "does not load: SyntaxError"),
        ("import nowhere_at_all\n", "does not load: ModuleNotFoundError"),
    ],
)
def test_what_does_not_load_is_named(tmp_path, body, said):
    with pytest.raises(ConfigError, match=f"mine.*{said}"):
        load_custom(["mine:score"], own(tmp_path / "own", body))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.py does not exist"):
        load_custom(["absent:score"], tmp_path)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('terms')", "failed on row {id}: KeyError: 'terms'"),
        ("return 1.5", "gave 1.5 for row {id}; wanted a number from 0 to 1"),
        ("return -0.1", "gave -0.1 for row"),
        ("return float('nan')", "gave nan for row"),
        ("return None", "gave None for row"),
        ("return 'good'", "gave 'good' for row"),
    ],
)
def test_a_fault_names_metric_row_and_exception(tmp_path, body, said):
    metric = load_custom(
        ["mine:score"],
        own(tmp_path / "own", f"def score(prediction, reference, example_meta):\n    {body}\n"),
    )["score"]
    with pytest.raises(DataError, match="the metric score " + said.format(id=row().id).replace("(", r"\(")):
        custom_score("score", metric, "x", row())


def test_a_metric_cannot_change_the_rows_meta(tmp_path):
    metric = load_custom(
        ["mine:score"], own(tmp_path / "own", "def score(p, r, m):\n    m.clear()\n    return True\n")
    )["score"]
    example = row(topic="cars")
    assert custom_score("score", metric, "x", example) == 1.0
    assert example.meta == {"batch": "a", "topic": "cars"}


@pytest.mark.parametrize(
    ("evaluate", "gate", "said"),
    [
        ({"custom": ["a:chrf"]}, {}, "names chrf, a name that is taken"),
        ({"custom": ["a:mine", "b:mine"]}, {}, "names mine, a name that is taken"),
        ({"custom": ["a.mine"]}, {}, "evaluate.custom.0"),
        ({"metrics": ["regex_match"]}, {}, "needs evaluate.pattern"),
        ({"pattern": "("}, {}, "is no regular expression"),
        ({}, {"metric": "bleu"}, "gate.metric is bleu; the scores a row are exact_match"),
        ({"metrics": ["macro_f1"]}, {"metric": "macro_f1"}, "gate.metric is macro_f1"),
        ({}, {"metric": "mine"}, "gate.metric is mine"),
        ({}, {"guardrails": [{"metric": "refusal"}]}, "gate.guardrails names refusal"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(evaluate, gate, said):
    with pytest.raises(ConfigError, match=said):
        parse_config({"evaluate": evaluate, "gate": gate}, Path("params.yaml"))


def test_the_gate_may_decide_on_a_metric_of_ones_own():
    assert (
        parse_config(
            {"evaluate": {"custom": ["a:mine"]}, "gate": {"metric": "mine"}}, Path("params.yaml")
        ).gate.metric
        == "mine"
    )
