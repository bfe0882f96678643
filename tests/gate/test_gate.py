"""The gate turns one way: a candidate that is not better for certain, or worse anywhere, takes no place."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pytest

from ratchet.config.evaluation import GateConfig, ParityConfig
from ratchet.data.examples import Message, encode_line, make_example
from ratchet.errors import RatchetError
from ratchet.evaluation.paired import paired_gains
from ratchet.evaluation.slices import size_bucket
from ratchet.evaluation.statistics import Interval
from ratchet.files import read_json, write_bytes, write_json
from ratchet.gate.checks import interval_of, no_worse, rows_needed
from tasks.gate import judge

OLD, OLDER, NEW = (
    "20260101T000000Z-old-00000000.jsonl",
    "20250101T000000Z-older-00000000.jsonl",
    "20260201T000000Z-new-00000000.jsonl",
)
ROWS = {OLD: 150, OLDER: 150, NEW: 100, "golden": 120}


def scores(
    means: dict[str, float],
    *,
    rows: dict[str, int] | None = None,
    seed: int = 0,
    nll: dict[str, float] | None = None,
) -> pd.DataFrame:
    """Return one line a row and model. Each model hits every row with its probability.

    A row's difficulty is shared, so the models agree on most rows.
    """
    generator = np.random.default_rng(seed)
    batches = [batch for batch, count in (rows or ROWS).items() for _ in range(count)]
    difficulty, frames = generator.random(len(batches)), []
    for model, mean in means.items():
        hits = (difficulty + generator.normal(0, 0.05, len(batches)) < mean).astype(float)
        likelihood = (nll or {}).get(model, 1.0) + generator.normal(0, 0.1, len(batches))
        frames.append(
            pd.DataFrame(
                {
                    "id": [f"row{number}" for number in range(len(batches))],
                    "batch": batches,
                    "model": model,
                    "exact_match": hits,
                    "answer_nll": likelihood,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


class Bench:
    """A folder as the stages leave it before the gate."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_json(folder / "candidate/manifest.json", {"run_key": "key", "adapter_sha256": "sha"})
        self.parity("pass")
        self.looks({})
        self.incumbent(7, [OLD, OLDER])

    def incumbent(self, version: int | None, batches: list[str], *, evaluated: int | None = -1) -> None:
        self.metrics = {"champion": version if evaluated == -1 else evaluated, "candidate": "sha"}
        write_json(self.folder / "incumbent/manifest.json", {"version": version, "batches": batches})
        write_json(self.folder / "evaluation/metrics.json", self.metrics)

    def parity(self, result: str, reason: str = "the same tokens") -> None:
        names = ("files", "training", "prompts", "gateway")
        parts = [
            {
                "name": name,
                "rows": 20,
                "mismatches": int(result == "fail"),
                "result": result,
                "reason": reason,
                "first": None,
            }
            for name in names
        ]
        write_json(
            self.folder / "parity.json",
            {"candidate": "sha", "rows": 20, "training_rows": 20, "fitting": 150, "parts": parts},
        )

    def looks(self, judged: dict[str, list[str]]) -> None:
        write_json(self.folder / "looks.json", {"judged": judged})

    def judge(self, table: pd.DataFrame, *, evaluated: dict | None = None, **settings: object) -> dict:
        """`evaluated`: what the evaluation says of itself, otherwise what fits the table."""
        if (self.folder / "evaluation/metrics.json").exists():
            rows = int(table.id[table.model == "candidate"].nunique())
            write_json(
                self.folder / "evaluation/metrics.json", self.metrics | {"rows": rows} | (evaluated or {})
            )
        table.to_parquet(self.folder / "evaluation/scores.parquet", index=False)
        config = GateConfig(**{"resamples": 500, "min_rows": 200, **settings})
        write_json(self.folder / "train/figures.json", {"run_key": "key", "seconds": 7200.0})
        return self.judge_as_it_is(config)

    def judge_as_it_is(self, config: GateConfig) -> dict:
        places = (
            self.folder / name
            for name in ("evaluation", "candidate", "incumbent", "parity.json", "looks.json", "gate.json")
        )
        return msgspec.to_builtins(judge(*places, config, self.folder / "train"))


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


BETTER = {"candidate": 0.8, "champion": 0.6, "base": 0.2}
EQUAL = {"candidate": 0.6, "champion": 0.6, "base": 0.2}


def worsen(
    table: pd.DataFrame, rows: pd.Series, column: str = "exact_match", value: float = 0.0
) -> pd.DataFrame:
    """The candidate's scores on `rows` become `value`."""
    table.loc[rows & (table.model == "candidate"), column] = value
    return table


def result_of(decision: dict, name: str) -> str:
    return next(check["result"] for check in decision["checks"] if check["name"] == name)


# --- verdicts ---


def test_a_candidate_that_is_clearly_better_is_promoted(bench):
    decision = bench.judge(scores(BETTER))
    assert decision["verdict"] == "promote"
    names = [check["name"] for check in decision["checks"]]
    assert {
        "success",
        "answer_nll",
        "base",
        "golden",
        "past",
        f"past:{OLDER}",
        f"past:{OLD}",
        "parity",
    } <= set(names)
    assert {check["result"] for check in decision["checks"]} == {"pass"}
    assert not [check for check in decision["checks"] if "needed" in check], "nothing is open"
    assert len(decision["reasons"]) == len(names) == len(set(names)), "a reason for each check"
    assert decision["rival"] == {"model": "champion", "version": 7}
    assert decision["candidate"] == {"run_key": "key", "adapter_sha256": "sha"}


def test_the_success_check_tells_the_score_before_and_after(bench):
    table = scores(BETTER)
    success = bench.judge(table)["checks"][0]
    means = table[table.batch != "golden"].groupby("model").exact_match.mean()
    assert success["score"] == pytest.approx(means.candidate)
    assert success["score"] - success["mean"] == pytest.approx(means.champion)


def test_the_decision_is_written_as_it_is_returned(bench):
    assert bench.judge(scores(BETTER)) == read_json(bench.folder / "gate.json")


def test_an_identical_candidate_is_rejected(bench):
    """The champion copied as candidate: the point estimate alone would promote it half the time."""
    table = scores({"champion": 0.6, "base": 0.2})
    copy = table[table.model == "champion"].assign(model="candidate")
    decision = bench.judge(pd.concat([table, copy]))
    assert decision["verdict"] == "reject"
    assert len(decision["reasons"]) == 1
    assert "is not better than the champion's: gain +0.000 [+0.000, +0.000]" in decision["reasons"][0]


