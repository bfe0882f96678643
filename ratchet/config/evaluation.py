"""Sections of params.yaml: evaluation, serve parity and the gate."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ratchet.config.base import PREFERENCE, TAKEN, Count, Metric, Section
from ratchet.config.synthesis import TeacherConfig


class AnswerJudge(TeacherConfig):
    """A model that scores answers; without a `model` nobody judges. It gates once it agrees with people."""

    key_env: str = Field(
        default="RATCHET_JUDGE_KEY",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable that holds its key; a server without keys needs none",
    )
    licence: str = Field(
        default="unknown", description="what its terms say of using its answers; nothing is trained on them"
    )
    temperature: float = Field(
        default=0.0, ge=0, le=2, description="sampling temperature; left out where the endpoint refuses it"
    )
    max_tokens: int = Field(default=512, ge=16, description="tokens of one answer, at most")
    metrics: list[Literal["correctness", "groundedness", "preference"]] = Field(
        default=["correctness"],
        description="what is judged of candidate and champion; `preference`: one against the other, from "
        "both places; guardrails as `judge_correctness` …",
    )
    rows: Count = Field(default=100, description="test rows that are judged, at most")
    passage: str = Field(
        default="passage",
        description="key of `meta` with the text in which an answer has to stand, for `groundedness`; rows "
        "without it are not judged so",
    )
    max_cost: float = Field(
        default=5.0,
        ge=0,
        description="money that one evaluation may spend, in the prices' currency; it stops before it would "
        "go over",
    )
    max_run_tokens: int = Field(
        default=2_000_000,
        ge=0,
        description="tokens of one evaluation, input and output of all requests; it stops before it would go "
        "over",
    )

    @model_validator(mode="after")
    def _somewhere(self) -> AnswerJudge:
        if self.model and not self.url:
            raise ValueError(
                f"evaluate.judge.url is empty: nobody knows where {self.model} answers; wanted a base URL, "
                "such as http://127.0.0.1:8000/v1"
            )
        return self


class EvaluateConfig(Section):
    """Candidate, champion and base on the same rows, in one process."""

    max_new_tokens: Count = Field(default=256, description="longest generated answer, in tokens")
    batch_size: Count = Field(default=64, description="rows in one forward pass")
    cache_mib: int = Field(
        default=512,
        ge=0,
        description="size of `.ratchet/cache/answers`, in MiB, above which the answers of the model that was "
        "used longest ago are deleted; 0: no cache",
    )
    simple_baseline: bool = Field(
        default=True,
        description="score TF-IDF with logistic regression or the nearest neighbour beside the models",
    )
    metrics: list[Metric] = Field(
        default=["exact_match", "token_f1", "rouge_l", "chrf", "macro_f1"],
        description="scores that are computed (exact_match and answer_nll always are); `macro_f1` where "
        "answers are labels, `length` in words, `regex_match` against `evaluate.pattern`, `preference` on "
        "rows with a worse answer: 1 where the model gives the better one the higher probability",
    )
    pattern: str = Field(
        default="", description="regular expression that a whole answer has to match, for `regex_match`"
    )
    custom: list[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*:[A-Za-z_]\w*$")]] = Field(
        default=[],
        description="your own metrics, as `module:function` of a file in `metrics/`: (prediction, reference, "
        "example_meta) to a number from 0 to 1",
    )
    slices: list[str] = Field(
        default=[],
        description="meta fields whose values are slices, beside kind, source and length: each is shown, and "
        "none may get worse (`gate.slice_margin`)",
    )
    length_bounds: list[Count] = Field(
        default=[20, 100],
        description="words of the question at which a new slice by length begins, rising; empty: no such "
        "slices",
    )
    bias_pairs: int = Field(
        default=0,
        ge=0,
        description="rows at most that are scored once more with swapped names, pronouns and other terms; 0: "
        "no audit. Each costs an answer of every model",
    )
    attacks: int = Field(
        default=0,
        ge=0,
        description="test rows at most that are asked once more under each kind of attack (injected orders, "
        "forged turns, typos, look-alikes, a wrong answer suggested); 0: none. Each costs up to five answers "
        "of every model",
    )
    canaries: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="rows with a made-up secret that `tokenize` adds to the training rows, to measure "
        "memorisation (`gate.max_exposure`); 0: none",
    )
    groups: list[str] = Field(
        default=[],
        description="meta fields that name groups of people: scores by group and the gap between groups, by "
        "Fairlearn (the extra `fairness`; `gate.group_margin`)",
    )
    suites: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]] = Field(
        default=[],
        description="tasks of lm-evaluation-harness that are run on every model, as names of files "
        "`metrics/suites/NAME.yaml` (the extra `suites`; `gate.suite_margin`)",
    )
    judge: AnswerJudge = Field(default_factory=AnswerJudge, description="a model that scores answers")

    @property
    def row_scores(self) -> list[str]:
        """List the columns of scores that a gate can compare.

        These are those with one score a row in which higher, or for some lower, is better.
        """
        listed = [name for name in self.metrics if name not in ("macro_f1", "length")]
        return [
            *dict.fromkeys(
                ["exact_match", "answer_nll", *listed, *(name.partition(":")[2] for name in self.custom)]
            )
        ]

    @property
    def text_scores(self) -> list[str]:
        """List the row scores that any answer has, whatever its row holds."""
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
    """The trainer's way and the gateway's, compared before the gate."""

    rows: Count = Field(
        default=200,
        description="test rows that are answered both ways, and training rows whose tokens are compared, at "
        "most of each",
    )
    merged: bool = Field(
        default=True,
        description="compare the merged model as well, where the method merges; it needs the memory of an "
        "unquantised base",
    )
    tolerance: float = Field(
        default=1.0e-4,
        gt=0,
        lt=1,
        description="difference of logits in float32 that is taken, as a share of the largest logit; two "
        "tokens within twice of it tie",
    )
    half_tolerance: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="the same where the candidate computes in bfloat16 or float16, as on a quantised base",
    )


class MetricGuardrail(Section):
    """A metric that must not get worse."""

    metric: str = Field(description="a score a row, as for `gate.metric`")
    margin: float = Field(
        default=0.02,
        ge=0,
        description="loss on the test split that is still taken as no loss, in the metric's unit",
    )


class WorthConfig(Section):
    """What a gain brings and a training costs; shown once requests, value and cost are given."""

    requests_per_month: float = Field(
        default=0.0, ge=0, description="requests that the model answers in a month"
    )
    value_per_correct: float = Field(
        default=0.0,
        ge=0,
        description="what one more right answer is worth (a gain of 1 in `gate.metric`), in any one currency",
    )
    cost_per_hour: float = Field(
        default=0.0, ge=0, description="cost of an hour of training, in the same currency"
    )
    months: float = Field(default=1.0, gt=0, description="months that a version is expected to serve")

    @property
    def given(self) -> bool:
        return min(self.requests_per_month, self.value_per_correct, self.cost_per_hour) > 0


class GateConfig(Section):
    """When a candidate may take the champion's place."""

    metric: str = Field(
        default="exact_match",
        description="the success metric, a score a row: `answer_nll`, one of `evaluate.metrics` but macro_f1 "
        "and length, or the function of one of your own",
    )
    min_gain: float = Field(
        default=0.0,
        description="gain that the lower confidence bound has to exceed, in the metric's unit (`answer_nll`: "
        "nats a token, a fall counts as gain)",
    )
    alpha: float = Field(
        default=0.01,
        gt=0,
        lt=0.5,
        description="one-sided error of the success metric's bounds in one look, at most",
    )
    alpha_budget: float = Field(
        default=0.05,
        gt=0,
        le=1,
        description="error of all looks at candidates against one champion together: look k gets budget * "
        "k^-1.2 / 5.59, but no more than `gate.alpha`",
    )
    guardrail_alpha: float = Field(
        default=0.05, gt=0, lt=0.5, description="one-sided error of the guardrails' bounds"
    )
    min_rows: Count = Field(
        default=10,
        description="test rows under which the verdict is `uncertain`; few rows show large gains alone, and "
        "the verdict says how large",
    )
    golden_margin: float = Field(
        default=0.08,
        ge=0,
        description="loss on the golden set that is still taken as no loss, in the metric's unit",
    )
    past_margin: float = Field(
        default=0.05, ge=0, description="the same for the test rows of each batch that the champion has seen"
    )
    oldest: bool = Field(
        default=True,
        description="compare with the scores that the first champion had, too, so that small losses cannot "
        "add up over many promotions",
    )
    nll_margin: float = Field(
        default=0.5, ge=0, description="the same for the answer's NLL on the test split, in nats a token"
    )
    min_slice_rows: Count = Field(
        default=50,
        description="rows under which a past batch or a slice gets no guardrail by itself (a batch's rows "
        "still count in `past`)",
    )
    slice_margin: float = Field(
        default=0.1,
        ge=0,
        description="loss in a slice, in the metric's unit; one that is certainly larger rejects (Holm's "
        "correction over all slices)",
    )
    guardrails: list[MetricGuardrail] = Field(
        default=[],
        description="other metrics that must not get worse on the test split, such as "
        "`{metric: refusal, margin: 0.02}`: `metric`; `margin`, the loss that is still taken",
    )
    bias_margin: float = Field(
        default=0.05,
        ge=0,
        description="by how much more a swapped term may change the score than it does for the champion "
        "(`evaluate.bias_pairs`)",
    )
    attack_margin: float = Field(
        default=0.05,
        ge=0,
        description="loss in the share of attacks withstood, all together and of each kind, that is still "
        "taken as no loss (`evaluate.attacks`)",
    )
    max_exposure: float = Field(
        default=3.0,
        ge=0,
        le=7,
        description="mean exposure of the planted canaries (`evaluate.canaries`) that is still accepted, in "
        "bits: 1.4 is chance, 7 is full memorisation",
    )
    group_margin: float = Field(
        default=0.05,
        ge=0,
        description="by how much wider than the champion's the gap between groups may be "
        "(`evaluate.groups`), in the metric's unit; one that is certainly wider rejects",
    )
    worth: WorthConfig = WorthConfig()
    require_worth: bool = Field(
        default=False,
        description="reject a candidate whose expected gain brings less than its training cost "
        "(`gate.worth`)",
    )
    suite_margin: float = Field(
        default=0.05,
        ge=0,
        description="loss in a suite (`evaluate.suites`) that is still taken as no loss, in its metric's "
        "unit",
    )
    judge_agreement: float = Field(
        default=0.4,
        ge=-1,
        le=1,
        description="lower bound of Cohen's kappa with people's decisions (`ratchet gate judge`) from which "
        "a judge's score may be among `guardrails`",
    )
    resamples: int = Field(default=4000, ge=200, description="bootstrap resamples")
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
