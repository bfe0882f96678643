"""Sections of params.yaml: rows that a teacher writes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ratchet.config.base import Count, Section, Share


class TeacherConfig(Section):
    """The model that writes the rows."""

    protocol: Literal["openai", "anthropic"] = Field(
        default="openai",
        description="`openai`: `/chat/completions`, as of OpenAI, vLLM, Ollama or this gateway; `anthropic`: "
        "`/messages`",
    )
    url: str = Field(
        default="",
        description="base URL, such as `http://127.0.0.1:8000/v1` or `https://api.anthropic.com/v1`",
    )
    model: str = Field(default="", description="name of the model at that endpoint")
    key_env: str = Field(
        default="RATCHET_TEACHER_KEY",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable that holds the key; a server without keys needs none",
    )
    licence: str = Field(
        default="unknown",
        description="what the teacher's terms say of training on its answers; kept in each row",
    )
    input_price: float = Field(
        default=0.0, ge=0, description="price of a million input tokens, in any one currency"
    )
    output_price: float = Field(default=0.0, ge=0, description="price of a million output tokens")
    temperature: float = Field(
        default=0.7, ge=0, le=2, description="sampling temperature; left out where the endpoint refuses it"
    )
    max_tokens: int = Field(default=2048, ge=16, description="tokens of one answer, at most")
    requests_per_minute: int = Field(
        default=0, ge=0, description="requests in a minute, evenly spaced; 0 is no limit"
    )
    parallel: int = Field(default=4, ge=1, le=256, description="requests under way together")
    timeout: float = Field(default=120.0, gt=0, description="seconds that one answer may take")
    tries: int = Field(
        default=5,
        ge=1,
        le=20,
        description="times that a request is sent when the endpoint is busy, broken or away",
    )


class JudgeConfig(TeacherConfig):
    """A second model that scores each row from 0 to 1; without a `model` nobody judges."""

    key_env: str = Field(
        default="RATCHET_JUDGE_KEY",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable that holds its key; a server without keys needs none",
    )
    temperature: float = Field(
        default=0.0, ge=0, le=2, description="sampling temperature; left out where the endpoint refuses it"
    )
    max_tokens: int = Field(default=512, ge=16, description="tokens of one answer, at most")
    min_score: Share = Field(default=0.7, description="score under which a row gets a doubt")


class GroundedConfig(Section):
    """How much of an answer has to stand in its passage."""

    doubt: Share = Field(
        default=0.8,
        description="share of the answer's content words found in the passage under which a row gets a doubt",
    )
    refuse: Share = Field(
        default=0.5,
        description="share under which it is refused; a number that the passage lacks refuses it as well. 0 "
        "refuses nothing",
    )

    @model_validator(mode="after")
    def _ordered(self) -> GroundedConfig:
        if self.refuse > self.doubt:
            raise ValueError(
                f"synthesize.grounded.refuse ({self.refuse}) is over synthesize.grounded.doubt "
                f"({self.doubt}): no row would get a doubt"
            )
        return self


class AugmentConfig(Section):
    """Further wordings of the kept questions (EDA, arXiv 1901.11196); each kind that is on adds a row."""

    synonyms: str = Field(default="", description="JSON file of word → list of synonyms; empty: none")
    replace: Share = Field(
        default=0.1, description="share of the question's words that get a synonym, at least one"
    )
    insert: Share = Field(
        default=0.0,
        description="share of the question's words after which a synonym of another is inserted; needs "
        "`synonyms`",
    )
    delete: Share = Field(default=0.0, description="share of the question's words that are left out")
    back_translate: str = Field(
        default="",
        description="language, such as `German`, into which the teacher translates a question, and back; "
        "empty: none",
    )


class SynthesizeConfig(Section):
    """Rows written by a teacher model, for people to review."""

    teacher: TeacherConfig = Field(
        default_factory=TeacherConfig, description="the model that writes the rows"
    )
    judge: JudgeConfig = Field(default_factory=JudgeConfig, description="a second model that scores them")
    max_cost: float = Field(
        default=5.0,
        ge=0,
        description="money that one run may spend at teacher and judge, in the prices' currency; it stops "
        "before it would go over",
    )
    max_run_tokens: int = Field(
        default=2_000_000,
        ge=0,
        description="tokens of one run, input and output of all requests; it stops before it would go over",
    )
    count: Count = Field(default=200, description="rows that a run keeps, when the command names no number")
    per_chunk: int = Field(default=4, ge=1, le=50, description="pairs that one request asks for")
    rounds: int = Field(
        default=2,
        ge=1,
        le=20,
        description="times that the same chunks or rows are asked about, at most, until there are enough "
        "rows",
    )
    chunk_chars: int = Field(default=3000, ge=200, description="longest chunk of a document, in characters")
    overlap_chars: int = Field(
        default=200, ge=0, description="characters of the chunk before that a chunk repeats, at most"
    )
    system: str = Field(default="", description="system message put before each row; empty: none")
    max_question_chars: Count = Field(default=1000, description="longest question, in characters")
    max_answer_chars: Count = Field(default=4000, description="longest answer, in characters")
    score_with_champion: bool = Field(
        default=False,
        description="ask the running gateway each question; an answer that differs is a doubt. Its key comes "
        "from RATCHET_GATEWAY_KEY",
    )
    prompts: str = Field(
        default="", description="folder of prompt templates that win over those of the package, by file name"
    )
    seed: int = Field(
        default=29,
        ge=0,
        description="seed of what is drawn, and of the requests where the endpoint takes one",
    )
    grounded: GroundedConfig = Field(
        default_factory=GroundedConfig, description="how much of an answer has to stand in its passage"
    )
    augment: AugmentConfig = Field(
        default_factory=AugmentConfig, description="further wordings of the kept questions"
    )

    @model_validator(mode="after")
    def _moves_on(self) -> SynthesizeConfig:
        if self.overlap_chars > self.chunk_chars // 2:
            raise ValueError(
                f"synthesize.overlap_chars ({self.overlap_chars}) is over half of synthesize.chunk_chars "
                f"({self.chunk_chars}): chunks would repeat each other"
            )
        if self.augment.insert and not self.augment.synonyms:
            raise ValueError(
                "synthesize.augment.insert needs synthesize.augment.synonyms: what is inserted are synonyms"
            )
        return self