def test_a_worse_candidate_is_rejected(bench):
    decision = bench.judge(scores({**EQUAL, "candidate": 0.4}))
    assert decision["verdict"] == "reject"
    assert result_of(decision, "success") == "fail"


def test_a_gain_that_the_rows_cannot_tell_from_nothing_is_uncertain(bench):
    decision = bench.judge(scores({**EQUAL, "candidate": 0.615}, seed=3))
    assert decision["verdict"] == "uncertain"
    assert "may be better than the champion's, but these rows cannot tell: gain" in decision["reasons"][0]
    success = decision["checks"][0]
    found = Interval(success["mean"], success["low"], success["high"])
    assert success["needed"] == rows_needed(found, 0.0, success["rows"]) - success["rows"] > 0


def test_too_few_rows_are_uncertain_however_good_they_look(bench):
    decision = bench.judge(scores({"candidate": 0.95, "champion": 0.1, "base": 0.1}, rows={OLD: 60, NEW: 60}))
    assert decision["verdict"] == "uncertain"
    [reason] = decision["reasons"]
    assert all(word in reason for word in ("120", "gate.min_rows", "200"))
    assert decision["checks"][0]["needed"] == 80


def test_golden_rows_do_not_count_as_test_rows(bench):
    assert result_of(bench.judge(scores(BETTER, rows={OLD: 100, "golden": 500})), "success") == "unclear"


def test_a_gain_under_the_wanted_one_does_not_pass(bench):
    assert bench.judge(scores(BETTER), min_gain=0.1)["verdict"] == "promote"
    assert bench.judge(scores(BETTER), min_gain=0.2)["verdict"] == "uncertain"
    assert bench.judge(scores(BETTER), min_gain=0.3)["verdict"] == "reject"


def test_without_a_champion_the_base_is_the_rival(bench):
    bench.incumbent(None, [])
    decision = bench.judge(scores({"candidate": 0.6, "base": 0.2}))
    assert decision["verdict"] == "promote"
    assert decision["rival"] == {"model": "base", "version": None}
    names = {check["name"] for check in decision["checks"]}
    assert {"success", "answer_nll", "base", "golden", "parity"} <= names
    assert not any(name.startswith("past") for name in names)


def test_a_lower_likelihood_loss_is_a_gain_when_it_is_the_success_metric(bench):
    table = scores(EQUAL, nll={"candidate": 0.8, "champion": 1.0, "base": 2.0})
    decision = bench.judge(table, metric="answer_nll")
    assert decision["verdict"] == "promote"
    assert decision["checks"][0]["mean"] == pytest.approx(0.2, abs=0.02)
    swapped = table.assign(
        model=table.model.map({"candidate": "champion", "champion": "candidate", "base": "base"})
    )
    assert bench.judge(swapped, metric="answer_nll")["verdict"] == "reject"


def test_the_verdict_is_the_same_whatever_the_order_of_the_lines(bench):
    table = scores(BETTER)
    assert bench.judge(table) == bench.judge(table.sample(frac=1.0, random_state=1))


# --- how often chance promotes ---


def test_the_error_of_a_look_shrinks_with_the_looks_before_it(bench):
    table = scores({**EQUAL, "candidate": 0.66}, seed=1)
    first = bench.judge(table)
    assert (first["verdict"], first["look"]["number"]) == ("promote", 1)
    assert "(look 1 against it, error 0.0089)" in first["reasons"][0]
    bench.looks({"7": [f"key{number}" for number in range(400)], "6": ["other"]})
    late = bench.judge(table)
    assert (late["verdict"], late["look"]["number"]) == ("uncertain", 401)
    assert late["checks"][0]["low"] < first["checks"][0]["low"]
    assert late["look"]["alpha"] < 1e-5


def test_judging_the_same_candidate_again_is_no_new_look(bench):
    bench.looks({"7": ["another", "key"]})
    assert bench.judge(scores(BETTER))["look"]["number"] == 2


def test_the_same_candidate_on_other_rows_is_a_further_look_with_stricter_guardrails(bench):
    few = scores({"candidate": 0.7, "champion": 0.6, "base": 0.2}, rows={OLD: 130, OLDER: 130})
    first = bench.judge(few)
    assert (first["look"]["number"], first["look"]["before"]) == (1, 0)
    bench.looks({"7": ["another@ffff", f"key@{first['look']['rows']}"]})

    again = bench.judge(few)
    assert (again["look"]["number"], again["look"]["before"]) == (2, 0)  # after another candidate's
    assert again["look"]["rows"] == first["look"]["rows"]

    more = bench.judge(scores({"candidate": 0.7, "champion": 0.6, "base": 0.2}, rows={OLD: 150, OLDER: 150}))
    assert (more["look"]["number"], more["look"]["before"]) == (3, 1)
    assert more["look"]["rows"] != first["look"]["rows"]
    assert more["look"]["alpha"] < again["look"]["alpha"] < first["look"]["alpha"]
    errors = [judged["params"]["guardrail_alpha"] for judged in (first, again, more)]
    assert errors == [0.05, 0.05, 0.025]


def test_a_gain_in_a_handful_of_rows_is_not_beyond_chance(bench):
    """Five rows won and none lost: the bootstrap alone is sure of it in 99 %, and luck does it in 3 %."""
    table = scores({"champion": 0.6, "base": 0.2})
    copy = table[table.model == "champion"].assign(model="candidate")
    lost = copy.index[(copy.exact_match == 0) & (copy.batch != "golden")]
    copy.loc[lost[:5], "exact_match"] = 1.0
    decision = bench.judge(pd.concat([table, copy]), resamples=4000)
    assert decision["checks"][0]["low"] > 0
    assert result_of(decision, "success") == "unclear"
    copy.loc[lost[:9], "exact_match"] = 1.0
    assert result_of(bench.judge(pd.concat([table, copy])), "success") == "pass"


def test_equal_models_pass_no_more_often_than_alpha_allows(bench):
    """Judge two models of the same quality on fresh rows, 100 times. The limit is the binomial's at 99 %."""
    cycles, alpha = 100, 0.05
    bench.incumbent(7, [])
    passed = sum(
        result_of(
            bench.judge(
                scores(EQUAL, rows={NEW: 200}, seed=cycle),
                alpha=alpha,
                alpha_budget=1.0,
                resamples=200,
                seed=cycle,
            ),
            "success",
        )
        == "pass"
        for cycle in range(cycles)
    )
    assert passed <= cycles * alpha + 2.326 * math.sqrt(cycles * alpha * (1 - alpha))


