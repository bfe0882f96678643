"""Sections of params.yaml: the base, what is trained on it and how, and the search for good settings."""

from __future__ import annotations

import datetime as dt
import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ratchet.config.base import Count, Section, Share


def _iso_date(value: Any) -> str:
    """Read a date, which YAML makes an object of unless it is quoted. Raises ValueError."""
    return dt.date.fromisoformat(str(value)).isoformat()


class DemoBase(Section):
    """The small Llama that `base.model: demo` pre-trains on this machine."""

    packages: list[str] = Field(
        default=["stdlib"], min_length=1, description="import names whose documentation the base reads"
    )
    module_share: Share = Field(
        default=0.35, description="share of the modules that the base sees; the rest is left for the adapter"
    )
    vocab_size: int = Field(
        default=2048, ge=300, description="tokens in the tokenizer that is trained on the same texts"
    )
    hidden_size: int = Field(default=128, ge=16, multiple_of=16, description="width of the model")
    layers: Count = Field(default=2, description="decoder layers")
    heads: Count = Field(default=4, description="attention heads")
    context: int = Field(default=512, ge=64, description="positions, in tokens")
    steps: Count = Field(default=600, description="optimizer steps")
    batch_tokens: int = Field(default=1024, ge=64, description="tokens in one optimizer step, about")
    learning_rate: float = Field(default=3.0e-3, gt=0, description="peak learning rate of AdamW")
    text_weight: Share = Field(
        default=0.3, description="weight of the loss on the question's text, where the answer's is 1"
    )


BaseKind = Literal["demo", "hub", "path", "url", "version"]
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+(:[^:]+\.gguf)?)?")
VERSION = re.compile(r"(?:registered:([\w.-]+)/)?v([1-9]\d*)")


def kind_of_base(model: str) -> BaseKind:
    """Tell by its form what `base.model` names; nothing is looked up."""
    if model == "demo":
        return "demo"
    if "://" in model:
        return "url"
    if VERSION.fullmatch(model):
        return "version"
    is_file = model.endswith(".gguf") and ":" not in model
    return "hub" if HUB_ID.fullmatch(model) and not is_file else "path"


class BaseConfig(Section):
    """The base model, never changed by training."""

    model: str = Field(
        default="demo",
        min_length=1,
        description="where the base is: `demo`; a hub id (`org/name`, or `org/name:file.gguf`); a folder or "
        "GGUF file (`./models-in/smollm`, counted from the repository's root, tracked by DVC or not); a URL "
        "of either that fsspec reads (`s3://bucket/smollm`); or a version of this project that was in charge "
        "(`v3`), merged. A GGUF file is dequantised",
    )
    revision: str | None = Field(
        default=None,
        description="of a hub id: its commit, 40 hex digits, needed; of the others: the sha256, 64 hex "
        "digits, that the weights must have (the stage `base` prints it)",
    )
    chat_template: str | None = Field(
        default=None,
        description="path of a Jinja chat template, for a base that brings none, or in place of its own",
    )
    date: Annotated[str, BeforeValidator(_iso_date)] = Field(
        default="2026-01-01",
        description="what a chat template that asks for today's date is told, so that a prompt is the same "
        "on every day",
    )
    reasoning: Literal["drop", "learn"] = Field(
        default="drop",
        description="what becomes of reasoning in rows (`reasoning_content`, or `<think>…</think>` before an "
        "answer). `drop`: answers are learned and given without it. `learn`: it is learned and given as the "
        "base's own template writes it; a template that writes none is refused. Answers are then longer: see "
        "`evaluate.max_new_tokens`",
    )
    new_tokens: list[str] = Field(
        default=[],
        description="words of the domain that become one token each, with a trained embedding (LoRA's family "
        "and `full`) that starts as the mean of the embeddings of the word's former pieces. Such "
        "a version is served on a base of its own",
    )
    seed: int = Field(default=20, ge=0, description="seed of the demo's weights and of its order of rows")
    demo: DemoBase = Field(default_factory=DemoBase, description="settings of `model: demo`")

    @model_validator(mode="after")
    def _pinned(self) -> BaseConfig:
        kind = kind_of_base(self.model)
        if kind == "hub" and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError(
                f"base.revision is {self.revision!r}; the hub id {self.model} needs its commit, 40 hex "
                "digits, so that every run loads the same weights (a folder's path begins with `./` or `/`)"
            )
        if kind not in ("hub", "demo") and not re.fullmatch(r"[0-9a-f]{64}", self.revision or "0" * 64):
            raise ValueError(
                f"base.revision is {self.revision!r}; for {self.model} it is the sha256 of the weights, "
                "64 hex digits, or null"
            )
        if kind == "url" and "@" in self.model.partition("://")[2].partition("/")[0]:
            raise ValueError(
                "base.model holds a user or a password; params.yaml is in git, so give them to fsspec by the "
                "environment or its own configuration"
            )
        if self.model.startswith("registered:") and kind != "version":
            raise ValueError(
                f"base.model is {self.model!r}; wanted registered:NAME/vN, such as registered:claims/v3"
            )
        for token in self.new_tokens:
            if not re.fullmatch(r"\w|\w.*\w", token) or self.new_tokens.count(token) > 1:
                raise ValueError(
                    f"base.new_tokens names {token!r}; wanted words, each once, that begin and end with a "
                    "letter or digit: markup is for control tokens"
                )
        return self


