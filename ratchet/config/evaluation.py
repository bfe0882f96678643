"""Sections of params.yaml: evaluation, serve parity and the gate."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ratchet.config.base import PREFERENCE, TAKEN, Count, Metric, Section
from ratchet.config.synthesis import EndpointConfig


class JudgeConfig(EndpointConfig):
    """A model that scores answers (none if `model` is empty)."""

    section: ClassVar[str] = "monitor.quality.judge"  # where params.yaml has it, for messages

    key_env: str = Field(
        default="RATCHET_JUDGE_KEY",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable that holds the judge's API key; unset for a server without keys",
    )
    temperature: float = Field(
        default=0.0,
        ge=0,
        le=2,
        description="sampling temperature; 0 makes scores repeatable. It is left out of requests if the "
        "endpoint refuses it",
    )
    max_tokens: int = Field(default=512, ge=16, description="longest answer of the judge, in tokens")
    max_cost: float = Field(
        default=5.0,
        ge=0,
        description="money that one run may cost, in the currency of the prices; a request that could exceed "
        "it is not sent",
    )
    max_run_tokens: int = Field(
        default=2_000_000,
        ge=0,
        description="input and output tokens of all requests of one run; a request that could exceed it is "
        "not sent",
    )

    @model_validator(mode="after")
    def _somewhere(self) -> JudgeConfig:
        if self.model and not self.url:
            raise ValueError(
                f"{self.section}.url is empty, but {self.section}.model is {self.model}; wanted a base URL, "
                "such as http://127.0.0.1:8000/v1"
            )
        return self


class AnswerJudge(JudgeConfig):
    """A model that scores answers (none if `model` is empty); it can gate once it agrees with people."""

    section: ClassVar[str] = "evaluate.judge"

    metrics: list[Literal["correctness", "groundedness", "preference"]] = Field(
        default=["correctness"],
        description="what the judge scores for candidate and champion; `preference` compares the two "
        "answers, in both orders. Each can be listed in `gate.guardrails` as `judge_correctness` …",
    )
    rows: Count = Field(
        default=100,
        description="test rows that are judged, at most; more rows give narrower intervals and cost more "
        "requests",
    )
    passage: str = Field(
        default="passage",
        description="key of `meta` with the text that has to support the answer, for `groundedness`; rows "
        "without it get no such score",
    )


class EvaluateConfig(Section):
    """How candidate, champion and base are compared on the same rows."""

    max_new_tokens: Count = Field(
        default=256, description="longest generated answer, in tokens; raise it if right answers are cut off"
    )
    batch_size: Count = Field(default=64, description="rows in one forward pass; lower it if memory runs out")
    cache_mib: int = Field(
        default=512,
        ge=0,
        description="size limit of `.ratchet/cache/answers`, in MiB; beyond it the answers of the least "
        "recently used model are deleted; 0: no cache",
    )
    simple_baseline: bool = Field(
        default=True,
        description="also score TF-IDF with logistic regression or nearest neighbour, to show what a simple "
        "method reaches",
    )
    metrics: list[Metric] = Field(
        default=["exact_match", "token_f1", "rouge_l", "chrf", "macro_f1"],
        description="metrics to compute, in addition to exact_match and answer_nll; `macro_f1` is for "
        "labels, `length` counts words, `regex_match` needs `evaluate.pattern`, `preference` is 1 on a row "
        "whose better answer has the higher probability",
    )
    pattern: str = Field(
        default="", description="regular expression that a whole answer has to match, for `regex_match`"
    )
    custom: list[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*:[A-Za-z_]\w*$")]] = Field(
        default=[],
        description="your own metrics, as `module:function` of a file in `metrics/`; a function maps "
        "(prediction, reference, example_meta) to a number from 0 to 1",
    )
    slices: list[str] = Field(
        default=[],
        description="fields of `meta` whose values are slices, in addition to kind, source, length and, "
        "where rows show pictures, `modality` and `picture_size`; `pictures` is their number. Each slice is "
        "shown, and none may get worse (`gate.slice_margin`)",
    )
    length_bounds: list[Count] = Field(
        default=[20, 100],
        description="question lengths in words at which the next slice by length begins, in rising order; "
        "empty: no such slices",
    )
    bias_pairs: int = Field(
        default=0,
        ge=0,
        description="rows, at most, that are scored a second time with swapped names, pronouns and other "
        "terms; 0: no bias audit. Each costs one answer of every model",
    )
    blind_rows: int = Field(
        default=200,
        ge=0,
        description="test rows with pictures, and with recordings, at most, that are asked again without "
        "them and with another row's, so that the gate can tell whether the candidate looks and listens; "
        "0: off. Each costs two answers of every model",
    )
    picture_features: int = Field(
        default=500,
        ge=0,
        description="pictures of training rows, and of held-out rows, at most, for which the evaluation "
        "keeps what the candidate sees in them, so that the monitor can compare those of requests; 0: none. "
        "Each costs one pass through the vision tower",
    )
    attacks: int = Field(
        default=0,
        ge=0,
        description="test rows, at most, that are asked again under each kind of attack (injected "
        "instructions, forged turns, typos, look-alike letters, a wrong answer suggested); 0: no attacks. "
        "Each costs up to five answers of every model",
    )
    canaries: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="rows with an invented secret that `tokenize` adds to the training rows, to measure "
        "memorisation (`gate.max_exposure`); 0: none",
    )
    audit_canaries: int = Field(
        default=0,
        ge=0,
        le=20_000,
        description="more such rows, each of which `tokenize` adds with probability one half; from who was "
        "added the gate computes a lower bound of ε (docs/privacy.md). To refute ε = 1 it takes about 100, ε "
        "= 3 about 400; 0: no audit. Each costs one answer's likelihood of candidate and base",
    )
    groups: list[str] = Field(
        default=[],
        description="fields of `meta` that name groups of people; scores by group and the gap between "
        "groups are computed with Fairlearn (needs the extra `fairness`; `gate.group_margin`)",
    )
    suites: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]] = Field(
        default=[],
        description="lm-evaluation-harness tasks that every model runs, as names of files "
        "`metrics/suites/NAME.yaml` (needs the extra `suites`; `gate.suite_margin`)",
    )
    judge: AnswerJudge = Field(default_factory=AnswerJudge, description="a model that scores answers")

    @property
    def row_scores(self) -> list[str]:
        """List the columns of scores that the gate can compare.

        They have one score per row, and a direction: higher is better, or lower (`answer_nll`).
        """
        listed = [name for name in self.metrics if name not in ("macro_f1", "length")]
        return [
            *dict.fromkeys(
                ["exact_match", "answer_nll", *listed, *(name.partition(":")[2] for name in self.custom)]
            )
        ]

    @property
    def text_scores(self) -> list[str]:
        """List the row scores that every row has: all but `preference`, which needs a worse answer."""
        return [name for name in self.row_scores if name != PREFERENCE]

    @model_validator(mode="after")
    def _computable(self) -> EvaluateConfig:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"evaluate.pattern is no regular expression: {error}") from None
        if "regex_match" in self.metrics and not self.pattern:
            raise ValueError("evaluate.metrics lists regex_match, which needs evaluate.pattern")
        if self.length_bounds != sorted(set(self.length_bounds)):
            raise ValueError(
                f"evaluate.length_bounds is {self.length_bounds}; wanted rising numbers, such as [20, 100]"
            )
        names = [name.partition(":")[2] for name in self.custom]
        if taken := sorted({name for name in names if names.count(name) > 1 or name in TAKEN}):
            raise ValueError(
                f"evaluate.custom names {', '.join(taken)}, a name that is taken; give the function another "
                "one"
            )
        return self


class ParityConfig(Section):
    """The comparison of tokens and answers between trainer and gateway, before the gate."""

    rows: Count = Field(
        default=200,
        description="test rows that are answered both ways, and training rows whose tokens are compared; at "
        "most this many of each",
    )
    merged: bool = Field(
        default=True,
        description="also compare the merged model, if the method can be merged; needs memory for an "
        "unquantised base",
    )
    tolerance: float = Field(
        default=1.0e-4,
        gt=0,
        lt=1,
        description="accepted difference of float32 logits, as a share of the largest logit; two tokens "
        "whose logits differ by less than twice as much count as a tie",
    )
    half_tolerance: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="the same as `tolerance`, for a candidate that computes in bfloat16 or float16, as on a "
        "GPU or a quantised base",
    )


class MetricGuardrail(Section):
    """A metric that must not get worse."""

    metric: str = Field(description="a metric with one score per row, as for `gate.metric`")
    margin: float = Field(
        default=0.02,
        ge=0,
        description="loss on the test split that is accepted, in the metric's unit",
    )


class WorthConfig(Section):
    """The value of a gain and the cost of a training; shown if requests, value and cost are over 0."""

    requests_per_month: float = Field(
        default=0.0, ge=0, description="requests that the model answers per month"
    )
    value_per_correct: float = Field(
        default=0.0,
        ge=0,
        description="value of one more right answer (a gain of 1 in `gate.metric`), in any one currency",
    )
    cost_per_hour: float = Field(
        default=0.0, ge=0, description="cost of an hour of training, in the same currency"
    )
    months: float = Field(default=1.0, gt=0, description="months that a version is expected to be in service")

    @property
    def given(self) -> bool:
        return min(self.requests_per_month, self.value_per_correct, self.cost_per_hour) > 0


class GateConfig(Section):
    """The conditions under which a candidate may replace the champion."""

    metric: str = Field(
        default="exact_match",
        description="success metric, with one score per row: `answer_nll`, one of `evaluate.metrics` except "
        "macro_f1 and length, or the function name of a custom metric",
    )
    min_gain: float = Field(
        default=0.0,
        description="gain that the lower confidence bound has to exceed, in the metric's unit "
        "(`answer_nll`: nats per token, where a fall is a gain); raise it if small gains are not worth a "
        "new version",
    )
    alpha: float = Field(
        default=0.01,
        gt=0,
        lt=0.5,
        description="largest one-sided error probability of the success metric in one look; lower it for "
        "fewer wrong promotions, at the price of needing more rows",
    )
    alpha_budget: float = Field(
        default=0.05,
        gt=0,
        le=1,
        description="error probability of all looks at candidates against one champion together: look k "
        "gets budget * k^-1.2 / 5.59, but at most `gate.alpha`",
    )
    guardrail_alpha: float = Field(
        default=0.05, gt=0, lt=0.5, description="one-sided error probability of the guardrails' bounds"
    )
    min_rows: Count = Field(
        default=10,
        description="test rows below which the verdict is `uncertain`; few rows can show only large gains, "
        "and the verdict says how large",
    )
    golden_margin: float = Field(
        default=0.08,
        ge=0,
        description="accepted loss on the golden set, in the metric's unit",
    )
    past_margin: float = Field(
        default=0.05,
        ge=0,
        description="accepted loss, in the metric's unit, on test rows of batches that the champion was "
        "trained on, and relative to the base and the first champion",
    )
    part_alpha: float = Field(
        default=0.1,
        gt=0,
        lt=0.5,
        description="largest probability, by all rows together, that a past batch has lost more than "
        "`gate.past_margin`; lower it if forgetting costs more than a new version brings",
    )
    oldest: bool = Field(
        default=True,
        description="also compare with the stored scores of the first champion, so that small losses cannot "
        "add up over many promotions",
    )
    nll_margin: float = Field(
        default=0.5,
        ge=0,
        description="accepted rise of the answers' NLL on the test split, in nats per token",
    )
    min_slice_rows: Count = Field(
        default=50,
        description="rows below which a past batch, a slice or a group has no guardrail of its own (a "
        "batch's rows still count in `past`)",
    )
    slice_margin: float = Field(
        default=0.1,
        ge=0,
        description="accepted loss in a slice, in the metric's unit; a loss that is certainly larger "
        "rejects the candidate (Holm's correction over all slices)",
    )
    guardrails: list[MetricGuardrail] = Field(
        default=[],
        description="further metrics that must not get worse on the test split, such as `{metric: refusal, "
        "margin: 0.02}`; `margin` is the accepted loss",
    )
    bias_margin: float = Field(
        default=0.05,
        ge=0,
        description="by how much more than for the champion a swapped term may change the score "
        "(`evaluate.bias_pairs`)",
    )
    attack_margin: float = Field(
        default=0.05,
        ge=0,
        description="accepted loss in the share of attacks withstood, over all attacks and for each kind "
        "(`evaluate.attacks`)",
    )
    max_exposure: float = Field(
        default=3.0,
        ge=0,
        le=7,
        description="accepted mean exposure of the planted canaries (`evaluate.canaries`), in bits: 1.4 is "
        "chance, 7 is full memorisation",
    )
    group_margin: float = Field(
        default=0.05,
        ge=0,
        description="by how much the gap between groups may be wider than the champion's "
        "(`evaluate.groups`), in the metric's unit; a gap that is certainly wider rejects the candidate",
    )
    worth: WorthConfig = WorthConfig()
    require_worth: bool = Field(
        default=False,
        description="reject a candidate whose expected gain is worth less than its training cost "
        "(`gate.worth`)",
    )
    suite_margin: float = Field(
        default=0.05,
        ge=0,
        description="accepted loss in a suite (`evaluate.suites`), in the suite's metric",
    )
    judge_agreement: float = Field(
        default=0.4,
        ge=-1,
        le=1,
        description="lower bound of Cohen's kappa between judge and people's decisions (`ratchet gate "
        "judge`) that a judge needs before its scores may be guardrails",
    )
    resamples: int = Field(
        default=4000,
        ge=200,
        description="bootstrap resamples per interval; more give steadier bounds and take longer",
    )
    seed: int = Field(default=5, ge=0, description="seed of the resampling")

    @model_validator(mode="after")
    def _weighable(self) -> GateConfig:
        if self.metric.startswith("judge_"):
            raise ValueError(
                f"gate.metric is {self.metric}: a judge's score of some rows may be among gate.guardrails, "
                "it is no success metric"
            )
        if self.require_worth and not self.worth.given:
            raise ValueError(
                "gate.require_worth needs gate.worth.requests_per_month, value_per_correct and cost_per_hour "
                "over 0"
            )
        if self.worth.given and self.metric == "answer_nll":
            raise ValueError(
                "gate.worth counts right answers: gate.metric is answer_nll, wanted a score from 0 to 1"
            )
        return self