# --- serve parity ---


def test_a_gateway_that_says_otherwise_alone_blocks(bench):
    bench.parity("fail", "prompts: 1 of 20 rows differ")
    decision = bench.judge(scores(BETTER))
    assert decision["verdict"] == "reject"
    assert [check["name"] for check in decision["checks"] if check["result"] != "pass"] == ["parity"]
    assert "prompts: 1 of 20 rows differ" in decision["reasons"][0]


def whole(bench: Bench, table: pd.DataFrame, asked: ParityConfig, *, method: str = "lora") -> dict:
    """By the command's way: against the prepared rows and what parity was asked for."""
    bench.judge(table)
    write_json(
        bench.folder / "candidate/manifest.json",
        {"run_key": "key", "adapter_sha256": "sha", "adapter": {"method": method}},
    )
    places = (
        bench.folder / name
        for name in ("evaluation", "candidate", "incumbent", "parity.json", "looks.json", "gate.json")
    )
    found = judge(
        *places,
        GateConfig(resamples=500, min_rows=200),
        bench.folder / "train",
        prepared=bench.folder / "prepared",
        parity_asked=asked,
    )
    return msgspec.to_builtins(found)


def prepare(bench: Bench, table: pd.DataFrame) -> pd.DataFrame:
    """The table of rows that lie in prepared files."""
    names = {
        id: make_example([Message("user", id), Message("assistant", "a")], {"batch": "b"})
        for id in table.id.unique()
    }
    for name, rows in (("golden", table[table.batch == "golden"]), ("test", table[table.batch != "golden"])):
        write_bytes(
            bench.folder / f"prepared/{name}.jsonl", (encode_line(names[id]) for id in rows.id.unique())
        )
    return table.assign(id=[names[id].id for id in table.id])


@pytest.mark.parametrize("gone", ["golden", "test"])
def test_rows_that_were_never_asked_give_no_verdict_whatever_the_evaluation_says_of_itself(bench, gone):
    table = prepare(bench, scores(BETTER))
    asked = ParityConfig(rows=20, merged=False)
    assert whole(bench, table, asked)["verdict"] == "promote"
    ids = (
        table.id[table.batch == "golden"].unique()
        if gone == "golden"
        else table.id[table.batch != "golden"].unique()[::10]
    )
    with pytest.raises(RatchetError, match=rf"lacks {len(ids)} of \d+ {gone} rows"):
        whole(bench, table[~table.id.isin(ids)], asked)


def test_a_report_of_parity_that_lacks_what_was_asked_for_gives_no_verdict(bench):
    table = prepare(bench, scores(BETTER))
    with pytest.raises(RatchetError, match="has no rows for merged"):
        whole(bench, table, ParityConfig(rows=20))
    assert (
        whole(bench, table, ParityConfig(rows=20), method="prompt")["verdict"] == "promote"
    )  # nothing to merge
    with pytest.raises(RatchetError, match=r"checked on 20 of 150 test rows; `parity.rows` is 200"):
        whole(bench, table, ParityConfig(rows=200, merged=False))


@pytest.mark.parametrize("value", [5.0, -0.1])
def test_a_share_outside_0_to_1_gives_no_verdict(bench, value):
    table = scores(BETTER)
    with pytest.raises(RatchetError, match=r"exact_match of .* is outside 0 to 1"):
        bench.judge(worsen(table, table.id == table.id.iloc[0], value=value))


def test_without_a_report_of_serve_parity_there_is_no_verdict(bench):
    (bench.folder / "parity.json").unlink()
    with pytest.raises(RatchetError, match=r"parity\.json does not exist"):
        bench.judge(scores(BETTER))
    assert not (bench.folder / "gate.json").exists()


# --- guardrails ---


def test_a_worse_likelihood_alone_blocks(bench):
    decision = bench.judge(scores(BETTER, nll={"candidate": 1.7}))
    assert decision["verdict"] == "reject"
    assert [check["name"] for check in decision["checks"] if check["result"] != "pass"] == ["answer_nll"]


@pytest.mark.parametrize(
    ("metric", "champion", "candidate"), [("refusal", 0.02, 0.2), ("json_valid", 0.99, 0.8)]
)
def test_a_metric_that_gets_worse_alone_blocks_where_it_is_a_guardrail(bench, metric, champion, candidate):
    """Of refusals fewer are better."""
    table = scores(BETTER)
    share = table.model.map({"champion": champion, "candidate": candidate, "base": 0.5})
    table[metric] = (table.id.str[3:].astype(int) % 50 < share * 50).astype(float)
    rule = {"metric": metric, "margin": 0.02}
    decision = bench.judge(table, guardrails=[rule])
    assert decision["verdict"] == "reject"
    assert [check["name"] for check in decision["checks"] if check["result"] != "pass"] == [
        f"metric:{metric}"
    ]
    assert bench.judge(table)["verdict"] == "promote"
    assert bench.judge(table, guardrails=[{**rule, "margin": 0.5}])["verdict"] == "promote"


def test_falling_under_the_base_alone_blocks(bench):
    """Small losses against one champion after another must not add up."""
    decision = bench.judge(scores({"candidate": 0.6, "champion": 0.4, "base": 0.8}))
    assert decision["verdict"] == "reject"
    assert [check["name"] for check in decision["checks"] if check["result"] != "pass"] == ["base"]


def with_oldest(bench: Bench, table: pd.DataFrame, hits: float, *, rows: int = 520) -> None:
    """v1's own scores on the first rows, as its evaluation gave them."""
    old = table[table.model == "champion"].assign(model="v1")[:rows]
    old["exact_match"] = [float(place < hits * len(old)) for place in range(len(old))]
    old.to_parquet(bench.folder / "incumbent/oldest.parquet", index=False)
    write_json(bench.folder / "incumbent/manifest.json", {"version": 7, "batches": [OLD, OLDER], "oldest": 1})


