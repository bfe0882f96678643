"""Combine the sections of params.yaml in one model, and read the file.

Every setting is defined in a section and has a description with its unit, from which
`ratchet/config/docs.py` renders `docs/params.md`. Import a section's class from its own module, since this
module imports all sections. Stages read their settings only from the file: DVC tracks params.yaml, but would
not see an override from the environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from ratchet.config.base import PREFERENCE, Section
from ratchet.config.data import IngestConfig, PrepareConfig, ProjectConfig, ReviewConfig, TokenizeConfig
from ratchet.config.evaluation import EvaluateConfig, GateConfig, ParityConfig
from ratchet.config.federation import FederateConfig
from ratchet.config.monitoring import MonitorConfig, RolloutConfig
from ratchet.config.serving import GatewayConfig, RequestLogConfig, ServicesConfig, StorageConfig
from ratchet.config.synthesis import SynthesizeConfig
from ratchet.config.training import (
    AdapterConfig,
    BaseConfig,
    CompareConfig,
    Place,
    RetrainConfig,
    StageName,
    SweepConfig,
    TrainConfig,
    why_not_private,
    why_whole,
)
from ratchet.errors import ConfigError


class Config(Section):
    """All sections, with the checks that involve two of them."""

    project: ProjectConfig = Field(default_factory=ProjectConfig)
    ingest: IngestConfig = Field(default_factory=IngestConfig)
    synthesize: SynthesizeConfig = Field(default_factory=SynthesizeConfig)
    base: BaseConfig = Field(default_factory=BaseConfig)
    prepare: PrepareConfig = Field(default_factory=PrepareConfig)
    tokenize: TokenizeConfig = Field(default_factory=TokenizeConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    sweep: SweepConfig = Field(default_factory=SweepConfig)
    compare: CompareConfig = Field(default_factory=CompareConfig)
    federate: FederateConfig = Field(default_factory=FederateConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    parity: ParityConfig = Field(default_factory=ParityConfig)
    gate: GateConfig = Field(default_factory=GateConfig)
    promotion: Literal["rollout", "auto", "manual"] = Field(
        default="rollout",
        description="who decides after the gate. `rollout`: users' feedback, in steps of live traffic; "
        "`auto`: the gate's verdict alone; `manual`: a person, in MLflow's UI or by command",
    )
    landing: Literal["checkout", "push", "pull_request"] = Field(
        default="checkout",
        description="where a run's commits go. `checkout`: into this checkout alone; `push`: also to the "
        "branch of the git remote, on top of what others pushed; `pull_request`: also to a branch "
        "`ratchet/BRANCH` there, for a remote that protects its branch",
    )
    retrain: RetrainConfig = Field(default_factory=RetrainConfig)
    execution: dict[StageName, Place] = Field(
        default={},
        description="stages that run on other machines, such as `{train: {pool: gpu}}`; the others run here",
    )
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    request_log: RequestLogConfig = Field(default_factory=RequestLogConfig)
    review: ReviewConfig = Field(default_factory=ReviewConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    storage: StorageConfig = Field(default_factory=StorageConfig)
    services: ServicesConfig = Field(default_factory=ServicesConfig)

    @model_validator(mode="after")
    def _go_together(self) -> Config:
        """Refuse combinations of settings that cannot work, before anything is loaded."""
        method = self.adapter.method
        if self.train.privacy.epsilon and "train" in self.execution:
            raise ValueError(
                f"train.privacy.epsilon is {self.train.privacy.epsilon:g}, and execution.train names a pool: "
                "the ledger of what the rows have spent, and the key of the noise, stay on this machine"
            )
        if (
            self.train.world_size > 1
            and self.train.parallel == "fsdp"
            and (why := why_whole(self.train, self.adapter))
        ):
            raise ValueError(f"train.parallel is 'fsdp': {why}; set `train.parallel: ddp`")
        if self.train.privacy.epsilon and (
            why := why_not_private(self.train, self.adapter, self.base.new_tokens)
        ):
            raise ValueError(f"train.privacy.epsilon is {self.train.privacy.epsilon:g}, and {why}")
        if method == "prefix" and self.train.checkpoint_activations:
            raise ValueError(
                "train.checkpoint_activations is true: `adapter.method: prefix` reads a cache in every "
                "layer, which cannot be computed again"
            )
        if method in ("prefix", "prompt", "full", "ia3") and self.adapter.bias != "none":
            raise ValueError(
                f"adapter.bias is {self.adapter.bias!r}: only the methods of the LoRA family take it, not "
                f"`{method}`"
            )
        if method in ("prefix", "prompt", "full") and self.adapter.modules_to_save:
            raise ValueError(
                f"adapter.modules_to_save is {self.adapter.modules_to_save}: `adapter.method: {method}` "
                "takes none"
            )
        if self.train.factors != "both" and method not in ("lora", "qlora", "rslora"):
            raise ValueError(
                f"train.factors is {self.train.factors!r}: `adapter.method: {method}` has no two factors to "
                "train in turn; set `train.factors: both`"
            )
        if method in ("prefix", "prompt", "ia3") and self.base.new_tokens:
            raise ValueError(
                f"base.new_tokens is {self.base.new_tokens}: `adapter.method: {method}` would leave their "
                "embeddings untrained; take one of the LoRA family, or `full`"
            )
        if self.train.objective != "sft" and PREFERENCE not in self.evaluate.metrics:
            raise ValueError(
                f"train.objective is {self.train.objective}, and evaluate.metrics lacks `preference`, the "
                "share of held-out pairs of which the model prefers the better answer: add it"
            )
        return self

    @model_validator(mode="after")
    def _gated_on_what_is_computed(self) -> Config:
        known = self.evaluate.row_scores
        judge = self.evaluate.judge
        judged = [f"judge_{metric}" for metric in judge.metrics] if judge.model else []
        if lacking := [rule.metric for rule in self.gate.guardrails if rule.metric not in (*known, *judged)]:
            raise ValueError(
                f"gate.guardrails names {', '.join(lacking)}; the scores a row are "
                f"{', '.join((*known, *judged))} (evaluate.metrics, evaluate.custom, and evaluate.judge "
                "where it names a model)"
            )
        if self.gate.metric not in known:
            raise ValueError(
                f"gate.metric is {self.gate.metric}; the scores a row are "
                f"{', '.join(self.evaluate.row_scores)} (evaluate.metrics, evaluate.custom)"
            )
        audits = {"bias_pairs", "attacks", "groups"}
        if self.gate.metric == PREFERENCE and (
            on := sorted(key for key in audits if getattr(self.evaluate, key))
        ):
            raise ValueError(
                f"gate.metric is preference, which only rows with a worse answer have, and evaluate.{on[0]} "
                "compares rows of another form: take another metric, or leave the audit out"
            )
        return self


def load_config(path: Path) -> Config:
    """Read and check `path`. Raises ConfigError that lists every fault with key, value and allowed values."""
    try:
        raw = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist",
            remedy="run the command in a clone of the project, or name one with -C PATH",
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except (YAMLError, ValueError) as error:  # ValueError: not UTF-8, or an impossible date
        raise ConfigError(f"{path} is no valid YAML: {_yaml_fault(error)}") from None
    return parse_config({} if raw is None else raw, path)


def parse_config(raw: object, path: Path) -> Config:
    """Check `raw`, the content of `path`. Raises ConfigError that lists every fault."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        faults = [f"  {_where(fault)}: {_what(fault)}" for fault in error.errors()]
        raise ConfigError(
            f"{path} has {len(faults)} fault(s):\n" + "\n".join(faults),
            remedy="docs/params.md lists every key with what it takes",
        ) from None


def _yaml_fault(error: Exception) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _where(fault: Any) -> str:
    # Pydantic's location also names the alternatives of a union, such as `list[str]`; they are left out.
    return ".".join(str(part) for part in fault["loc"] if "[" not in str(part)) or "(top level)"


def _what(fault: Any) -> str:
    if fault["type"] == "extra_forbidden":
        parent = ".".join(str(part) for part in fault["loc"][:-1])
        return f"unknown key (value {fault['input']!r}); known there: {', '.join(_known_keys(parent))}"
    message = fault["msg"].removeprefix("Value error, ")
    return message if fault["type"] == "value_error" else f"{message}, got {fault['input']!r}"


def _known_keys(section: str) -> list[str]:
    model: type[BaseModel] = Config
    for part in filter(None, section.split(".")):
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
