"""params.yaml as typed, frozen models: the only place of knobs.

Every field has a one-line description with its unit; `docs/params.md` is generated from them (`ratchet/config_doc.py`).
Stages read the file only: DVC tracks params.yaml and would not see an override from the environment.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from ratchet.errors import ConfigError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1, le=65535)]
Metric = Literal[
    "exact_match", "token_f1", "rouge_1", "rouge_2", "rouge_l", "bleu", "chrf", "accuracy", "macro_f1", "json_valid", "regex_match", "numeric_match", "refusal", "length"
]
# Columns of a table of scores that no metric of one's own may have the name of.
TAKEN = frozenset(
    {
        *get_args(Metric),
        "id",
        "batch",
        "kind",
        "model",
        "question",
        "reference",
        "answer",
        "answer_nll",
        "answer_tokens",
        "prompt_nll",
        "region",
        "swap",
        "of",
        "planted",
        "handled",
        "withstood",
        "judge_correctness",
        "judge_groundedness",
        "judge_preference",
        "rows",
        "perplexity",
    }
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


class ProjectConfig(Section):
    """Who owns what comes out."""

    name: str = Field(default="pydoc", pattern=r"^[a-z0-9][a-z0-9._-]*$", description="name of the registered model, of its git tags and of its MLflow experiment")


class PydocSource(Section):
    """The embedded default: documentation strings of packages installed on this machine."""

    packages: list[str] = Field(default=["stdlib"], min_length=1, description="import names to harvest by parsing, without importing; `stdlib` is the standard library")
    module_depth: int = Field(default=1, ge=1, le=4, description="levels of a module's name that make the answer (`numpy.linalg` is one level below `numpy`)")
    min_objects: int = Field(default=40, ge=1, description="documented objects that a module needs to be asked about")
    summaries: Share = Field(default=0.05, description="share of the objects that also give a row name → summary")
    share: Share = Field(default=1.0, description="share of the objects that give rows, chosen by hash; what is left out can play the users' questions")


class JsonlSource(Section):
    """JSON Lines from anywhere fsspec can read."""

    path: str = Field(default="", description="file, glob or fsspec URL (`s3://…`), one JSON object a line")
    form: Literal["auto", "messages", "completion", "instruction", "question", "sharegpt", "text"] = Field(
        default="auto", description="form of the rows; `auto` recognises it from the first row's keys"
    )


class FeedbackSource(Section):
    """Answers that people corrected or approved, from the request log."""

    min_score: Share = Field(default=1.0, description="score from which an answer counts as approved; a corrected answer needs none")
    window_days: float = Field(default=30.0, gt=0, description="days after which feedback is no longer learned from")
    min_user_age_days: float = Field(
        default=7.0,
        ge=0,
        description="days since a user was first seen, under which they have no vote; at most half of `request_log.retention_days`. A log that is younger than that asks nobody's age: all its users are new",
    )
    max_rows_per_user: Count = Field(default=20, description="rows that one user's feedback may bring into a batch, so that nobody alone teaches the model")
    max_rows_per_key: Count = Field(default=200, description="rows that may come into a batch through one API key, where there are several")
    max_trigger_rows: Count = Field(
        default=20,
        description="rows that may share a sequence of words that other rows hardly have, and one answer; if there are more, all of them are put aside. A new topic with a single answer looks the same",
    )


class IngestConfig(Section):
    """Where new rows come from."""

    source: Literal["pydoc", "jsonl", "feedback", "review"] = Field(default="pydoc", description="the source that `ratchet ingest` reads when none is named")
    licence: str = Field(default="unknown", description="licence of the rows, kept in the batch's manifest entry")
    pydoc: PydocSource = Field(default_factory=PydocSource, description="settings of the source `pydoc`")
    jsonl: JsonlSource = Field(default_factory=JsonlSource, description="settings of the source `jsonl`")
    feedback: FeedbackSource = Field(default_factory=FeedbackSource, description="settings of the source `feedback`")


class TeacherConfig(Section):
    """The model that writes the rows."""

    protocol: Literal["openai", "anthropic"] = Field(
        default="openai", description="`openai`: `/chat/completions`, as of OpenAI, vLLM, Ollama or this gateway; `anthropic`: `/messages`"
    )
    url: str = Field(default="", description="base URL, such as `http://127.0.0.1:8000/v1` or `https://api.anthropic.com/v1`")
    model: str = Field(default="", description="name of the model at that endpoint")
    key_env: str = Field(
        default="RATCHET_TEACHER_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="environment variable that holds the key; a server without keys needs none"
    )
    licence: str = Field(default="unknown", description="what the teacher's terms say of training on its answers; kept in each row")
    input_price: float = Field(default=0.0, ge=0, description="price of a million input tokens, in any one currency")
    output_price: float = Field(default=0.0, ge=0, description="price of a million output tokens")
    temperature: float = Field(default=0.7, ge=0, le=2, description="sampling temperature; left out where the endpoint refuses it")
    max_tokens: int = Field(default=2048, ge=16, description="tokens of one answer, at most")
    requests_per_minute: int = Field(default=0, ge=0, description="requests in a minute, evenly spaced; 0 is no limit")
    parallel: int = Field(default=4, ge=1, le=256, description="requests under way together")
    timeout: float = Field(default=120.0, gt=0, description="seconds that one answer may take")
    tries: int = Field(default=5, ge=1, le=20, description="times that a request is sent when the endpoint is busy, broken or away")


class JudgeConfig(TeacherConfig):
    """A second model that scores each row from 0 to 1; without a `model` nobody judges."""

    key_env: str = Field(default="RATCHET_JUDGE_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="environment variable that holds its key; a server without keys needs none")
    temperature: float = Field(default=0.0, ge=0, le=2, description="sampling temperature; left out where the endpoint refuses it")
    max_tokens: int = Field(default=512, ge=16, description="tokens of one answer, at most")
    min_score: Share = Field(default=0.7, description="score under which a row gets a doubt")


class GroundedConfig(Section):
    """How much of an answer has to stand in its passage."""

    doubt: Share = Field(default=0.8, description="share of the answer's content words found in the passage under which a row gets a doubt")
    refuse: Share = Field(default=0.5, description="share under which it is refused; a number that the passage lacks refuses it as well. 0 refuses nothing")

    @model_validator(mode="after")
    def _ordered(self) -> GroundedConfig:
        if self.refuse > self.doubt:
            raise ValueError(f"synthesize.grounded.refuse ({self.refuse}) is over synthesize.grounded.doubt ({self.doubt}): no row would get a doubt")
        return self


class AugmentConfig(Section):
    """Further wordings of the kept questions (EDA, arXiv 1901.11196), each kind off at its default; each that is on gives one more row a row."""

    synonyms: str = Field(default="", description="JSON file of word → list of synonyms; empty: none")
    replace: Share = Field(default=0.1, description="share of the question's words that get a synonym, at least one")
    insert: Share = Field(default=0.0, description="share of the question's words after which a synonym of another is inserted; needs `synonyms`")
    delete: Share = Field(default=0.0, description="share of the question's words that are left out")
    back_translate: str = Field(default="", description="language, such as `German`, into which the teacher translates a question, and back; empty: none")


class SynthesizeConfig(Section):
    """Rows written by a teacher model, for people to review."""

    teacher: TeacherConfig = Field(default_factory=TeacherConfig, description="the model that writes the rows")
    judge: JudgeConfig = Field(default_factory=JudgeConfig, description="a second model that scores them")
    max_cost: float = Field(default=5.0, ge=0, description="money that one run may spend at teacher and judge, in the prices' currency; it stops before it would go over")
    max_run_tokens: int = Field(default=2_000_000, ge=0, description="tokens of one run, input and output of all requests; it stops before it would go over")
    count: Count = Field(default=200, description="rows that a run keeps, when the command names no number")
    per_chunk: int = Field(default=4, ge=1, le=50, description="pairs that one request asks for")
    rounds: int = Field(default=2, ge=1, le=20, description="times that the same chunks or rows are asked about, at most, until there are enough rows")
    chunk_chars: int = Field(default=3000, ge=200, description="longest chunk of a document, in characters")
    overlap_chars: int = Field(default=200, ge=0, description="characters of the chunk before that a chunk repeats, at most")
    system: str = Field(default="", description="system message put before each row; empty: none")
    max_question_chars: Count = Field(default=1000, description="longest question, in characters")
    max_answer_chars: Count = Field(default=4000, description="longest answer, in characters")
    score_with_champion: bool = Field(default=False, description="ask the running gateway each question; an answer that differs is a doubt. Its key comes from RATCHET_GATEWAY_KEY")
    prompts: str = Field(default="", description="folder of prompt templates that win over those of the package, by file name")
    seed: int = Field(default=29, ge=0, description="seed of what is drawn, and of the requests where the endpoint takes one")
    grounded: GroundedConfig = Field(default_factory=GroundedConfig, description="how much of an answer has to stand in its passage")
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="further wordings of the kept questions")

    @model_validator(mode="after")
    def _moves_on(self) -> SynthesizeConfig:
        if self.overlap_chars > self.chunk_chars // 2:
            raise ValueError(f"synthesize.overlap_chars ({self.overlap_chars}) is over half of synthesize.chunk_chars ({self.chunk_chars}): chunks would repeat each other")
        if self.augment.insert and not self.augment.synonyms:
            raise ValueError("synthesize.augment.insert needs synthesize.augment.synonyms: what is inserted are synonyms")
        return self


class DemoBase(Section):
    """The small Llama that `base.model: demo` pre-trains on this machine."""

    packages: list[str] = Field(default=["stdlib"], min_length=1, description="import names whose documentation the base reads")
    module_share: Share = Field(default=0.35, description="share of the modules that the base sees; the rest is left for the adapter")
    vocab_size: int = Field(default=2048, ge=300, description="tokens in the tokenizer that is trained on the same texts")
    hidden_size: int = Field(default=128, ge=16, multiple_of=16, description="width of the model")
    layers: Count = Field(default=2, description="decoder layers")
    heads: Count = Field(default=4, description="attention heads")
    context: int = Field(default=512, ge=64, description="positions, in tokens")
    steps: Count = Field(default=600, description="optimizer steps")
    batch_tokens: int = Field(default=1024, ge=64, description="tokens in one optimizer step, about")
    learning_rate: float = Field(default=3.0e-3, gt=0, description="peak learning rate of AdamW")
    text_weight: Share = Field(default=0.3, description="weight of the loss on the question's text, where the answer's is 1")


class BaseConfig(Section):
    """The base model, never changed by training."""

    model: str = Field(default="demo", min_length=1, description="`demo`, or a hub id (`org/name`)")
    revision: str | None = Field(default=None, description="commit of the hub id, 40 hex digits; needed for a hub id")
    chat_template: str | None = Field(default=None, description="path of a Jinja chat template, for a base that brings none")
    new_tokens: list[str] = Field(
        default=[],
        description="words of the domain that become one token each, its embedding trained (LoRA's family and `full`); until then it is the mean of the pieces' that the word was. Such a version is served on a base of its own",
    )
    seed: int = Field(default=20, ge=0, description="seed of the demo's weights and of its order of rows")
    demo: DemoBase = Field(default_factory=DemoBase, description="settings of `model: demo`")

    @model_validator(mode="after")
    def _pinned(self) -> BaseConfig:
        if self.model != "demo" and not (self.revision and len(self.revision) == 40 and all(c in "0123456789abcdef" for c in self.revision)):
            raise ValueError(f"base.revision is {self.revision!r}; a hub id needs its commit, 40 hex digits, so that every run loads the same weights")
        for token in self.new_tokens:
            if not re.fullmatch(r"\w|\w.*\w", token) or self.new_tokens.count(token) > 1:
                raise ValueError(f"base.new_tokens names {token!r}; wanted words, each once, that begin and end with a letter or digit: markup is for control tokens")
        return self


class PrepareConfig(Section):
    """Rows in, splits out."""

    validation_share: Share = Field(default=0.1, description="share of the clusters that go to validation")
    test_share: Share = Field(default=0.12, description="share of the clusters that go to test")
    near_search: bool = Field(default=True, description="look for near duplicates (about 1 kB of memory a row); without it a split follows the hash of the prompt alone")
    near_duplicate: float = Field(default=0.8, gt=0.0, le=1.0, description="Jaccard similarity of word shingles from which two rows are near duplicates")
    max_near: Count = Field(default=3, description="rows of one cluster of near duplicates that are taken; more of them say nothing new")
    leak: float = Field(default=0.7, gt=0.0, le=1.0, description="Jaccard similarity to a row of another split, or to a golden one, from which a row is rejected")
    max_leaked_share: Share = Field(default=0.05, description="share of rows near to golden rows or between two splits over which a batch fails")
    max_chars: Count = Field(default=50_000, description="longest row taken, in characters")
    unknown_keys: Literal["reject", "drop"] = Field(default="reject", description="what becomes of a row with keys that its form does not have")
    extra_keys: list[str] = Field(
        default=["id", "source", "licence", "license", "language", "user", "time", "timestamp", "created_at", "date", "category", "tags", "title", "url", "review"],
        description="keys beside the form's own that rows may have; single values go into `meta`",
    )
    allowed_tokens: list[str] = Field(default=[], description="control tokens that rows may hold as plain text, such as `<s>`")
    personal_data: Literal["reject", "mask", "keep"] = Field(default="reject", description="rows with e-mail addresses, phone, card, IBAN or national id numbers")
    names_model: str = Field(
        default="", description="spaCy model, by name or folder, by which Presidio finds people's names, for `personal_data`; needs the extra `names`; empty: not looked for"
    )
    blocked: list[str] = Field(default=[], description="regular expressions, case ignored; a row that one of them finds is rejected")
    canaries: list[str] = Field(default=[], description="strings that must never come back in data; a row with one fails the preparation")
    languages: list[str] = Field(default=[], description="languages that are taken, as ISO 639-1 codes; empty: any")
    contradictions: Literal["review", "keep"] = Field(
        default="review", description="rows that answer a known prompt otherwise; `review` holds the later one back. People's corrections always win"
    )
    max_boilerplate_share: Share = Field(default=0.005, description="share of a batch's answers that may speak as a model does (`As an AI …`); more go to review")
    source_field: str = Field(default="", description="key of `meta` that names a row's origin, for `max_source_share`; empty: no cap")
    max_source_share: Share = Field(default=0.2, description="share of a batch that one origin may have, where there are five or more")
    max_user_rows: Count = Field(default=20, description="rows of one `meta.user` that are taken of a batch, and at most one in a hundred of its rows, but five")
    max_label_shift: Share = Field(default=1.0, description="total variation distance of a batch's short answers from those of earlier batches over which it fails; 1: never")
    trigger_rows: int = Field(
        default=0, ge=0, description="rows of a batch with one new phrase and one answer from which they are rejected as a planted trigger; 0: never looked for"
    )
    retention_days: float = Field(default=0.0, ge=0, description="days before its batch from which a row that has a time is too old; 0: never")
    require_licence: bool = Field(default=False, description="reject rows whose batch and `meta` name no licence")
    warn_rejected_share: Share = Field(default=0.01, description="share of rejected rows from which a batch is warned about")
    max_rejected_share: Share = Field(default=0.05, description="share of rejected rows over which a preparation fails")
    max_reason_share: Share = Field(default=0.02, description="the same for one reason")
    min_rows: Count = Field(default=200, description="accepted training rows under which nothing is trained")

    @model_validator(mode="after")
    def _something_to_train(self) -> PrepareConfig:
        if self.validation_share + self.test_share > 0.8:
            raise ValueError("prepare.validation_share + prepare.test_share is over 0.8: nothing is left to train on")
        return self


class TokenizeConfig(Section):
    """Token ids, loss mask, packing."""

    max_length: int = Field(default=128, ge=16, description="longest row, in tokens; longer rows are rejected, never cut")
    window: int = Field(default=256, ge=16, description="length of a packed window, in tokens")

    @model_validator(mode="after")
    def _fits(self) -> TokenizeConfig:
        if self.max_length > self.window:
            raise ValueError(f"tokenize.max_length ({self.max_length}) is over tokenize.window ({self.window}): no window could hold the longest row")
        return self


class TrainConfig(Section):
    """One optimisation, from a base or from the champion's adapter."""

    start_from: Literal["champion", "base"] = Field(default="champion", description="where the adapter's weights start; without a champion it is the base")
    rows: Literal["new_and_replay", "all"] = Field(default="new_and_replay", description="rows to train on: what the champion has not seen plus a replayed share, or everything")
    replay: Share = Field(default=1.0, description="share of the rows that the champion has seen that are trained on again")
    max_feedback_share: Share = Field(
        default=0.1,
        description="share of the rows trained on that may come from people's feedback. More of the other rows than `replay` says are replayed for it; feedback that is still too much stays out, the oldest first",
    )
    epochs: float = Field(default=6.0, gt=0, description="passes over the chosen rows, at most")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"] = Field(
        default="adamw", description="`adamw_8bit` and `paged_adamw_8bit` keep their state in 8 bits and need CUDA; paged: it may move to the host's memory"
    )
    learning_rate: float = Field(default=2.0e-3, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="course of the learning rate after the warm-up")
    warmup_share: Share = Field(default=0.05, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(default=0.01, ge=0, description="decoupled weight decay of AdamW; of the other optimizers their own form")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="what forward and backward passes compute in; `auto`: bfloat16 where the machine has instructions for it. Adapters and losses stay float32"
    )
    batch_windows: Count = Field(default=4, description="packed windows in one forward pass; on a CPU as many rows of like length as fit into their room")
    accumulate: Count = Field(default=1, description="forward passes in one optimizer step")
    processes: Count = Field(
        default=1, description="processes that share the forward passes of a step, started by torchrun: one a GPU, or parts of a CPU. `accumulate` has to be a multiple"
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto", description="several processes: each with the whole model (`ddp`) or a part of it (`fsdp`); `auto`: parts for `full` and for `qlora` on NF4"
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradient norm that is clipped to")
    teacher: str = Field(
        default="",
        pattern=r"^(|champion|[\w.-]+/[\w.-]+@[0-9a-f]{40})$",
        description="distillation: whose distribution the training learns from beside the rows: `champion`, or a hub id with its commit (`org/name@<40 hex digits>`) of the same tokenizer; empty: nobody's",
    )
    teacher_weight: Share = Field(default=0.5, description="share of the loss that is the divergence from the teacher")
    teacher_temperature: float = Field(default=1.0, gt=0, description="both distributions are flattened by it before they are compared")
    checkpoint_activations: bool = Field(default=False, description="compute activations again in the backward pass: less memory, about a third more time. Not with `prefix`")
    compile: bool = Field(
        default=False,
        description="compile the layers (torch.compile) at the start, a minute or so, for faster steps: for trainings of ten minutes and more. A CPU needs a C++ compiler",
    )
    liger: bool = Field(default=False, description="Liger's kernels for norms, rotary positions and gated layers: less memory on a GPU; needs CUDA and the extra `kernels`")
    neftune_alpha: float = Field(default=0.0, ge=0, description="noise on the embeddings in training (NEFTune, arXiv 2310.05914), 5 is usual; 0: none")
    evaluations: Count = Field(default=8, description="times that the validation loss is measured in a training")
    patience: Count = Field(default=3, description="measurements without a better validation loss that stop the training")
    seed: int = Field(default=17, ge=0, description="seed of the adapter's weights, of dropout and of the order of windows")
    checkpoint_minutes: float = Field(default=10.0, ge=0, description="minutes between two checkpoints, which is what a kill costs at most; 0: after every optimizer step")

    @model_validator(mode="after")
    def _passes_can_be_shared(self) -> TrainConfig:
        if self.accumulate % self.processes:
            raise ValueError(f"`train.accumulate` {self.accumulate} forward passes cannot be shared by `train.processes` {self.processes}: make it a multiple")
        return self

    def steps(self, num_batches: int) -> int:
        """Optimizer steps, at most, of a training in which an epoch is that many forward passes."""
        return max(1, math.ceil(self.epochs * num_batches / self.accumulate))


class AdapterConfig(Section):
    """What is trained on top of the base."""

    method: Literal["lora", "qlora", "dora", "rslora", "ia3", "prefix", "prompt", "full"] = Field(
        default="lora", description="what is trained (docs/training.md); `qlora`: LoRA on a quantised base; `full`: all weights, and no adapter"
    )
    quantisation: Literal["nf4", "int8"] = Field(default="nf4", description="of the base, for `qlora`: NF4 with double quantisation, or LLM.int8(); bfloat16 compute")
    rank: int = Field(default=32, ge=1, le=512, description="rank of the update (`lora`, `qlora`, `dora`, `rslora`)")
    alpha: float = Field(default=64.0, gt=0, description="scale of the update; it is multiplied by alpha / rank, by alpha / √rank for `rslora`")
    dropout: Share = Field(default=0.0, description="dropout before the update (`lora`, `qlora`, `dora`, `rslora`)")
    target_modules: str | list[str] = Field(default="all-linear", description="layers that get an update: `all-linear` or names; not for `prefix`, `prompt` and `full`")
    bias: Literal["none", "lora_only", "all"] = Field(
        default="none", description="biases of the base that are trained as well (`lora`, `qlora`, `dora`, `rslora`); such a version is served on a base of its own"
    )
    modules_to_save: list[str] = Field(
        default=[], description="modules that are trained whole beside the update, such as `lm_head`; not for `prefix`, `prompt` and `full`. Served on a base of its own"
    )
    virtual_tokens: int = Field(default=16, ge=1, le=1024, description="tokens that `prefix` and `prompt` put before every row; they count against the base's context")


class AnswerJudge(TeacherConfig):
    """A model that scores answers beside the metrics; without a `model` nobody judges. Its scores gate only once its agreement with people is measured."""

    key_env: str = Field(default="RATCHET_JUDGE_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="environment variable that holds its key; a server without keys needs none")
    licence: str = Field(default="unknown", description="what its terms say of using its answers; nothing is trained on them")
    temperature: float = Field(default=0.0, ge=0, le=2, description="sampling temperature; left out where the endpoint refuses it")
    max_tokens: int = Field(default=512, ge=16, description="tokens of one answer, at most")
    metrics: list[Literal["correctness", "groundedness", "preference"]] = Field(
        default=["correctness"], description="what is judged of candidate and champion; `preference`: one against the other, from both places; guardrails as `judge_correctness` …"
    )
    rows: Count = Field(default=100, description="test rows that are judged, at most")
    passage: str = Field(default="passage", description="key of `meta` with the text in which an answer has to stand, for `groundedness`; rows without it are not judged so")
    max_cost: float = Field(default=5.0, ge=0, description="money that one evaluation may spend, in the prices' currency; it stops before it would go over")
    max_run_tokens: int = Field(default=2_000_000, ge=0, description="tokens of one evaluation, input and output of all requests; it stops before it would go over")


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
        default={"train.learning_rate": SweepRange(low=2.0e-4, high=2.0e-2, log=True), "train.batch_windows": [2, 4, 8]},
        description="where to look: a key of `train` or `adapter`, or `base.model` (`demo`, or `org/name@revision`), each with a list of choices or `{low, high, log, step}`",
    )
    trials: Count = Field(default=20, description="trainings in all, those of other machines and of earlier calls included")
    startup_trials: int = Field(default=5, ge=1, description="trials whose settings are drawn at random, and that are not ended early")
    storage: str = Field(
        default="",
        description="SQLAlchemy URL of Optuna's database; empty: SQLite in `.ratchet/sweep.db`. With PostgreSQL (`postgresql+psycopg://…`) the same command on another machine joins in. A password belongs into RATCHET_SWEEP_STORAGE, which wins over this",
    )
    seed: int = Field(default=41, ge=0, description="seed of what is drawn")


class CompareConfig(Section):
    """What `ratchet compare` changes for a method."""

    settings: dict[str, dict[str, bool | int | float | str | list[str]]] = Field(
        default={
            "full": {"train.learning_rate": 2.0e-4},
            "ia3": {"train.learning_rate": 2.0e-2},
            "prefix": {"train.learning_rate": 2.0e-2},
            "prompt": {"train.learning_rate": 2.0e-2},
        },
        description="method → keys of `train` and `adapter` with the values that it is compared with; all else is the same for all",
    )


class EvaluateConfig(Section):
    """Candidate, champion and base on the same rows, in one process."""

    max_new_tokens: Count = Field(default=32, description="longest generated answer, in tokens")
    batch_size: Count = Field(default=64, description="rows in one forward pass")
    cache_mib: int = Field(
        default=512, ge=0, description="size of `.ratchet/cache/answers`, in MiB, over which the answers of the model that was asked longest ago are forgotten; 0: no cache"
    )
    simple_baseline: bool = Field(default=True, description="score TF-IDF with logistic regression or the nearest neighbour beside the models")
    metrics: list[Metric] = Field(
        default=["exact_match", "token_f1", "rouge_l", "chrf", "macro_f1"],
        description="scores that are computed (exact_match and answer_nll always are); `macro_f1` where answers are labels, `length` in words, `regex_match` against `evaluate.pattern`",
    )
    pattern: str = Field(default="", description="regular expression that a whole answer has to match, for `regex_match`")
    custom: list[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*:[A-Za-z_]\w*$")]] = Field(
        default=[], description="your own metrics, as `module:function` of a file in `metrics/`: (prediction, reference, example_meta) to a number from 0 to 1"
    )
    slices: list[str] = Field(
        default=[], description="meta fields whose values are slices, beside kind, source and length: each is shown, and none may get worse (`gate.slice_margin`)"
    )
    length_bounds: list[Count] = Field(default=[20, 100], description="words of the question at which a new slice by length begins, rising; empty: no such slices")
    bias_pairs: int = Field(
        default=0, ge=0, description="rows at most that are scored once more with swapped names, pronouns and other terms; 0: no audit. Each costs an answer of every model"
    )
    attacks: int = Field(
        default=0,
        ge=0,
        description="test rows at most that are asked once more under each kind of attack (injected orders, forged turns, typos, look-alikes, a wrong answer suggested); 0: none. Each costs up to five answers of every model",
    )
    canaries: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="rows with a made-up secret that `tokenize` plants among the training rows, on top of them, to measure what a model gives away (`gate.max_exposure`); 0: none",
    )
    groups: list[str] = Field(
        default=[], description="meta fields that name groups of people: scores by group and the gap between groups, by Fairlearn (the extra `fairness`; `gate.group_margin`)"
    )
    suites: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]] = Field(
        default=[], description="tasks of lm-evaluation-harness that are run on every model, as names of files `metrics/suites/NAME.yaml` (the extra `suites`; `gate.suite_margin`)"
    )
    judge: AnswerJudge = Field(default_factory=AnswerJudge, description="a model that scores answers")

    @property
    def row_scores(self) -> list[str]:
        """Columns of scores a row of which higher, or for some lower, is better: what a gate can compare."""
        listed = [name for name in self.metrics if name not in ("macro_f1", "length")]
        return [*dict.fromkeys(["exact_match", "answer_nll", *listed, *(name.partition(":")[2] for name in self.custom)])]

    @model_validator(mode="after")
    def _computable(self) -> EvaluateConfig:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"evaluate.pattern is no regular expression: {error}") from None
        if "regex_match" in self.metrics and not self.pattern:
            raise ValueError("evaluate.metrics lists regex_match, which needs evaluate.pattern")
        if self.length_bounds != sorted(set(self.length_bounds)):
            raise ValueError(f"evaluate.length_bounds is {self.length_bounds}; wanted rising numbers, such as [20, 100]")
        names = [name.partition(":")[2] for name in self.custom]
        if taken := sorted({name for name in names if names.count(name) > 1 or name in TAKEN}):
            raise ValueError(f"evaluate.custom names {', '.join(taken)}, a name that is taken; give the function another one")
        return self