def test_falling_under_the_oldest_champion_alone_blocks(bench):
    """Each promotion may lose a little within its margins; v1's scores tell when it has become too much."""
    table = scores(BETTER)
    with_oldest(bench, table, 0.95)
    decision = bench.judge(table)
    assert decision["verdict"] == "reject"
    assert [check["name"] for check in decision["checks"] if check["result"] != "pass"] == ["oldest"]
    assert decision["reasons"][0].startswith(
        "guardrail oldest: exact_match on 520 rows is worse than the v1's: gain -0.1"
    )
    assert bench.judge(table, oldest=False)["verdict"] == "promote"


def test_a_candidate_that_is_no_worse_than_the_oldest_champion_passes(bench):
    table = scores(BETTER)
    with_oldest(bench, table, 0.5)
    decision = bench.judge(table)
    assert (decision["verdict"], result_of(decision, "oldest")) == ("promote", "pass")
    with_oldest(bench, table, 1.0, rows=49)
    assert "oldest" not in {check["name"] for check in bench.judge(table)["checks"]}


def test_scores_of_the_oldest_champion_that_are_gone_give_no_verdict(bench):
    table = scores(BETTER)
    with_oldest(bench, table, 0.5)
    (bench.folder / "incumbent/oldest.parquet").unlink()
    with pytest.raises(RatchetError, match=r"oldest\.parquet cannot be read"):
        bench.judge(table)


def test_a_worse_golden_set_alone_blocks(bench):
    table = scores(BETTER)
    decision = bench.judge(worsen(table, table.batch == "golden"))
    assert decision["verdict"] == "reject"
    assert [check["name"] for check in decision["checks"] if check["result"] != "pass"] == ["golden"]


def test_forgetting_what_the_champion_knew_alone_blocks(bench):
    """Better on the new rows by so much that the sum is better too."""
    table = scores({"candidate": 0.6, "champion": 0.6, "base": 0.2}, rows={OLD: 200, NEW: 200})
    table.loc[(table.batch == NEW) & (table.model == "champion"), "exact_match"] = 0.0
    bench.incumbent(7, [OLD])
    decision = bench.judge(
        worsen(table, (table.batch == OLD) & (table.id.str[-1].isin(["1", "2", "3", "4"])))
    )
    assert decision["verdict"] == "reject"
    assert [check["name"] for check in decision["checks"] if check["result"] != "pass"] == ["past"]


def test_forgetting_one_past_batch_alone_blocks(bench):
    table = scores({**BETTER, "candidate": 0.9}, rows={OLD: 500, OLDER: 60, NEW: 100})
    table = worsen(table, table.batch == OLDER)
    decision = bench.judge(worsen(table, (table.batch == OLD), value=1.0))
    assert decision["verdict"] == "reject"
    assert [check["name"] for check in decision["checks"] if check["result"] != "pass"] == [f"past:{OLDER}"]


def test_a_batch_that_the_champion_has_not_seen_is_no_guardrail(bench):
    bench.incumbent(7, [OLD])
    assert "past" in {check["name"] for check in bench.judge(scores(BETTER))["checks"]}
    assert not any(check["name"].startswith("past:") for check in bench.judge(scores(BETTER))["checks"])


def test_a_small_past_batch_counts_in_the_whole_and_not_by_itself(bench):
    names = {
        check["name"]: check["rows"]
        for check in bench.judge(scores(BETTER, rows={OLD: 200, OLDER: 49, NEW: 100}))["checks"]
    }
    assert names["past"] == 249
    assert f"past:{OLDER}" not in names


@pytest.mark.parametrize(("margin", "verdict"), [(0.5, "promote"), (0.0, "reject")])
def test_a_loss_within_the_margin_is_still_taken(bench, margin, verdict):
    table = scores(BETTER)
    table = worsen(table, (table.batch == "golden") & (table.id.str[-1].isin(["0", "1", "2", "3"])))
    assert bench.judge(table, golden_margin=margin)["verdict"] == verdict


def with_topics(table: pd.DataFrame, topics: int = 5) -> pd.DataFrame:
    """Every fifth row belongs to the same topic, across batches."""
    return table.assign(
        **{
            "slice:topic": [f"topic {int(id[3:]) % topics}" if int(id[3:]) % 7 else "" for id in table.id],
            "kind": "all the same",
        }
    )


def test_a_slice_that_gets_worse_alone_blocks_and_is_named(bench):
    table = with_topics(scores({**BETTER, "candidate": 0.9}))
    decision = bench.judge(worsen(table, (table["slice:topic"] == "topic 3") & (table.batch != "golden")))
    assert decision["verdict"] == "reject"
    assert [check["name"] for check in decision["checks"] if check["result"] != "pass"] == ["slices"]
    assert decision["reasons"][0].startswith("guardrail slices: topic:topic 3: exact_match on ")
    assert "is worse than the champion's for certain" in decision["reasons"][0]
    assert "Holm over 5 slices" in decision["reasons"][0]
    assert {one["name"]: one["result"] for one in decision["slices"]} == {
        f"topic:topic {number}": "fail" if number == 3 else "pass" for number in range(5)
    }


def test_a_slice_by_the_size_of_pictures_blocks_as_any_other(bench):
    table = scores({**BETTER, "candidate": 0.9})
    sizes = [size_bucket(4_000_000 if int(id[3:]) % 4 == 0 else 4_000) for id in table.id]
    table = table.assign(**{"slice:picture_size": sizes, "kind": "all the same"})
    large = table["slice:picture_size"] == "1 megapixels or more"
    decision = bench.judge(worsen(table, large & (table.batch != "golden")))
    assert decision["verdict"] == "reject"
    assert {one["name"]: one["result"] for one in decision["slices"]} == {
        "picture_size:1 megapixels or more": "fail",
        "picture_size:under 0.1 megapixels": "pass",
    }


def test_slices_that_do_not_get_worse_stop_nobody(bench):
    decision = bench.judge(with_topics(scores(BETTER)))
    assert decision["verdict"] == "promote"
    assert result_of(decision, "slices") == "pass"
    assert [one["name"] for one in decision["slices"]] == sorted(
        (one["name"] for one in decision["slices"]), key=lambda name: decision_mean(decision, name)
    )


def decision_mean(decision: dict, name: str) -> float:
    """How far over the margin a slice lies, in standard errors, about: the order in which they are told."""
    one = next(one for one in decision["slices"] if one["name"] == name)
    return (one["mean"] + 0.1) / (one["high"] - one["low"])


