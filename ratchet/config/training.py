"""Sections of params.yaml: the base, the training, the adapter, and the search for good settings."""

from __future__ import annotations

import datetime as dt
import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ratchet.config.base import Count, Section, Share


def _iso_date(value: Any) -> str:
    """Return a date as ISO 8601 text; YAML turns an unquoted date into an object. Raises ValueError."""
    return dt.date.fromisoformat(str(value)).isoformat()


class DemoBase(Section):
    """The small Llama that `base.model: demo` pre-trains on this machine."""

    packages: list[str] = Field(
        default=["stdlib"],
        min_length=1,
        description="import names of the packages whose documentation the base is trained on",
    )
    module_share: Share = Field(
        default=0.35,
        description="share of the modules that the base sees; the others are left for the adapter to learn",
    )
    vocab_size: int = Field(
        default=2048, ge=300, description="tokens in the tokenizer, which is trained on the same texts"
    )
    hidden_size: int = Field(default=128, ge=16, multiple_of=16, description="width of the model")
    layers: Count = Field(default=2, description="decoder layers")
    heads: Count = Field(default=4, description="attention heads")
    context: int = Field(default=512, ge=64, description="context length, in tokens")
    steps: Count = Field(default=600, description="optimizer steps")
    batch_tokens: int = Field(default=1024, ge=64, description="tokens in one optimizer step, approximately")
    learning_rate: float = Field(default=3.0e-3, gt=0, description="peak learning rate of AdamW")
    text_weight: Share = Field(
        default=0.3,
        description="weight of the question's tokens in the loss; an answer's tokens have weight 1",
    )


BaseKind = Literal["demo", "hub", "path", "url", "version"]
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+(:[^:]+\.gguf)?)?")
VERSION = re.compile(r"(?:registered:([\w.-]+)/)?v([1-9]\d*)")


def kind_of_base(model: str) -> BaseKind:
    """Tell what `base.model` names, from its form alone; nothing is looked up."""
    if model == "demo":
        return "demo"
    if "://" in model:
        return "url"
    if VERSION.fullmatch(model):
        return "version"
    is_file = model.endswith(".gguf") and ":" not in model
    return "hub" if HUB_ID.fullmatch(model) and not is_file else "path"