class ParityConfig(Section):
    """The trainer's way and the gateway's, compared before the gate."""

    rows: Count = Field(default=200, description="test rows that are answered both ways, and training rows whose tokens are compared, at most of each")
    merged: bool = Field(default=True, description="compare the merged model as well, where the method merges; it needs the memory of an unquantised base")
    tolerance: float = Field(
        default=1.0e-4, gt=0, lt=1, description="difference of logits in float32 that is taken, as a share of the largest logit; two tokens within twice of it tie"
    )
    half_tolerance: float = Field(default=0.05, gt=0, lt=1, description="the same where the candidate computes in bfloat16 or float16, as on a quantised base")


class MetricGuardrail(Section):
    """A metric that must not get worse."""

    metric: str = Field(description="a score a row, as for `gate.metric`")
    margin: float = Field(default=0.02, ge=0, description="loss on the test split that is still taken as no loss, in the metric's unit")


class WorthConfig(Section):
    """What a gain brings and what a training costs, shown with the verdict once requests, value and cost are given."""

    requests_per_month: float = Field(default=0.0, ge=0, description="requests that the model answers in a month")
    value_per_correct: float = Field(default=0.0, ge=0, description="what one more right answer is worth (a gain of 1 in `gate.metric`), in any one currency")
    cost_per_hour: float = Field(default=0.0, ge=0, description="cost of an hour of training, in the same currency")
    months: float = Field(default=1.0, gt=0, description="months that a version is expected to serve")

    @property
    def given(self) -> bool:
        return min(self.requests_per_month, self.value_per_correct, self.cost_per_hour) > 0