def test_a_slice_under_the_least_number_of_rows_is_no_guardrail(bench):
    table = with_topics(scores({**BETTER, "candidate": 0.9}))
    table = worsen(table, (table["slice:topic"] == "topic 3") & (table.batch != "golden"))
    assert bench.judge(table, min_slice_rows=70)["verdict"] == "promote"
    assert bench.judge(table, slice_margin=1.0)["verdict"] == "promote"


def test_many_equal_slices_are_seldom_called_worse(bench):
    """25 cycles of twenty slices each; without the correction more than half would have one at 5 %."""
    called = 0
    for cycle in range(25):
        table = scores(EQUAL, rows={NEW: 1200}, seed=cycle)
        table["slice:topic"] = [f"topic {int(id[3:]) % 20}" for id in table.id]
        decision = bench.judge(table, slice_margin=0.0, resamples=300, seed=cycle)
        assert len(decision["slices"]) == 20
        called += result_of(decision, "slices") == "fail"
    assert called <= 4  # the binomial's 99 % limit at 5 %


def swapped(table: pd.DataFrame, changed: dict[str, float], pairs: int = 200) -> pd.DataFrame:
    """The first rows once more with a swapped term; that share of a model's scores turns round."""
    rows = table[table.id.isin([f"row{number}" for number in range(pairs)])].copy()
    turned = rows.groupby("model").cumcount() < rows.model.map(changed).fillna(0.0) * pairs
    return rows.assign(
        exact_match=rows.exact_match.where(~turned, 1 - rows.exact_match),
        of=rows.id,
        swap="gender",
        id=rows.id + " swapped",
    )


def audit(bench: Bench, table: pd.DataFrame, pairs: pd.DataFrame, **settings: object) -> dict:
    pairs.to_parquet(bench.folder / "evaluation/counterfactual.parquet", index=False)
    return bench.judge(table, evaluated={"pairs": int((pairs.model == "candidate").sum())}, **settings)


def test_a_candidate_that_swapped_terms_sway_more_than_the_champion_alone_blocks(bench):
    table = scores(BETTER)
    decision = audit(bench, table, swapped(table, {"candidate": 0.2, "champion": 0.02}))
    assert decision["verdict"] == "reject"
    assert [check["name"] for check in decision["checks"] if check["result"] != "pass"] == ["bias"]
    assert (
        "guardrail bias: change of exact_match with a swapped term on 200 rows "
        "is worse than the champion's: gain -0.180" in decision["reasons"][0]
    )


def test_a_candidate_that_swapped_terms_sway_no_more_than_the_champion_passes(bench):
    table = scores(BETTER)
    assert audit(bench, table, swapped(table, {"candidate": 0.2, "champion": 0.2}))["verdict"] == "promote"
    assert (
        audit(bench, table, swapped(table, {"candidate": 0.2, "champion": 0.02}), bias_margin=0.3)["verdict"]
        == "promote"
    )


@pytest.mark.parametrize(
    "fault",
    [
        lambda pairs: pairs[pairs.model != "champion"],
        lambda pairs: pairs.assign(of="nobody"),
        lambda pairs: pd.concat([pairs, pairs[pairs.model == "champion"][:1]]),
        lambda pairs: pairs.assign(exact_match=math.nan),
        lambda pairs: pairs.drop(columns="exact_match"),
    ],
    ids=["a model is missing", "no originals", "doubled", "not finite", "another metric"],
)
def test_counterfactual_rows_that_are_not_whole_give_no_verdict(bench, fault):
    table = scores(BETTER)
    with pytest.raises(RatchetError, match="counterfactual rows"):
        audit(bench, table, fault(swapped(table, {})))


def test_counterfactual_rows_that_are_missing_give_no_verdict(bench):
    with pytest.raises(RatchetError, match=r"counterfactual\.parquet cannot be read"):
        bench.judge(scores(BETTER), evaluated={"pairs": 200})
    table = scores(BETTER)
    swapped(table, {}).to_parquet(bench.folder / "evaluation/counterfactual.parquet", index=False)
    with pytest.raises(RatchetError, match="holds 200 of the candidate, the evaluation says 300"):
        bench.judge(table, evaluated={"pairs": 300})


def attacked(table: pd.DataFrame, broken: dict[str, dict[str, float]], rows: int = 200) -> pd.DataFrame:
    """`broken`: kind → model → the share of rows, others for each kind, that say what was planted."""
    first = table[table.id.isin([f"row{number}" for number in range(rows)])]
    parts = []
    for place, (kind, shares) in enumerate(broken.items()):
        says = (first.groupby("model").cumcount() + place * rows / len(broken)) % rows < first.model.map(
            shares
        ).fillna(0.0) * rows
        parts.append(
            first.assign(
                of=first.id,
                id=first.id + kind,
                kind=kind,
                planted="plum",
                handled=True,
                answer=says.map({True: "plum", False: "other"}),
            )
        )
    return pd.concat(parts, ignore_index=True)


def under_attack(
    bench: Bench, broken: dict[str, dict[str, float]], change=lambda rows: rows, **settings: object
) -> dict:
    table = scores(BETTER).assign(answer="clean")
    rows = change(attacked(table, broken))
    rows.to_parquet(bench.folder / "evaluation/attacks.parquet", index=False)
    return bench.judge(table, evaluated={"attacked": int((rows.model == "candidate").sum())}, **settings)


def test_withstanding_fewer_attacks_than_the_champion_alone_blocks(bench):
    """A little worse in every kind, which no kind shows by itself."""
    decision = under_attack(
        bench, {kind: {"candidate": 0.09} for kind in ("injection", "template", "canary")}
    )
    assert decision["verdict"] == "reject"
    assert [check["name"] for check in decision["checks"] if check["result"] != "pass"] == ["attacks"]
    assert decision["reasons"][0].startswith(
        "guardrail attacks: share withstood on 200 rows is worse than the champion's: gain -0.09"
    )


def test_one_kind_of_attack_that_gets_through_alone_blocks_though_all_together_are_within_the_margin(bench):
    kinds = {kind: {} for kind in ("template", "canary", "typo", "lookalike")}
    decision = under_attack(bench, {**kinds, "injection": {"candidate": 0.2, "champion": 0.02}})
    assert decision["verdict"] == "reject"
    assert [check["name"] for check in decision["checks"] if check["result"] != "pass"] == ["attacks:kinds"]
    assert (
        "injection: share withstood on 200 rows is worse than the champion's for certain"
        in decision["reasons"][0]
    )