class TrainConfig(Section):
    """One optimisation, from a base or from the champion's adapter."""

    start_from: Literal["champion", "base"] = Field(
        default="champion", description="where the adapter's weights start; without a champion it is the base"
    )
    rows: Literal["new_and_replay", "all"] = Field(
        default="new_and_replay",
        description="rows to train on: what the champion has not seen plus a replayed share, or everything",
    )
    replay: Share = Field(
        default=1.0, description="share of the rows that the champion has seen that are trained on again"
    )
    max_feedback_share: Share = Field(
        default=0.1,
        description="share of the rows trained on that may come from people's feedback. More of the other "
        "rows than `replay` says are replayed for it; feedback that is still too much stays out, the oldest "
        "first",
    )
    objective: Literal["sft", "dpo", "kto"] = Field(
        default="sft",
        description="what is learned: answers (`sft`); which of two answers is better (`dpo`); which answers "
        "are good and which are not (`kto`). Rows without a judgement are learned as answers by `dpo`, and "
        "are good ones for `kto`",
    )
    preference_beta: float = Field(
        default=0.1,
        gt=0,
        description="how much a change of an answer's log-probability weighs in `dpo` and `kto`: the larger, "
        "the nearer the model stays to where it started",
    )
    chosen_weight: float = Field(
        default=1.0,
        ge=0,
        description="of the better answer's cross-entropy beside the loss of `dpo` (arXiv 2404.19733); 0: "
        "DPO alone, which may make both answers less likely",
    )
    undesirable_weight: float = Field(
        default=1.0,
        gt=0,
        description="of an answer not to give in `kto`; the paper's advice: good answers over bad "
        "ones, or three quarters of that",
    )
    epochs: float = Field(
        default=3.0, gt=0, description="passes over the chosen rows, at most; `patience` may end them earlier"
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"] = Field(
        default="adamw",
        description="`adamw_8bit` and `paged_adamw_8bit` keep their state in 8 bits and need CUDA; paged: it "
        "may move to the host's memory",
    )
    learning_rate: float = Field(
        default=2.0e-4,
        gt=0,
        description="peak learning rate; the default suits LoRA's family on a model of 0.1 to 8 billion "
        "weights, `full` wants a tenth of it, `ia3`, `prefix` and `prompt` ten to a hundred times as much",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="course of the learning rate after the warm-up"
    )
    warmup_share: Share = Field(
        default=0.05, description="share of the steps in which the learning rate rises"
    )
    weight_decay: float = Field(
        default=0.01,
        ge=0,
        description="decoupled weight decay of AdamW; of the other optimizers their own form",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="what forward and backward passes compute in; `auto`: bfloat16 where the machine has "
        "instructions for it. Adapters and losses stay float32",
    )
    batch_windows: Count = Field(
        default=4,
        description="packed windows in one forward pass; on a CPU as many rows of like length as fit into "
        "their room",
    )
    accumulate: Count = Field(default=1, description="forward passes in one optimizer step")
    processes: Count = Field(
        default=1,
        description="processes that share the forward passes of a step, started by torchrun: one a GPU, or "
        "parts of a CPU. `accumulate` has to be a multiple",
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto",
        description="several processes: each with the whole model (`ddp`) or a part of it (`fsdp`); `auto`: "
        "parts for `full` and for `qlora` on NF4",
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradient norm that is clipped to")
    teacher: str = Field(
        default="",
        pattern=r"^(|champion|[\w.-]+/[\w.-]+@[0-9a-f]{40})$",
        description="distillation: whose distribution the training learns from beside the rows: `champion`, "
        "or a hub id with its commit (`org/name@<40 hex digits>`) of the same tokenizer; empty: nobody's",
    )
    teacher_weight: Share = Field(
        default=0.5, description="share of the loss that is the divergence from the teacher"
    )
    teacher_temperature: float = Field(
        default=1.0, gt=0, description="both distributions are flattened by it before they are compared"
    )
    checkpoint_activations: bool = Field(
        default=False,
        description="compute activations again in the backward pass: less memory, about a third more time. "
        "Not with `prefix`",
    )
    compile: bool = Field(
        default=False,
        description="compile the layers (torch.compile) at the start, a minute or so, for faster steps: for "
        "trainings of ten minutes and more. A CPU needs a C++ compiler",
    )
    liger: bool = Field(
        default=False,
        description="Liger's kernels for norms, rotary positions and gated layers: less memory on a GPU; "
        "needs CUDA and the extra `kernels`",
    )
    neftune_alpha: float = Field(
        default=0.0,
        ge=0,
        description="noise on the embeddings in training (NEFTune, arXiv 2310.05914), 5 is usual; 0: none",
    )
    evaluations: Count = Field(
        default=8, description="times that the validation loss is measured in a training"
    )
    patience: Count = Field(
        default=3, description="measurements without a better validation loss that stop the training"
    )
    seed: int = Field(
        default=17, ge=0, description="seed of the adapter's weights, of dropout and of the order of windows"
    )
    checkpoint_minutes: float = Field(
        default=10.0,
        ge=0,
        description="minutes between two checkpoints, which is what a kill costs at most; 0: after every "
        "optimizer step",
    )

    @model_validator(mode="after")
    def _passes_can_be_shared(self) -> TrainConfig:
        if self.accumulate % self.processes:
            raise ValueError(
                f"`train.accumulate` {self.accumulate} forward passes cannot be shared by `train.processes` "
                f"{self.processes}: make it a multiple"
            )
        return self

    @model_validator(mode="after")
    def _preferences_alone(self) -> TrainConfig:
        if self.objective != "sft" and (self.teacher or self.neftune_alpha):
            key = "teacher" if self.teacher else "neftune_alpha"
            raise ValueError(
                f"train.objective is {self.objective}, train.{key} is {getattr(self, key)!r}: only `sft` "
                "takes it, since preferences compare the model with its own start"
            )
        return self

    def steps(self, num_batches: int) -> int:
        """Return the most optimizer steps of a training whose epoch is `num_batches` forward passes."""
        return max(1, math.ceil(self.epochs * num_batches / self.accumulate))


def why_whole(train: TrainConfig, adapter: AdapterConfig) -> str:
    """Say why several processes cannot each keep a part of the model; empty when they can."""
    if adapter.method in ("prefix", "prompt"):
        return (
            f"`adapter.method: {adapter.method}` puts its virtual tokens before the layers that would be in "
            "parts"
        )
    if adapter.method == "qlora" and adapter.quantisation == "int8":
        return (
            "`adapter.quantisation: int8` keeps its scales beside the weights, which cannot be cut with them"
        )
    return (
        ""
        if train.optimizer in ("adamw", "sgd")
        else f"`train.optimizer: {train.optimizer}` does not take weights in parts"
    )


class AdapterConfig(Section):
    """What is trained on top of the base."""

    method: Literal["lora", "qlora", "dora", "rslora", "ia3", "prefix", "prompt", "full"] = Field(
        default="lora",
        description="what is trained (docs/training.md); `qlora`: LoRA on a quantised base; `full`: all "
        "weights, and no adapter",
    )
    quantisation: Literal["nf4", "int8"] = Field(
        default="nf4",
        description="of the base, for `qlora`: NF4 with double quantisation, or LLM.int8(); bfloat16 compute",
    )
    rank: int = Field(
        default=32, ge=1, le=512, description="rank of the update (`lora`, `qlora`, `dora`, `rslora`)"
    )
    alpha: float = Field(
        default=64.0,
        gt=0,
        description="scale of the update; it is multiplied by alpha / rank, by alpha / √rank for `rslora`",
    )
    dropout: Share = Field(
        default=0.0, description="dropout before the update (`lora`, `qlora`, `dora`, `rslora`)"
    )
    target_modules: str | list[str] = Field(
        default="all-linear",
        description="layers that get an update: `all-linear` or names; not for `prefix`, `prompt` and `full`",
    )
    bias: Literal["none", "lora_only", "all"] = Field(
        default="none",
        description="biases of the base that are trained as well (`lora`, `qlora`, `dora`, `rslora`); such a "
        "version is served on a base of its own",
    )
    modules_to_save: list[str] = Field(
        default=[],
        description="modules that are trained whole beside the update, such as `lm_head`; not for `prefix`, "
        "`prompt` and `full`. Served on a base of its own",
    )
    virtual_tokens: int = Field(
        default=16,
        ge=1,
        le=1024,
        description="tokens that `prefix` and `prompt` put before every row; they count against the base's "
        "context",
    )


class SweepRange(Section):
    """Numbers from `low` to `high`."""

    low: int | float = Field(description="least value")
    high: int | float = Field(description="greatest value")
    log: bool = Field(default=False, description="evenly by orders of magnitude")
    step: int | float | None = Field(default=None, description="distance between two values; not with `log`")

    @model_validator(mode="after")
    def _ordered(self) -> SweepRange:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) is not under high ({self.high})")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(f"log wants low over 0 and no step, got low {self.low} and step {self.step}")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step is {self.step}; wanted more than 0")
        return self