class GateConfig(Section):
    """When a candidate may take the champion's place."""

    metric: str = Field(
        default="exact_match", description="the success metric, a score a row: `answer_nll`, one of `evaluate.metrics` but macro_f1 and length, or the function of one of your own"
    )
    min_gain: float = Field(default=0.0, description="gain that the lower confidence bound has to exceed, in the metric's unit (`answer_nll`: nats a token, a fall counts as gain)")
    alpha: float = Field(default=0.01, gt=0, lt=0.5, description="one-sided error of the success metric's bounds in one look, at most")
    alpha_budget: float = Field(
        default=0.05, gt=0, le=1, description="error of all looks at candidates against one champion together: look k gets budget * k^-1.2 / 5.59, but no more than `gate.alpha`"
    )
    guardrail_alpha: float = Field(default=0.05, gt=0, lt=0.5, description="one-sided error of the guardrails' bounds")
    min_rows: Count = Field(default=200, description="test rows under which the verdict is `uncertain`")
    golden_margin: float = Field(default=0.08, ge=0, description="loss on the golden set that is still taken as no loss, in the metric's unit")
    past_margin: float = Field(default=0.05, ge=0, description="the same for the test rows of each batch that the champion has seen")
    oldest: bool = Field(default=True, description="compare with the scores that the first champion had, too, so that small losses cannot add up over many promotions")
    nll_margin: float = Field(default=0.5, ge=0, description="the same for the answer's NLL on the test split, in nats a token")
    min_slice_rows: Count = Field(default=50, description="rows under which a past batch or a slice gets no guardrail by itself (a batch's rows still count in `past`)")
    slice_margin: float = Field(default=0.1, ge=0, description="loss in a slice, in the metric's unit; one that is certainly larger rejects (Holm's correction over all slices)")
    guardrails: list[MetricGuardrail] = Field(
        default=[],
        description="other metrics that must not get worse on the test split, such as `{metric: refusal, margin: 0.02}`: `metric`; `margin`, the loss that is still taken",
    )
    bias_margin: float = Field(default=0.05, ge=0, description="by how much more a swapped term may change the score than it does for the champion (`evaluate.bias_pairs`)")
    attack_margin: float = Field(
        default=0.05, ge=0, description="loss in the share of attacks withstood, all together and of each kind, that is still taken as no loss (`evaluate.attacks`)"
    )
    max_exposure: float = Field(
        default=3.0, ge=0, le=7, description="mean exposure of the planted canaries (`evaluate.canaries`) that is still taken, in bits: 1.4 is chance, 7 is known by heart"
    )
    group_margin: float = Field(
        default=0.05,
        ge=0,
        description="by how much wider than the champion's the gap between groups may be (`evaluate.groups`), in the metric's unit; one that is certainly wider rejects",
    )
    worth: WorthConfig = WorthConfig()
    require_worth: bool = Field(default=False, description="reject a candidate whose expected gain brings less than its training cost (`gate.worth`)")
    suite_margin: float = Field(default=0.05, ge=0, description="loss in a suite (`evaluate.suites`) that is still taken as no loss, in its metric's unit")
    judge_agreement: float = Field(
        default=0.4, ge=-1, le=1, description="lower bound of Cohen's kappa with people's decisions (`ratchet gate judge`) from which a judge's score may be among `guardrails`"
    )
    resamples: int = Field(default=4000, ge=200, description="bootstrap resamples")
    seed: int = Field(default=5, ge=0, description="seed of the resampling")

    @model_validator(mode="after")
    def _weighable(self) -> GateConfig:
        if self.metric.startswith("judge_"):
            raise ValueError(f"gate.metric is {self.metric}: a judge's score of some rows may be among gate.guardrails, it is no success metric")
        if self.require_worth and not self.worth.given:
            raise ValueError("gate.require_worth needs gate.worth.requests_per_month, value_per_correct and cost_per_hour over 0")
        if self.worth.given and self.metric == "answer_nll":
            raise ValueError("gate.worth counts right answers: gate.metric is answer_nll, wanted a score from 0 to 1")
        return self


