"""Sections of params.yaml: the drift monitor and rollouts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ratchet.config.base import Count, Section, Share


class TopicSource(Section):
    """Where rows of a drifted topic come from."""

    match: str = Field(
        description="regular expression; a topic one of whose terms or example prompts it finds gets its "
        "rows here"
    )
    source: Literal["pydoc", "jsonl", "feedback"] = Field(
        default="feedback", description="source of the rows"
    )
    packages: list[str] = Field(default=[], description="import names, for `pydoc`")
    path: str = Field(default="", description="file, glob or URL, for `jsonl`")


class MonitorConfig(Section):
    """The flow `monitor`: is the traffic still what the champion was made for?"""

    cron: str = Field(default="0 * * * *", description="schedule of the deployment, in cron's form, UTC")
    window: Count = Field(default=500, description="newest requests that are compared with the reference")
    max_age_hours: float = Field(
        default=168.0, gt=0, description="age of the oldest request that is compared, in hours"
    )
    min_prompts: int = Field(
        default=50,
        ge=20,
        description="distinct prompts in the window under which no verdict is given; the false-alarm rate "
        "holds at any number, but few prompts show large drift alone",
    )
    false_alarm_rate: float = Field(
        default=0.05,
        gt=0,
        lt=0.5,
        description="share of windows without drift in which the verdict may be `drift`",
    )
    resamples: int = Field(
        default=2000, ge=200, description="reference-against-reference draws that the thresholds come from"
    )
    latency_margin: float = Field(
        default=0.5,
        ge=0,
        description="answers that are slower by up to this share of the champion's earlier ones are no drift",
    )
    topics: Count = Field(default=8, description="topics that are named, at most")
    seed: int = Field(default=7, ge=0, description="seed of the draws and the clusters")
    retrain: bool = Field(default=True, description="drift may start a retraining")
    min_new_rows: Count = Field(
        default=200,
        description="labelled rows that the champion has not seen, without which no retraining starts; a "
        "tenth of those that it has seen is enough where that is fewer, but at least 20",
    )
    max_retrains_per_week: Count = Field(
        default=3,
        description="retrainings in seven days, whatever started them, over which drift starts no other",
    )
    max_gpu_hours_per_week: float = Field(
        default=10.0, gt=0, description="hours of training in seven days over which drift starts no other"
    )
    cooldown_hours: float = Field(
        default=24.0, ge=0, description="hours after a retraining in which drift starts no other"
    )
    sources: list[TopicSource] = Field(
        default=[],
        description="where rows of drifted topics come from: `match`, a regular expression for the topic's "
        "terms or example prompts; `source`; `packages` for `pydoc`, `path` for `jsonl`. Approved feedback "
        "always comes too",
    )


class RolloutConfig(Section):
    """The flow `rollout`: traffic moves to a gated version in steps, and back by itself."""

    look_seconds: float = Field(
        default=60.0,
        ge=5,
        description="seconds between two looks at an open rollout; a decision in MLflow's UI is seen within "
        "15 s",
    )
    steps: list[Annotated[float, Field(gt=0, le=1.0)]] = Field(
        default=[0.05, 0.25, 0.5, 1.0],
        min_length=1,
        description="shares of the users that the challenger answers, one after another; the last is 1.0: it "
        "is in charge",
    )
    step_minutes: float = Field(default=60.0, ge=0, description="minutes that a step lasts, at least")
    step_users: Count = Field(
        default=30, description="users of each arm in a step, at least, before the next"
    )
    min_users: Count = Field(
        default=200,
        description="users of each arm that have given feedback, at least, before the challenger may take "
        "charge",
    )
    max_hours: float = Field(
        default=168.0,
        gt=0,
        description="hours after which a rollout without enough evidence ends; the champion stays",
    )
    alpha: float = Field(
        default=0.05,
        gt=0,
        lt=0.5,
        description="chance that a rollout of an equal model ends wrongly, over all its looks together",
    )
    min_gain: float = Field(
        default=0.0, description="gain in the mean feedback score (0 to 1) that the lower bound has to exceed"
    )
    feedback_margin: Share = Field(
        default=0.0,
        description="loss in the mean feedback score that is still taken; a certain loss beyond it rolls "
        "back",
    )
    error_margin: Share = Field(default=0.02, description="the same for the share of failed requests")
    empty_margin: Share = Field(default=0.02, description="the same for the share of empty answers")
    latency_margin: float = Field(
        default=0.25, ge=0, description="the same for the latency, as a share of the champion's"
    )

    @model_validator(mode="after")
    def _rising(self) -> RolloutConfig:
        if self.steps != sorted(set(self.steps)) or self.steps[-1] != 1.0:
            raise ValueError(
                f"rollout.steps is {self.steps}; wanted rising shares that end with 1.0, such as [0.05, "
                "0.25, 0.5, 1.0]"
            )
        return self