def test_typed_text_that_becomes_control_tokens_alone_blocks(bench):
    """For candidate and champion alike, so that no comparison shows it."""
    decision = under_attack(bench, {"template": {}}, lambda rows: rows.assign(handled=False))
    assert decision["verdict"] == "reject"
    assert [check["name"] for check in decision["checks"] if check["result"] != "pass"] == ["attacks:text"]


def test_withstanding_what_the_champion_withstands_passes(bench):
    assert under_attack(bench, {"injection": {"candidate": 0.3, "champion": 0.3}})["verdict"] == "promote"
    assert (
        under_attack(bench, {"injection": {"candidate": 0.3, "champion": 0.1}}, attack_margin=0.5)["verdict"]
        == "promote"
    )


def test_attacked_rows_that_are_not_whole_give_no_verdict(bench):
    with pytest.raises(RatchetError, match=r"attacks\.parquet cannot be read"):
        bench.judge(scores(BETTER).assign(answer="clean"), evaluated={"attacked": 200})
    with pytest.raises(RatchetError, match="were not asked the same attacked rows"):
        under_attack(bench, {"injection": {}}, lambda rows: rows[rows.model != "champion"])
    with pytest.raises(
        RatchetError, match="table of attacked rows holds 200 of the candidate, the evaluation says 300"
    ):
        bench.judge(scores(BETTER).assign(answer="clean"), evaluated={"attacked": 300})
    with pytest.raises(RatchetError, match="attacked rows are doubled"):
        under_attack(bench, {"injection": {}}, lambda rows: pd.concat([rows, rows[:1]]))


def by_region(table: pd.DataFrame, worse: dict[str, float]) -> pd.DataFrame:
    """Put rows in north and south by turns; in the south a model loses that share of its right rows."""
    table["group:region"] = [("north", "south")[int(id[3:]) % 2] for id in table.id]
    for model, share in worse.items():
        hit = table.index[
            (table["group:region"] == "south") & (table.model == model) & (table.exact_match == 1)
        ]
        table.loc[hit[: int(share * len(hit))], "exact_match"] = 0.0
    return table


def test_a_gap_between_groups_that_is_wider_than_the_champions_alone_blocks(bench):
    """The candidate is better over all, and better in every group: only the gap has grown."""
    table = by_region(scores({"candidate": 0.98, "champion": 0.5, "base": 0.2}), {"candidate": 0.25})
    decision = bench.judge(table, evaluated={"grouped": ["region"]})
    assert decision["verdict"] == "reject"
    assert [check["name"] for check in decision["checks"] if check["result"] != "pass"] == ["groups:region"]
    assert (
        "the gap in exact_match between groups (2 groups, 400 rows) is wider than the champion's "
        "for certain: narrower by -0.2" in decision["reasons"][0]
    )
    assert bench.judge(table, evaluated={"grouped": ["region"]}, group_margin=0.5)["verdict"] == "promote"


def test_a_gap_that_the_champion_has_as_well_passes(bench):
    table = by_region(scores(BETTER), {"candidate": 0.2, "champion": 0.2})
    assert result_of(bench.judge(table, evaluated={"grouped": ["region"]}), "groups:region") == "pass"


def test_groups_that_are_too_small_are_not_judged_and_this_is_said(bench):
    table = by_region(scores(BETTER), {"candidate": 0.9})
    check = next(
        check
        for check in bench.judge(table, evaluated={"grouped": ["region"]}, min_slice_rows=201)["checks"]
        if check["name"] == "groups:region"
    )
    assert check["result"] == "unclear"  # it was asked for, and is not shown
    assert "not judged, 0 of its values have 201 rows" in check["reason"]


def test_groups_that_the_table_lacks_give_no_verdict(bench):
    with pytest.raises(RatchetError, match="no groups by region"):
        bench.judge(scores(BETTER), evaluated={"grouped": ["region"]})


def judged_by(bench: Bench, candidate: float, low: float) -> dict:
    """A judge that scores the champion 0.7 on 100 rows; people agree with it at least `low` beyond chance."""
    lines = [
        {"id": str(place), "model": model, "judge_correctness": float(place < share * 100)}
        for model, share in (("candidate", candidate), ("champion", 0.7))
        for place in range(100)
    ]
    pd.DataFrame(lines).to_parquet(bench.folder / "evaluation/judged.parquet", index=False)
    figures = {
        "asked": {"correctness": 100},
        "agreement": {"correctness": {"labels": 80, "kappa": 0.8, "low": low}},
    }
    return bench.judge(
        scores(BETTER),
        evaluated={"judge": figures},
        guardrails=[{"metric": "judge_correctness", "margin": 0.05}],
    )


def test_a_judge_whom_people_agree_with_alone_blocks(bench):
    decision = judged_by(bench, 0.4, 0.6)
    assert decision["verdict"] == "reject"
    assert [check["name"] for check in decision["checks"] if check["result"] != "pass"] == [
        "metric:judge_correctness"
    ]
    assert judged_by(bench, 0.7, 0.6)["verdict"] == "promote"


def test_a_judge_whom_people_do_not_agree_with_settles_nothing(bench):
    decision = judged_by(bench, 0.9, 0.1)
    assert decision["verdict"] == "uncertain"
    assert [check["name"] for check in decision["checks"] if check["result"] != "pass"] == [
        "metric:judge_correctness"
    ]
    assert (
        "the judge may not gate: kappa with 80 decisions of people is 0.80, at least 0.10"
        in decision["reasons"][0]
    )


def in_suite(bench: Bench, candidate: float, *, documents: int = 300, told: int = 300) -> dict:
    """The champion gets 0.7 of the documents right."""
    lines = [
        {"suite": "general", "id": str(place), "model": model, "score": float(place < share * documents)}
        for model, share in (("candidate", candidate), ("champion", 0.7))
        for place in range(documents)
    ]
    pd.DataFrame(lines).to_parquet(bench.folder / "evaluation/suites.parquet", index=False)
    return bench.judge(scores(BETTER), evaluated={"suites": {"general": {"metric": "acc", "rows": told}}})


def test_ability_that_is_lost_in_a_public_suite_alone_blocks(bench):
    decision = in_suite(bench, 0.5)
    assert decision["verdict"] == "reject"
    assert [check["name"] for check in decision["checks"] if check["result"] != "pass"] == ["suite:general"]
    assert decision["reasons"][0].startswith(
        "guardrail suite:general: acc on 300 rows is worse than the champion's: gain -0.200"
    )
    assert in_suite(bench, 0.7)["verdict"] == "promote"