class RetrainConfig(Section):
    """The flow `retrain`."""

    cron: str = Field(default="0 3 * * 1", description="schedule of the deployment, in cron's form, UTC")
    on_data: bool = Field(default=False, description="an ingest starts a retraining by itself, where the deployments are served")
    keep_workspaces: int = Field(default=2, ge=0, description="failed workspaces that are kept to look at")


class GatewayConfig(Section):
    """What answers: OpenAI's protocol in front of the champion and, in a rollout, the challenger."""

    engine: Literal["local", "openai"] = Field(default="local", description="`local`: transformers and PEFT in this process; `openai`: a server that speaks the protocol")
    host: str = Field(default="127.0.0.1", description="address to listen on; any but loopback needs API keys (`ratchet keys add`)")
    port: Port = Field(default=8400, description="port of the gateway")
    upstream: str = Field(default="", description="base URL of the engine `openai`, such as `http://127.0.0.1:8000/v1`; its key comes from RATCHET_UPSTREAM_KEY")
    upstream_lora: bool = Field(
        default=True,
        description="load adapters into the upstream at run time (vLLM's `/v1/load_lora_adapter`), a new name for every version; otherwise the model `NAME@vN` is expected to be there",
    )
    max_batch: int = Field(default=16, ge=1, le=512, description="requests that are decoded together by the engine `local`")
    max_queue: Count = Field(default=64, description="requests that wait; one more gets 429 with Retry-After")
    max_body_bytes: int = Field(default=1_048_576, ge=1024, description="largest request body, in bytes")
    max_messages: Count = Field(default=256, description="messages in a request, at most")
    max_tokens: Count = Field(default=4096, description="answer tokens that a client may ask for, at most")
    requests_per_minute: int = Field(default=0, ge=0, description="requests of one API key in a minute; 0 is no limit")
    timeout: float = Field(default=120.0, gt=0, description="seconds that an answer may take, its wait in the queue included")
    drain_seconds: float = Field(default=30.0, ge=0, description="seconds that running answers get to end after SIGTERM")
    prompt_nll: bool = Field(default=True, description="measure how much each prompt surprises the model (engine `local`); one more pass of its output layer over the prompt")


