"""Sections of params.yaml: the drift monitor and rollouts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ratchet.config.base import Count, Section, Share
from ratchet.config.evaluation import JudgeConfig


class TopicSource(Section):
    """A source of rows for drifted topics that match."""

    match: str = Field(
        description="regular expression; a topic takes its rows here if one of its terms or example prompts "
        "matches"
    )
    source: Literal["pydoc", "jsonl", "sql", "feedback"] = Field(
        default="feedback", description="source of the rows"
    )
    packages: list[str] = Field(default=[], description="import names, for `pydoc`")
    path: str = Field(default="", description="file, glob or URL, for `jsonl`; the database's URL, for `sql`")
    query: str = Field(default="", description="query, for `sql`")
    columns: dict[str, str] | None = Field(
        default=None, description="columns of this source, in place of `ingest.columns`"
    )

    def arguments(self) -> dict[str, Any]:
        """Return what `ingest` takes for this source."""
        return {
            "source": self.source,
            "path": self.path or None,
            "packages": self.packages or None,
            "query": self.query or None,
            "columns": self.columns,
        }


class QualityConfig(Section):
    """The share of right answers, from a judge on all requests and from people on a few of them."""

    labels_per_day: int = Field(
        default=0,
        ge=0,
        description="answers of a day that people are asked about in the review queue, to correct the "
        "judge; 0: the quality is not watched",
    )
    false_alarms_per_month: float = Field(
        default=0.05,
        gt=0,
        lt=0.5,
        description="share of months (30 days with traffic) without a fall that may end in an alarm, all "
        "looks of the month together",
    )
    margin: Share = Field(
        default=0.0, description="fall of the share of right answers (0 to 1) that is accepted"
    )
    judge: JudgeConfig = Field(
        default_factory=JudgeConfig,
        description="a model that scores every request's answer. Users' requests are sent to it, so it is "
        "named apart from `evaluate.judge`; without one people's answers count alone, and a fall is found "
        "later",
    )


class MonitorConfig(Section):
    """The flow `monitor`: it tests whether the traffic still resembles the champion's data."""

    cron: str = Field(default="0 * * * *", description="schedule of the deployment, in cron syntax, UTC")
    window: Count = Field(
        default=500,
        description="number of newest requests that are compared with the reference; more detect smaller "
        "drift, but later",
    )
    max_age_hours: float = Field(
        default=168.0, gt=0, description="age in hours beyond which requests are not compared"
    )
    min_prompts: int = Field(
        default=50,
        ge=20,
        description="distinct prompts in the window below which there is no verdict; the false-alarm rate "
        "holds for any number, but few prompts can show only large drift",
    )
    false_alarm_rate: float = Field(
        default=0.05,
        gt=0,
        lt=0.5,
        description="share of windows without drift in which the verdict may be `drift`; lower it for fewer "
        "false alarms, at the price of missing small drift",
    )
    resamples: int = Field(
        default=2000,
        ge=200,
        description="permutations of window and reference from which the p-values are computed",
    )
    latency_margin: float = Field(
        default=0.5,
        ge=0,
        description="rise of the latency, as a share of the champion's earlier latency, that is not drift",
    )
    topics: Count = Field(default=8, description="drifted topics that are named, at most")
    seed: int = Field(default=7, ge=0, description="seed of the permutations and the clusters")
    retrain: bool = Field(default=True, description="whether drift may start a retraining")
    min_new_rows: Count = Field(
        default=200,
        description="labelled rows unknown to the champion that a retraining needs; 10 % of the rows that "
        "it has seen are enough where that is fewer, but at least 20",
    )
    max_retrains_per_week: Count = Field(
        default=3,
        description="retrainings in seven days, started by anything, beyond which drift starts none",
    )
    max_gpu_hours_per_week: float = Field(
        default=10.0,
        gt=0,
        description="hours of training in seven days beyond which drift starts none; hours on a CPU count "
        "too",
    )
    cooldown_hours: float = Field(
        default=24.0, ge=0, description="hours after a retraining during which drift starts none"
    )
    sources: list[TopicSource] = Field(
        default=[],
        description="where rows of drifted topics come from: `match`, a regular expression for a topic's "
        "terms or example prompts; `source`; `packages` for `pydoc`, `path` for `jsonl` (a file of any "
        "form), `path` and `query` for `sql`; `columns` in place of `ingest.columns`. Approved feedback is "
        "always added",
    )
    quality: QualityConfig = Field(
        default_factory=QualityConfig, description="whether the answers are still right"
    )


class RolloutConfig(Section):
    """The flow `rollout`: it moves traffic in steps to a version that passed the gate, or back."""

    look_seconds: float = Field(
        default=60.0,
        ge=5,
        description="seconds between two looks at an open rollout; a decision in MLflow's UI is seen within "
        "15 s anyway",
    )
    steps: list[Annotated[float, Field(gt=0, le=1.0)]] = Field(
        default=[0.05, 0.25, 0.5, 1.0],
        min_length=1,
        description="shares of the users that the challenger answers, step by step; the last one has to be "
        "1.0, at which it becomes the champion",
    )
    step_minutes: float = Field(default=60.0, ge=0, description="minimum duration of a step, in minutes")
    step_users: Count = Field(
        default=30, description="users that each arm needs in a step before the next step"
    )
    min_users: Count = Field(
        default=200,
        description="users with feedback that each arm needs before the challenger may become the champion",
    )
    max_hours: float = Field(
        default=168.0,
        gt=0,
        description="hours after which a rollout without enough evidence ends and the champion stays",
    )
    alpha: float = Field(
        default=0.05,
        gt=0,
        lt=0.5,
        description="probability that a rollout of an equally good model ends wrongly, over all its looks "
        "together",
    )
    min_gain: float = Field(
        default=0.0,
        description="gain in the mean feedback score (0 to 1) that the lower confidence bound has to "
        "exceed; below 0 also a challenger that is worse by at most this much may win",
    )
    feedback_margin: Share = Field(
        default=0.0,
        description="accepted loss in the mean feedback score (0 to 1); a certain loss beyond it rolls back",
    )
    error_margin: Share = Field(
        default=0.02,
        description="accepted rise in the share of failed requests; a certain rise beyond it rolls back",
    )
    empty_margin: Share = Field(
        default=0.02,
        description="accepted rise in the share of empty answers; a certain rise beyond it rolls back",
    )
    latency_margin: float = Field(
        default=0.25,
        ge=0,
        description="accepted rise of the latency, as a share of the champion's; a certain rise beyond it "
        "rolls back",
    )

    @model_validator(mode="after")
    def _rising(self) -> RolloutConfig:
        if self.steps != sorted(set(self.steps)) or self.steps[-1] != 1.0:
            raise ValueError(
                f"rollout.steps is {self.steps}; wanted rising shares that end with 1.0, such as [0.05, "
                "0.25, 0.5, 1.0]"
            )
        return self