Choices = Annotated[list[bool | int | float | str | list[str]], Field(min_length=1)]


class SweepConfig(Section):
    """The flow `sweep`: which settings give the least validation loss."""

    space: dict[str, Choices | SweepRange] = Field(
        default={
            "train.learning_rate": SweepRange(low=2.0e-5, high=2.0e-3, log=True),
            "train.batch_windows": [2, 4, 8],
        },
        description="where to look: a key of `train` or `adapter`, or `base.model` (as there, a hub id "
        "with its commit: `org/name@revision`), each with a list of choices or `{low, high, log, step}`",
    )
    trials: Count = Field(
        default=20, description="trainings in all, those of other machines and of earlier calls included"
    )
    startup_trials: int = Field(
        default=5, ge=1, description="trials whose settings are drawn at random, and that are not ended early"
    )
    storage: str = Field(
        default="",
        description="SQLAlchemy URL of Optuna's database; empty: SQLite in `.ratchet/sweep.db`. With "
        "PostgreSQL (`postgresql+psycopg://…`) the same command on another machine joins in. A password "
        "belongs into RATCHET_SWEEP_STORAGE, which wins over this",
    )
    seed: int = Field(default=41, ge=0, description="seed of what is drawn")


class CompareConfig(Section):
    """What `ratchet compare` changes for a method."""

    settings: dict[str, dict[str, bool | int | float | str | list[str]]] = Field(
        default={
            "full": {"train.learning_rate": 2.0e-5},
            "ia3": {"train.learning_rate": 5.0e-3},
            "prefix": {"train.learning_rate": 5.0e-3},
            "prompt": {"train.learning_rate": 2.0e-2},
        },
        description="method → keys of `train` and `adapter` with the values that it is compared with; all "
        "else is the same for all",
    )


class RetrainConfig(Section):
    """The flow `retrain`."""

    cron: str = Field(default="0 3 * * 1", description="schedule of the deployment, in cron's form, UTC")
    on_data: bool = Field(
        default=False, description="an ingest starts a retraining by itself, where the deployments are served"
    )
    keep_workspaces: int = Field(
        default=2, ge=0, description="failed workspaces that are kept for inspection"
    )