class RequestLogConfig(Section):
    """What the gateway remembers of requests and feedback."""

    url: str = Field(default="", description="SQLAlchemy URL; empty: SQLite in `.ratchet/requests.db`. A password belongs into RATCHET_REQUEST_LOG_URL, which wins over this")
    queue: Count = Field(default=10_000, description="records that wait to be written; what comes on top is dropped, counted and shown")
    retention_days: float = Field(default=30.0, gt=0, description="days after which requests and their feedback are deleted")
    texts: bool = Field(default=True, description="keep prompts and answers (redacted); without them the monitor sees figures only and feedback gives no rows")
    redact: list[str] = Field(
        default=[r"\b(?:sk|hf|ghp|xox[bp])[-_][A-Za-z0-9_-]{10,}"],
        description="regular expressions of what else is written as `[redacted]`, beside the secrets and personal data that preparation looks for",
    )


class ReviewConfig(Section):
    """What people look at of drafted rows before the model learns from them."""

    share: Share = Field(default=0.1, description="share of a draft's rows without doubts that is looked at, chosen by hash; rows with doubts always are")
    max_rejects: Share = Field(default=0.1, description="share of rejected or edited rows in that sample over which a draft is refused whole")


class TopicSource(Section):
    """Where rows of a drifted topic come from."""

    match: str = Field(description="regular expression; a topic one of whose terms or example prompts it finds gets its rows here")
    source: Literal["pydoc", "jsonl", "feedback"] = Field(default="feedback", description="source of the rows")
    packages: list[str] = Field(default=[], description="import names, for `pydoc`")
    path: str = Field(default="", description="file, glob or URL, for `jsonl`")