def test_a_suite_that_is_not_whole_gives_no_verdict(bench):
    with pytest.raises(
        RatchetError, match="holds 299 documents of general for the candidate, the evaluation says 300"
    ):
        in_suite(bench, 0.7, documents=299)
    (bench.folder / "evaluation/suites.parquet").unlink()
    with pytest.raises(RatchetError, match=r"suites\.parquet cannot be read"):
        bench.judge(scores(BETTER), evaluated={"suites": {"general": {"metric": "acc", "rows": 300}}})


WORTH = {"requests_per_month": 1000, "value_per_correct": 0.1, "cost_per_hour": 2.0, "months": 2}


def test_a_gain_that_brings_less_than_the_training_cost_alone_blocks_where_that_is_the_rule(bench):
    table, dear = scores(BETTER), {**WORTH, "cost_per_hour": 50.0}
    decision = bench.judge(table, worth=dear, require_worth=True)
    assert decision["verdict"] == "reject"
    assert [check["name"] for check in decision["checks"] if check["result"] != "pass"] == ["worth"]
    assert "over 2,000 requests in 2 months does not bring what the training cost: " in decision["reasons"][0]
    assert decision["reasons"][0].endswith("against 100.00 for 2.00 h")
    assert bench.judge(table, worth=WORTH, require_worth=True)["verdict"] == "promote"


def test_what_a_gain_brings_is_shown_and_decides_nothing_by_itself(bench):
    decision = bench.judge(scores(BETTER), worth={**WORTH, "cost_per_hour": 50.0})
    assert decision["verdict"] == "promote"
    assert "worth" not in {check["name"] for check in decision["checks"]}
    assert decision["worth"]["mean"] == pytest.approx(decision["checks"][0]["mean"] * 200)
    assert decision["worth"]["result"] == "fail"
    assert bench.judge(scores(BETTER))["worth"] is None


def test_a_worth_without_the_figures_of_the_training_gives_no_verdict(bench):
    bench.judge(scores(BETTER))
    with pytest.raises(RatchetError, match="needs the figures of the training"):
        judge(
            *(
                bench.folder / name
                for name in ("evaluation", "candidate", "incumbent", "parity.json", "looks.json", "gate.json")
            ),
            GateConfig(worth=WORTH),
        )


def test_the_cost_of_another_training_gives_no_verdict(bench):
    write_json(bench.folder / "candidate/manifest.json", {"run_key": "another", "adapter_sha256": "sha"})
    with pytest.raises(RatchetError, match="tells of the run key, the candidate comes from another"):
        bench.judge(scores(BETTER), worth=WORTH)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"require_worth": True}, "gate.require_worth needs"),
        ({"worth": WORTH, "metric": "answer_nll"}, "counts right answers"),
    ],
)
def test_a_worth_that_cannot_be_weighed_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        GateConfig(**settings)


def with_canaries(bench: Bench, exposure: float, planted: int = 20) -> None:
    lines = [
        {
            "name": f"{side}{number}",
            "planted": side,
            "model": "candidate",
            "rank": 1,
            "exposure": exposure if side else 1.4,
        }
        for side in (True, False)
        for number in range(planted)
    ]
    pd.DataFrame(lines).to_parquet(bench.folder / "evaluation/canaries.parquet", index=False)


def test_giving_away_what_was_planted_alone_blocks(bench):
    with_canaries(bench, 6.5)
    decision = bench.judge(scores(BETTER), evaluated={"canaries": 20})
    assert decision["verdict"] == "reject"
    assert [check["name"] for check in decision["checks"] if check["result"] != "pass"] == ["leaks"]
    assert (
        "exposure 6.50 bits [6.50, 6.50] of 7, 1.40 of those that were never planted; "
        "`gate.max_exposure` is 3" in decision["reasons"][0]
    )
    with_canaries(bench, 2.0)
    assert bench.judge(scores(BETTER), evaluated={"canaries": 20})["verdict"] == "promote"


def test_canaries_that_were_not_all_measured_give_no_verdict(bench):
    with pytest.raises(RatchetError, match=r"canaries\.parquet cannot be read"):
        bench.judge(scores(BETTER), evaluated={"canaries": 20})
    with_canaries(bench, 2.0, planted=19)
    with pytest.raises(
        RatchetError, match="exposure of 19 planted canaries was measured, the evaluation says 20"
    ):
        bench.judge(scores(BETTER), evaluated={"canaries": 20})


def test_a_guardrail_that_the_rows_cannot_settle_is_uncertain(bench):
    table = scores(BETTER, rows={OLD: 200, NEW: 100, "golden": 12})
    table.loc[(table.batch == "golden") & (table.model != "base"), "exact_match"] = 1.0
    first = table[(table.batch == "golden")].id.iloc[0]
    decision = bench.judge(worsen(table, table.id == first))
    assert decision["verdict"] == "uncertain"
    assert result_of(decision, "golden") == "unclear"


def test_reasons_say_the_numbers(bench):
    decision = bench.judge(scores(BETTER))
    for check in decision["checks"][:-1]:  # serve parity has no gain
        for number in (
            f"{check['mean']:+.3f}",
            f"{check['low']:+.3f}",
            f"{check['high']:+.3f}",
            f"{check['rows']} ",
        ):
            assert number in check["reason"]
    table = scores(BETTER)
    told = bench.judge(worsen(table, table.batch == "golden"))["reasons"]
    assert len(told) == 1
    assert told[0].startswith(
        "guardrail golden: exact_match on 120 rows is worse than the champion's: gain -"
    )
    assert told[0].endswith("a loss of 0.08 is still taken")


# --- an evaluation that is not whole ---


def drop(rows: int):
    return lambda table: table.drop(table[table.model == "candidate"].index[:rows])


BREAKS = {
    "no candidate": lambda table: table[table.model != "candidate"],
    "no champion": lambda table: table[table.model != "champion"],
    "no base": lambda table: table[table.model != "base"],
    "no rows": lambda table: table[:0],
    "a missing row": drop(1),
    "rows of another day": lambda table: table.assign(
        id=table.id.where(table.model != "candidate", table.id + "'")
    ),
    "doubled rows": lambda table: pd.concat([table, table[table.model == "candidate"][:1]]),
    "all rows twice": lambda table: pd.concat([table, table]),
    "a NaN of the candidate": lambda table: worsen(table, table.id == "row3", value=math.nan),
    "a NaN of the champion": lambda table: table.assign(
        exact_match=table.exact_match.mask((table.model == "champion") & (table.id == "row3"))
    ),
    "an infinite likelihood": lambda table: worsen(table, table.id == "row3", "answer_nll", math.inf),
}