class BaseConfig(Section):
    """The base model; training never changes its files."""

    model: str = Field(
        default="demo",
        min_length=1,
        description="where the base is: `demo`; a hub id (`org/name`, or `org/name:file.gguf`); a folder or "
        "GGUF file (`./models-in/smollm`, relative to the repository's root, tracked by DVC or not); a URL "
        "of either that fsspec reads (`s3://bucket/smollm`); or an earlier champion of this project (`v3`), "
        "merged. A GGUF file is dequantised",
    )
    revision: str | None = Field(
        default=None,
        description="for a hub id, the required commit, 40 hex digits; otherwise the sha256, 64 hex digits, "
        "that the weights must have (the stage `base` prints it), or null",
    )
    chat_template: str | None = Field(
        default=None,
        description="path of a Jinja chat template, for a base without one or to replace its own",
    )
    date: Annotated[str, BeforeValidator(_iso_date)] = Field(
        default="2026-01-01",
        description="date (ISO 8601) that a chat template gets when it asks for today's, so that a prompt "
        "is the same every day",
    )
    reasoning: Literal["drop", "learn"] = Field(
        default="drop",
        description="what happens to reasoning in rows (`reasoning_content`, or `<think>…</think>` before "
        "an answer). `drop`: the model learns and gives answers without it. `learn`: the model learns and "
        "gives it in the format of the base's own template; a template without one is refused. Answers get "
        "longer: see `evaluate.max_new_tokens`",
    )
    new_tokens: list[str] = Field(
        default=[],
        description="domain words that become one token each, with a trained embedding (LoRA's family and "
        "`full`) that starts as the mean of the embeddings of the word's former tokens. Such a version "
        "needs its own copy of the base when it is served",
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


class PrivacyConfig(Section):
    """Differential privacy of the training rows by DP-SGD (docs/privacy.md); off without an `epsilon`."""

    epsilon: float | None = Field(
        default=None,
        gt=0,
        description="ε of one training: the weights depend on any one row by no more than this. The noise "
        "is computed from it; 8 is weak, 1 strong; null: a training without privacy",
    )
    delta: float = Field(
        default=1.0e-5,
        gt=0,
        lt=1,
        description="δ: the probability with which ε may not hold; it has to be under one divided by the "
        "number of rows",
    )
    unit: Literal["row", "user"] = Field(
        default="row",
        description="what is protected: the presence of one row, which is one conversation; or of all rows "
        "of a user, whom `meta.user` (or `asked_by`, `taught_by`) names. A row that names nobody is one user",
    )
    user_rows: Count = Field(
        default=16, description="rows of a user that are used with `unit: user`; the others are left out"
    )
    max_grad_norm: float = Field(
        default=1.0,
        gt=0,
        description="norm to which the gradient of each row is clipped; the noise is proportional to it",
    )
    batch_rows: Count = Field(
        default=256,
        description="rows of a step, on average: each row is drawn with the same probability at every step. "
        "More rows a step lose less accuracy to the noise and take longer",
    )
    trainings: Count = Field(
        default=1,
        description="trainings that share the `epsilon`, each with its part of the steps. Federated training "
        "sets it to `federate.rounds`",
    )
    budget: float | None = Field(
        default=None,
        gt=0,
        description="ε that the rows of a batch may spend in all trainings together; a training that would "
        "spend more is refused. null: as much as `epsilon`, so no row is trained on twice",
    )

    @model_validator(mode="after")
    def _affordable(self) -> PrivacyConfig:
        if self.epsilon and self.budget and self.budget < self.epsilon:
            raise ValueError(
                f"train.privacy.budget {self.budget:g} is under train.privacy.epsilon {self.epsilon:g}: no "
                "training could start"
            )
        return self

    @property
    def most(self) -> float:
        """Return the ε that all trainings on a row may spend together."""
        return self.budget or self.epsilon or math.inf


class TrainConfig(Section):
    """The training: which rows, which loss, and how it is optimised."""

    start_from: Literal["champion", "base"] = Field(
        default="champion",
        description="weights from which the training starts; without a champion it starts from the base",
    )
    rows: Literal["new_and_replay", "all"] = Field(
        default="new_and_replay",
        description="rows to train on: those that the champion has not seen plus a replayed share of the "
        "others, or all; a training that starts from the base takes all",
    )
    replay: Share = Field(
        default=1.0,
        description="share of the rows that the champion has seen that are trained on again; lower is "
        "faster, but the model forgets more",
    )
    max_feedback_share: Share = Field(
        default=0.1,
        description="share of the training rows that may come from users' feedback. To keep it, more other "
        "rows than `replay` says are replayed; if that is not enough, the oldest feedback is left out",
    )
    objective: Literal["sft", "dpo", "kto"] = Field(
        default="sft",
        description="what is learned. `sft`: answers; `dpo`: which of two answers is better; `kto`: which "
        "answers are good and which are bad. `dpo` learns rows without a judgement as `sft` does; for `kto` "
        "they are good answers",
    )
    preference_beta: float = Field(
        default=0.1,
        gt=0,
        description="weight of the log-probability ratio to the start model in `dpo` and `kto`; larger "
        "values keep the model closer to its start",
    )
    chosen_weight: float = Field(
        default=1.0,
        ge=0,
        description="weight of the better answer's cross-entropy that is added to the loss of `dpo` (arXiv "
        "2404.19733); 0: DPO alone, which may make both answers less likely",
    )
    undesirable_weight: float = Field(
        default=1.0,
        gt=0,
        description="weight of a bad answer's loss in `kto`, where a good answer's weight is 1; the paper "
        "(arXiv 2402.01306) advises the number of good answers divided by that of bad ones, or down to 3/4 "
        "of it",
    )
    epochs: float = Field(
        default=3.0,
        gt=0,
        description="passes over the chosen rows, at most; `patience` may end the training earlier",
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"] = Field(
        default="adamw",
        description="optimizer; `adamw_8bit` and `paged_adamw_8bit` keep their state in 8 bits and need "
        "CUDA; the paged one may move its state to the host's memory",
    )
    learning_rate: float = Field(
        default=2.0e-4,
        gt=0,
        description="peak learning rate; the default suits LoRA's family on a model of 0.1 to 8 billion "
        "weights; `full` needs a tenth of it, `ia3`, `prefix` and `prompt` ten to a hundred times as much",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="shape of the learning rate after the warm-up"
    )
    warmup_share: Share = Field(
        default=0.05, description="share of the steps during which the learning rate rises to its peak"
    )
    weight_decay: float = Field(
        default=0.01,
        ge=0,
        description="decoupled weight decay for AdamW; the other optimizers apply it in their own form",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="number format of the forward and backward passes; `auto`: bfloat16 if the machine has "
        "instructions for it, else float16 on a GPU and float32 on a CPU. Adapters and losses stay float32",
    )
    batch_windows: Count = Field(
        default=4,
        description="packed windows in one forward pass; on a CPU, rows of similar length that fit into the "
        "same number of tokens. Lower it, and raise `accumulate`, if memory runs out",
    )
    accumulate: Count = Field(
        default=1,
        description="forward passes per optimizer step; the batch of a step is `batch_windows` times this",
    )
    processes: Count = Field(
        default=1,
        description="processes that share the forward passes of a step, started by torchrun: one per GPU, "
        "or parts of a CPU. `accumulate` has to be a multiple of it",
    )
    nodes: Count = Field(
        default=1,
        description="machines that share a training, each with `processes` processes: start the same command "
        "on each, with RATCHET_RENDEZVOUS (docs/second-machine.md)",
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto",
        description="what each of several processes holds: the whole model (`ddp`) or a shard of it "
        "(`fsdp`); `auto`: shards for `full` and for `qlora` on NF4, else `ddp`",
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="norm to which larger gradients are clipped")
    teacher: str = Field(
        default="",
        pattern=r"^(|champion|[\w.-]+/[\w.-]+@[0-9a-f]{40})$",
        description="distillation: the model whose distribution is learned in addition to the rows: "
        "`champion`, or a hub id with its commit (`org/name@<40 hex digits>`) and the same tokenizer; "
        "empty: none",
    )
    teacher_weight: Share = Field(
        default=0.5, description="share of the loss that is the divergence from the teacher"
    )
    teacher_temperature: float = Field(
        default=1.0,
        gt=0,
        description="temperature that flattens both distributions before they are compared; above 1 "
        "unlikely tokens count more",
    )
    checkpoint_activations: bool = Field(
        default=False,
        description="compute activations again in the backward pass: less memory, about a third more time. "
        "Not with `prefix`",
    )
    compile: bool = Field(
        default=False,
        description="compile the layers (torch.compile): steps are faster after about a minute at the "
        "start, which pays for trainings of ten minutes and more. A CPU needs a C++ compiler",
    )
    liger: bool = Field(
        default=False,
        description="use Liger's kernels for norms, rotary positions and gated layers: less memory on a "
        "GPU; needs CUDA and the extra `kernels`",
    )
    neftune_alpha: float = Field(
        default=0.0,
        ge=0,
        description="strength of the noise on the embeddings in training (NEFTune, arXiv 2310.05914); 5 is "
        "usual; 0: none",
    )
    factors: Literal["both", "up", "down"] = Field(
        default="both",
        description="which factors of an update of LoRA's family are trained. Federated training sets it: "
        "with `federate.aggregation: alternate` its rounds train `up` (B) and `down` (A) in turn",
    )
    proximal: float = Field(
        default=0.0,
        ge=0,
        description="weight mu of the term mu / 2 · ‖weights - start‖², which keeps the trained weights near "
        "those that the training starts from (FedProx, arXiv 1812.06127), for nodes of a federation whose "
        "rows differ; 0.001 to 1 is usual; 0: none",
    )
    evaluations: Count = Field(default=8, description="measurements of the validation loss during a training")
    patience: Count = Field(
        default=3,
        description="measurements in a row without a better validation loss after which the training stops",
    )
    seed: int = Field(
        default=17, ge=0, description="seed of the adapter's weights, of dropout and of the order of windows"
    )
    checkpoint_minutes: float = Field(
        default=10.0,
        ge=0,
        description="minutes between two checkpoints, and so the most work that a kill can cost; 0: after "
        "every optimizer step",
    )
    privacy: PrivacyConfig = Field(
        default_factory=PrivacyConfig, description="differential privacy of the training rows"
    )

    @property
    def world_size(self) -> int:
        """Return how many processes share a training, on all nodes together."""
        return self.nodes * self.processes

    @model_validator(mode="after")
    def _passes_can_be_shared(self) -> TrainConfig:
        if self.accumulate % self.world_size:
            on_nodes = f" on each of `train.nodes` {self.nodes}" if self.nodes > 1 else ""
            raise ValueError(
                f"`train.accumulate` {self.accumulate} forward passes cannot be shared by `train.processes` "
                f"{self.processes}{on_nodes}: make it a multiple of {self.world_size}"
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

    @model_validator(mode="after")
    def _nearing_the_start(self) -> TrainConfig:
        if self.optimizer == "sgd" and self.proximal * self.learning_rate > 1:
            raise ValueError(
                f"train.proximal {self.proximal:g} times train.learning_rate {self.learning_rate:g} is over"
                " 1: a step of `sgd` towards the start would go beyond it; lower one of them"
            )
        return self

    def steps(self, num_batches: int) -> int:
        """Return the highest number of optimizer steps, if an epoch has `num_batches` forward passes."""
        return max(1, math.ceil(self.epochs * num_batches / self.accumulate))


def why_whole(train: TrainConfig, adapter: AdapterConfig) -> str:
    """Return why the model cannot be sharded among processes (`fsdp`), or "" if it can."""
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


def why_not_private(train: TrainConfig, adapter: AdapterConfig, new_tokens: list[str]) -> str:
    """Return the setting with which `train.privacy` cannot keep its promise, and why; "" if there is none.

    A row may change the result by its own clipped gradient and nothing else. So every weight has to have a
    gradient per row, and nothing that is computed of one row may depend on the rows beside it.
    """
    refused = [
        (
            train.objective != "sft",
            f"train.objective is {train.objective}",
            "a loss that compares answers has no gradient of a single row; set `train.objective: sft`",
        ),
        (
            bool(train.teacher),
            f"train.teacher is {train.teacher!r}",
            "a teacher has seen rows that ε would not cover; leave it out",
        ),
        (
            train.neftune_alpha > 0,
            f"train.neftune_alpha is {train.neftune_alpha:g}",
            "its noise depends on the longest row of a forward pass, so one row changes the gradients of "
            "others; set it to 0",
        ),
        (
            train.accumulate > 1,
            f"train.accumulate is {train.accumulate}",
            "the rows of a step are drawn, and take as many forward passes as they need; set "
            "`train.accumulate: 1` and `train.privacy.batch_rows`",
        ),
        (
            train.world_size > 1,
            f"train.processes times train.nodes is {train.world_size}",
            "the gradients of all rows are clipped and noised in one process; set both to 1",
        ),
        (
            train.compile,
            "train.compile is true",
            "compiled layers do not show the gradients of single rows; set `train.compile: false`",
        ),
        (
            train.checkpoint_activations,
            "train.checkpoint_activations is true",
            "the gradients of rows need the inputs of all adapted layers, so it would save nothing; lower "
            "`train.batch_windows` instead",
        ),
        (
            train.precision == "float16",
            "train.precision is 'float16'",
            "it scales the loss, and with it the norms that are clipped; take `bfloat16` or `float32`",
        ),
        (
            adapter.method not in ("lora", "rslora", "qlora"),
            f"adapter.method is {adapter.method}",
            "gradients of single rows are computed of the matrices of `lora`, `rslora` and `qlora` only",
        ),
        (
            adapter.method == "qlora" and adapter.quantisation == "int8",
            "adapter.quantisation is 'int8'",
            "LLM.int8() looks for outliers in all rows of a forward pass together; set "
            "`adapter.quantisation: nf4`",
        ),
        (
            adapter.dropout > 0,
            f"adapter.dropout is {adapter.dropout:g}",
            "its masks come from a public seed and depend on which rows were drawn; set it to 0",
        ),
        (
            adapter.bias != "none",
            f"adapter.bias is {adapter.bias!r}",
            "the gradients of biases are not computed by row; set `adapter.bias: none`",
        ),
        (
            bool(adapter.modules_to_save),
            f"adapter.modules_to_save is {adapter.modules_to_save}",
            "whole modules have no gradients by row; leave them out",
        ),
        (
            (adapter.projector, adapter.tower) != ("frozen", "frozen"),
            f"adapter.projector is {adapter.projector!r}, adapter.tower is {adapter.tower!r}",
            "pictures do not stand in rows there; set both to `frozen`",
        ),
        (
            bool(new_tokens),
            f"base.new_tokens is {new_tokens}",
            "the gradients of embeddings are not computed by row; leave them out",
        ),
    ]
    return next((f"{seen}: {why}" for fault, seen, why in refused if fault), "")


class AdapterConfig(Section):
    """The weights that are trained on top of the base."""

    method: Literal["lora", "qlora", "dora", "rslora", "ia3", "prefix", "prompt", "full"] = Field(
        default="lora",
        description="fine-tuning method (docs/training.md); `qlora`: LoRA on a quantised base, if memory is "
        "short; `full`: all weights, without an adapter",
    )
    quantisation: Literal["nf4", "int8"] = Field(
        default="nf4",
        description="quantisation of the base for `qlora`: NF4 with double quantisation, or LLM.int8(); "
        "computed in bfloat16",
    )
    rank: int = Field(
        default=32,
        ge=1,
        le=512,
        description="rank of the update (`lora`, `qlora`, `dora`, `rslora`); a larger one can learn more "
        "and costs more memory",
    )
    alpha: float = Field(
        default=64.0,
        gt=0,
        description="scale of the update: it is multiplied by alpha / rank, for `rslora` by alpha / √rank; "
        "usually twice the rank",
    )
    dropout: Share = Field(
        default=0.0, description="dropout rate on the update's input (`lora`, `qlora`, `dora`, `rslora`)"
    )
    target_modules: str | list[str] = Field(
        default="all-linear",
        description="layers that get an update: `all-linear`, or a list of names; not for `prefix`, "
        "`prompt` and `full`",
    )
    bias: Literal["none", "lora_only", "all"] = Field(
        default="none",
        description="biases of the base that are trained too (`lora`, `qlora`, `dora`, `rslora`); such a "
        "version needs its own copy of the base when it is served",
    )
    modules_to_save: list[str] = Field(
        default=[],
        description="modules that are trained whole in addition to the update, such as `lm_head`; not for "
        "`prefix`, `prompt` and `full`. Such a version needs its own copy of the base when it is served",
    )
    projector: Literal["frozen", "lora", "whole"] = Field(
        default="frozen",
        description="what is trained of the layers that turn a picture's features into tokens, in a base "
        "that reads pictures: nothing, an update of the same rank (`lora`, `qlora`, `dora`, `rslora`), or "
        "all weights. With `whole` a version needs its own copy of the base when it is served",
    )
    tower: Literal["frozen", "lora", "whole"] = Field(
        default="frozen",
        description="the same for the tower, which sees the pictures; `whole` only with `full`",
    )
    virtual_tokens: int = Field(
        default=16,
        ge=1,
        le=1024,
        description="tokens that `prefix` and `prompt` put before every row; they count towards the base's "
        "context",
    )

    @model_validator(mode="after")
    def _parts_fit_method(self) -> AdapterConfig:
        for key in ("projector", "tower"):
            value, ranked = getattr(self, key), self.method in ("lora", "qlora", "dora", "rslora")
            if value == "lora" and not ranked:
                raise ValueError(
                    f"adapter.{key} is 'lora': `adapter.method: {self.method}` has no updates of a rank; set "
                    f"`adapter.{key}: frozen`, or a method of the LoRA family"
                )
            if value == "whole" and not (self.method == "full" or (ranked and key == "projector")):
                raise ValueError(
                    f"adapter.{key} is 'whole', which `adapter.method: {self.method}` does not take; set "
                    f"`adapter.{key}: frozen`, or `adapter.method: full`"
                )
        return self


class SweepRange(Section):
    """A range of numbers, `low` and `high` included."""

    low: int | float = Field(description="lowest value")
    high: int | float = Field(description="highest value")
    log: bool = Field(default=False, description="draw evenly on a logarithmic scale")
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
    """The flow `sweep`: it searches for the settings with the lowest validation loss."""

    space: dict[str, Choices | SweepRange] = Field(
        default={
            "train.learning_rate": SweepRange(low=2.0e-5, high=2.0e-3, log=True),
            "train.batch_windows": [2, 4, 8],
        },
        description="search space: keys of `train` or `adapter`, or `base.model` (as there, a hub id with "
        "its commit: `org/name@revision`), each with a list of choices or `{low, high, log, step}`",
    )
    trials: Count = Field(
        default=20,
        description="trainings of the study, including those of other machines and of earlier calls",
    )
    startup_trials: int = Field(
        default=5,
        ge=1,
        description="first trials, whose settings are drawn at random and which are not stopped early",
    )
    storage: str = Field(
        default="",
        description="SQLAlchemy URL of Optuna's database; empty: SQLite in `.ratchet/sweep.db`. With "
        "PostgreSQL (`postgresql+psycopg://…`) the same command on another machine joins the study. Put a "
        "password into RATCHET_SWEEP_STORAGE, which overrides this key",
    )
    seed: int = Field(default=41, ge=0, description="seed of the draws")


class CompareConfig(Section):
    """The settings that `ratchet compare` uses for each method."""

    settings: dict[str, dict[str, bool | int | float | str | list[str]]] = Field(
        default={
            "full": {"train.learning_rate": 2.0e-5},
            "ia3": {"train.learning_rate": 5.0e-3},
            "prefix": {"train.learning_rate": 5.0e-3},
            "prompt": {"train.learning_rate": 2.0e-2},
        },
        description="method → keys of `train` and `adapter` with the values that this method is compared "
        "with; everything else is the same for all methods",
    )


class RetrainConfig(Section):
    """The flow `retrain`: when it starts, and what it leaves behind."""

    cron: str = Field(default="0 3 * * 1", description="schedule of the deployment, in cron syntax, UTC")
    on_data: bool = Field(
        default=False,
        description="whether an ingest starts a retraining by itself, while the deployments are served",
    )
    trains_with: Literal["rows", "nodes"] = Field(
        default="rows",
        description="what every retraining trains with, also one by schedule or drift: the rows of this "
        "checkout, or the nodes of its federation, whose rows stay there (docs/federated.md)",
    )
    keep_workspaces: int = Field(
        default=2, ge=0, description="failed workspaces of each kind of run that are kept for inspection"
    )


StageName = Literal["base", "prepare", "tokenize", "train", "evaluate", "parity", "gate"]


class Place(Section):
    """A work pool of Prefect in which a stage runs instead of on this machine (docs/second-machine.md)."""

    pool: str = Field(
        pattern=r"^[A-Za-z0-9][\w-]*$",
        description="work pool of Prefect; `ratchet worker --pool NAME` on another machine serves it",
    )
    attempts: Count = Field(
        default=3, description="attempts at the stage, where machines or processes are lost; 1: no second one"
    )
    lease_minutes: float = Field(
        default=3.0,
        ge=1.0,
        description="minutes without a sign of life after which a machine counts as lost and another attempt "
        "begins; a lost machine that comes back cannot write any more. A sign comes every 30 seconds",
    )
    wait_minutes: float = Field(
        default=60.0, gt=0, description="minutes to wait for a free worker of the pool before the run fails"
    )