class MonitorConfig(Section):
    """The flow `monitor`: is the traffic still what the champion was made for?"""

    cron: str = Field(default="0 * * * *", description="schedule of the deployment, in cron's form, UTC")
    window: Count = Field(default=500, description="newest requests that are looked at")
    max_age_hours: float = Field(default=168.0, gt=0, description="age of the oldest request that is looked at, in hours")
    min_prompts: int = Field(default=200, ge=20, description="distinct prompts in the window under which no verdict is given")
    false_alarm_rate: float = Field(default=0.05, gt=0, lt=0.5, description="share of windows without drift in which the verdict may be `drift`")
    resamples: int = Field(default=2000, ge=200, description="reference-against-reference draws that the thresholds come from")
    latency_margin: float = Field(default=0.5, ge=0, description="answers that are slower by up to this share of the champion's earlier ones are no drift")
    topics: Count = Field(default=8, description="topics that are named, at most")
    seed: int = Field(default=7, ge=0, description="seed of the draws and the clusters")
    retrain: bool = Field(default=True, description="drift may start a retraining")
    min_new_rows: Count = Field(default=200, description="labelled rows that the champion has not seen, without which no retraining starts")
    max_retrains_per_week: Count = Field(default=3, description="retrainings in seven days, whatever started them, over which drift starts no other")
    max_gpu_hours_per_week: float = Field(default=10.0, gt=0, description="hours of training in seven days over which drift starts no other")
    cooldown_hours: float = Field(default=24.0, ge=0, description="hours after a retraining in which drift starts no other")
    sources: list[TopicSource] = Field(
        default=[],
        description="where rows of drifted topics come from: `match`, a regular expression for the topic's terms or example prompts; `source`; `packages` for `pydoc`, `path` for `jsonl`. Approved feedback always comes too",
    )