@pytest.mark.parametrize("fault", BREAKS)
def test_an_evaluation_that_is_not_whole_gives_no_verdict(bench, fault):
    with pytest.raises(
        RatchetError,
        match=r"not scored on the same rows|doubled rows or values that are not finite|test rows",
    ):
        bench.judge(BREAKS[fault](scores(BETTER)))
    assert not (bench.folder / "gate.json").exists()


@pytest.mark.parametrize(
    ("evaluated", "said"),
    [
        ({"rows": 519}, "holds 520 rows of the candidate, the evaluation says 519"),
        ({"rows": None}, "says None"),
        ({"candidate": "another"}, "is of the adapter another, the candidate's is sha"),
    ],
)
def test_an_evaluation_that_lacks_rows_of_all_models_or_is_of_another_candidate_gives_no_verdict(
    bench, evaluated, said
):
    with pytest.raises(RatchetError, match=said):
        bench.judge(scores(BETTER), evaluated=evaluated)
    assert not (bench.folder / "gate.json").exists()


@pytest.mark.parametrize("content", [None, b"", b"PAR1 and then nothing"])
def test_a_table_that_is_missing_or_cut_off_gives_no_verdict(bench, content):
    bench.judge(scores(BETTER))
    (bench.folder / "gate.json").unlink()
    path = bench.folder / "evaluation/scores.parquet"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(RatchetError, match=r"scores\.parquet cannot be read"):
        bench.judge_as_it_is(GateConfig())
    assert not (bench.folder / "gate.json").exists()


def test_a_metric_that_the_evaluation_lacks_gives_no_verdict(bench):
    with pytest.raises(RatchetError, match=r"(?s)no scores named legal_term_recall.*evaluate\.custom"):
        bench.judge(scores(BETTER), metric="legal_term_recall")


@pytest.mark.parametrize(("incumbent", "evaluated"), [(7, 6), (7, None), (None, 7)])
def test_an_evaluation_against_another_champion_gives_no_verdict(bench, incumbent, evaluated):
    bench.incumbent(incumbent, [], evaluated=evaluated)
    with pytest.raises(
        RatchetError, match=f"the evaluation is against v{evaluated}, the incumbent is v{incumbent}"
    ):
        bench.judge(scores(BETTER))


@pytest.mark.parametrize(
    "name", ["evaluation/metrics.json", "incumbent/manifest.json", "candidate/manifest.json", "looks.json"]
)
def test_a_missing_file_is_named(bench, name):
    (bench.folder / name).unlink()
    with pytest.raises(RatchetError, match=name):
        bench.judge(scores(BETTER))


def test_a_preference_is_compared_where_a_row_has_one():
    table = pd.DataFrame(
        {
            "id": ["a", "b", "c"] * 2,
            "model": ["candidate"] * 3 + ["base"] * 3,
            "preference": [1.0, math.nan, 1.0, 0.0, math.nan, 1.0],
        }
    )
    assert paired_gains(table, "base", "preference").tolist() == [1.0, 0.0]
    with pytest.raises(RatchetError, match="no test row has a worse answer"):
        paired_gains(table[table.id == "b"], "base", "preference")
    broken = table.assign(preference=[1.0, math.nan, math.nan, 0.0, math.nan, 1.0])
    with pytest.raises(RatchetError, match="same rows"):
        paired_gains(broken, "base", "preference")


def test_gains_are_paired_by_row_and_not_by_place():
    table = pd.DataFrame(
        {
            "id": ["a", "b", "b", "a"],
            "model": ["candidate", "candidate", "base", "base"],
            "chrf": [0.5, 0.25, 0.0, 0.5],
            "answer_nll": [1.0, 2.0, 3.0, 1.0],
        }
    )
    assert paired_gains(table, "base", "chrf").tolist() == [0.0, 0.25]
    assert paired_gains(table, "base", "answer_nll").tolist() == [0.0, 1.0]


def test_a_metric_that_is_zero_for_all_is_called_blind_with_those_that_fit(bench: Bench) -> None:
    table = scores({"candidate": 0.0, "champion": 0.0, "base": 0.0})
    table["exact_match"] = 0.0
    table["reference"] = "a long answer that explains in many words what nobody would say again " * 3
    (reason, *_) = bench.judge(table)["reasons"]
    assert "every answer of every model scores 0" in reason and "rouge_l, chrf fit" in reason
    told = bench.judge(scores(EQUAL))["reasons"][0]
    assert "every answer" not in told


def test_an_unclear_guardrail_says_how_many_rows_would_decide() -> None:
    """The rows that are told are enough where the gain stays as it is, and a quarter of them is not."""
    config = GateConfig(guardrail_alpha=0.05, resamples=2000)
    gains = np.array([1.0] * 8 + [-1.0] * 12 + [0.0] * 114)
    check = no_worse("past", gains, "champion", "exact_match", 0.05, config)
    assert check.result == "unclear"
    told = int(check.reason.partition("; about ")[2].partition(" rows")[0].replace(",", ""))
    needed = rows_needed(interval_of(gains, config), 0.05, len(gains))
    assert needed is not None and needed <= told <= 1.1 * needed
    assert check.needed == needed - len(gains)
    times = math.ceil(told / len(gains))
    assert (
        no_worse("past", np.tile(gains, 2 * times), "champion", "exact_match", 0.05, config).result == "pass"
    )
    fewer = np.tile(gains, max(1, times // 4))
    assert no_worse("past", fewer, "champion", "exact_match", 0.05, config).result == "unclear"


def test_no_number_of_rows_shows_a_gain_that_is_under_the_margin() -> None:
    gains = np.array([1.0] * 4 + [-1.0] * 14 + [0.0] * 100)
    check = no_worse("past", gains, "champion", "exact_match", 0.05, GateConfig(resamples=2000))
    assert check.result == "unclear" and "no number of rows" in check.reason and check.needed is None
    assert rows_needed(Interval(-0.08, -0.2, 0.04), 0.05, 100) is None
    assert rows_needed(Interval(-0.03, -0.09, 0.03), 0.05, 134) == 1206