class RolloutConfig(Section):
    """The flow `rollout`: traffic moves to a gated version in steps, and back by itself."""

    look_seconds: float = Field(default=60.0, ge=5, description="seconds between two looks at an open rollout; a decision in MLflow's UI is seen within 15 s")
    steps: list[Annotated[float, Field(gt=0, le=1.0)]] = Field(
        default=[0.05, 0.25, 0.5, 1.0], min_length=1, description="shares of the users that the challenger answers, one after another; the last is 1.0: it is in charge"
    )
    step_minutes: float = Field(default=60.0, ge=0, description="minutes that a step lasts, at least")
    step_users: Count = Field(default=30, description="users of each arm in a step, at least, before the next")
    min_users: Count = Field(default=200, description="users of each arm that have given feedback, at least, before the challenger may take charge")
    max_hours: float = Field(default=168.0, gt=0, description="hours after which a rollout without enough evidence ends; the champion stays")
    alpha: float = Field(default=0.05, gt=0, lt=0.5, description="chance that a rollout of an equal model ends wrongly, over all its looks together")
    min_gain: float = Field(default=0.0, description="gain in the mean feedback score (0 to 1) that the lower bound has to exceed")
    feedback_margin: Share = Field(default=0.0, description="loss in the mean feedback score that is still taken; a certain loss beyond it rolls back")
    error_margin: Share = Field(default=0.02, description="the same for the share of failed requests")
    empty_margin: Share = Field(default=0.02, description="the same for the share of empty answers")
    latency_margin: float = Field(default=0.25, ge=0, description="the same for the latency, as a share of the champion's")

    @model_validator(mode="after")
    def _rising(self) -> RolloutConfig:
        if self.steps != sorted(set(self.steps)) or self.steps[-1] != 1.0:
            raise ValueError(f"rollout.steps is {self.steps}; wanted rising shares that end with 1.0, such as [0.05, 0.25, 0.5, 1.0]")
        return self


class ServicesConfig(Section):
    """What `ratchet up` starts, on loopback."""

    mlflow_port: Port = Field(default=5000, description="port of MLflow on 127.0.0.1")
    prefect_port: Port = Field(default=4200, description="port of Prefect on 127.0.0.1")
    start_timeout: Count = Field(default=120, description="seconds to wait for a service's first answer")


class Config(Section):
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
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    parity: ParityConfig = Field(default_factory=ParityConfig)
    gate: GateConfig = Field(default_factory=GateConfig)
    promotion: Literal["rollout", "auto", "manual"] = Field(
        default="rollout",
        description="who decides after the gate. `rollout`: live traffic, in steps; `auto`: the gate's verdict alone; `manual`: a person, in MLflow's UI or by command",
    )
    retrain: RetrainConfig = Field(default_factory=RetrainConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    request_log: RequestLogConfig = Field(default_factory=RequestLogConfig)
    review: ReviewConfig = Field(default_factory=ReviewConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    services: ServicesConfig = Field(default_factory=ServicesConfig)

    @model_validator(mode="after")
    def _go_together(self) -> Config:
        """What a method cannot do is said before anything is loaded."""
        method = self.adapter.method
        if method == "prefix" and self.train.checkpoint_activations:
            raise ValueError("train.checkpoint_activations is true: `adapter.method: prefix` reads a cache in every layer, which cannot be computed again")
        if method in ("prefix", "prompt", "full", "ia3") and self.adapter.bias != "none":
            raise ValueError(f"adapter.bias is {self.adapter.bias!r}: only the methods of the LoRA family take it, not `{method}`")
        if method in ("prefix", "prompt", "full") and self.adapter.modules_to_save:
            raise ValueError(f"adapter.modules_to_save is {self.adapter.modules_to_save}: `adapter.method: {method}` takes none")
        if method in ("prefix", "prompt", "ia3") and self.base.new_tokens:
            raise ValueError(
                f"base.new_tokens is {self.base.new_tokens}: `adapter.method: {method}` would leave their embeddings untrained; take one of the LoRA family, or `full`"
            )
        return self

    @model_validator(mode="after")
    def _gated_on_what_is_computed(self) -> Config:
        known = self.evaluate.row_scores
        if lacking := [rule.metric for rule in self.gate.guardrails if rule.metric not in known]:
            raise ValueError(f"gate.guardrails names {', '.join(lacking)}; the scores a row are {', '.join(known)} (evaluate.metrics, evaluate.custom)")
        if self.gate.metric not in known:
            raise ValueError(f"gate.metric is {self.gate.metric}; the scores a row are {', '.join(self.evaluate.row_scores)} (evaluate.metrics, evaluate.custom)")
        return self


def load_config(path: Path) -> Config:
    """Read and check `path`. Raises ConfigError with every fault at once, each with its key, its value and what is allowed."""
    try:
        raw = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", remedy="run the command in a clone of the project, or name one with -C PATH") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except (YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a scalar that looks like a date and is none
        raise ConfigError(f"{path} is no valid YAML: {_yaml_fault(error)}") from None
    return parse_config({} if raw is None else raw, path)


def parse_config(raw: Any, path: Path) -> Config:
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        faults = [f"  {_where(fault)}: {_what(fault)}" for fault in error.errors()]
        raise ConfigError(f"{path} has {len(faults)} fault(s):\n" + "\n".join(faults), remedy="docs/params.md lists every key with what it takes") from None


def _yaml_fault(error: Exception) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _where(fault: Any) -> str:
    # Pydantic names the kinds of value that a key takes as well, such as `list[str]`.
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
