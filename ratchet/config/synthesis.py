"""Sections of params.yaml: rows that a teacher model writes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ratchet.config.base import Count, Section, Share


class EndpointConfig(Section):
    """A model behind an API."""

    protocol: Literal["openai", "anthropic"] = Field(
        default="openai",
        description="API of the endpoint. `openai`: `/chat/completions`, as served by OpenAI, vLLM, Ollama "
        "and this gateway; `anthropic`: `/messages`",
    )
    url: str = Field(
        default="",
        description="base URL, such as `http://127.0.0.1:8000/v1` or `https://api.anthropic.com/v1`",
    )
    more_urls: list[str] = Field(
        default=[],
        description="base URLs of further servers of the same model, with the same key; requests go to the "
        "least busy one, and those of a server that fails or is slow go to the others",
    )
    model: str = Field(default="", description="name of the model at that endpoint")
    key_env: str = Field(
        default="RATCHET_TEACHER_KEY",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable that holds the API key; unset for a server without keys",
    )
    input_price: float = Field(
        default=0.0,
        ge=0,
        description="price of a million input tokens, in any one currency; needed for the limit `max_cost`",
    )
    output_price: float = Field(
        default=0.0, ge=0, description="price of a million output tokens, in the same currency"
    )
    temperature: float = Field(
        default=0.7,
        ge=0,
        le=2,
        description="sampling temperature; higher gives more varied answers. It is left out of requests if "
        "the endpoint refuses it",
    )
    max_tokens: int = Field(default=2048, ge=16, description="longest answer, in tokens")
    requests_per_minute: int = Field(
        default=0,
        ge=0,
        description="requests per minute and server, evenly spaced; set it to the endpoint's rate limit; "
        "0: no limit",
    )
    parallel: int = Field(
        default=4, ge=1, le=256, description="requests in flight at the same time, at each server"
    )
    timeout: float = Field(default=120.0, gt=0, description="seconds to wait for one answer")
    tries: int = Field(
        default=5,
        ge=1,
        le=20,
        description="attempts per request when the endpoint is busy, fails or cannot be reached",
    )


class TeacherConfig(EndpointConfig):
    """The model that writes the rows."""

    licence: str = Field(
        default="unknown",
        description="what the provider's terms say about training on the answers; recorded in each row that "
        "this model writes",
    )


class JudgeConfig(EndpointConfig):
    """A second model that scores each row from 0 to 1; without a `model` there are no scores."""

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
    max_tokens: int = Field(default=512, ge=16, description="longest answer, in tokens")
    min_score: Share = Field(
        default=0.7, description="score below which a row gets a doubt, so that a person reviews it"
    )


class GroundedConfig(Section):
    """How much of an answer has to occur in its passage."""

    doubt: Share = Field(
        default=0.8,
        description="share of the answer's content words that occur in the passage, below which a row gets "
        "a doubt; lower it for answers that rephrase freely",
    )
    refuse: Share = Field(
        default=0.5,
        description="share, as for `doubt`, below which a row is refused; a number that the passage lacks "
        "also refuses it. 0: never refuse",
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
    """Further wordings of kept questions (EDA, arXiv 1901.11196); each enabled kind adds a row."""

    synonyms: str = Field(
        default="", description="JSON file of word → list of synonyms; empty: no replacement and no insertion"
    )
    replace: Share = Field(
        default=0.1,
        description="share of the question's words that are replaced by a synonym, at least one word; needs "
        "`synonyms`",
    )
    insert: Share = Field(
        default=0.0,
        description="share of the question's words after which a synonym of some word of the question is "
        "inserted; needs `synonyms`; 0: off",
    )
    delete: Share = Field(default=0.0, description="share of the question's words that are deleted; 0: off")
    back_translate: str = Field(
        default="",
        description="language, such as `German`, into which the teacher translates each question and back; "
        "costs one request per kept row; empty: off",
    )


class SynthesizeConfig(Section):
    """Rows that a teacher model writes and people review."""

    teacher: TeacherConfig = Field(
        default_factory=TeacherConfig, description="the model that writes the rows"
    )
    judge: JudgeConfig = Field(default_factory=JudgeConfig, description="a second model that scores the rows")
    max_cost: float = Field(
        default=5.0,
        ge=0,
        description="money that teacher and judge may cost in one run, in the currency of the prices; a "
        "request that could exceed it is not sent",
    )
    max_run_tokens: int = Field(
        default=2_000_000,
        ge=0,
        description="input and output tokens of all requests of one run; a request that could exceed it is "
        "not sent",
    )
    count: Count = Field(default=200, description="rows that a run keeps if the command gives no number")
    per_chunk: int = Field(
        default=4, ge=1, le=50, description="question-answer pairs that one request asks for"
    )
    rounds: int = Field(
        default=2,
        ge=1,
        le=20,
        description="times that the same chunks or rows may be asked about until there are enough rows; "
        "raise it if a run ends with too few",
    )
    chunk_chars: int = Field(default=3000, ge=200, description="longest chunk of a document, in characters")
    overlap_chars: int = Field(
        default=200, ge=0, description="characters that a chunk may repeat from the end of the previous chunk"
    )
    system: str = Field(default="", description="system message of each new row; empty: none")
    max_question_chars: Count = Field(default=1000, description="longest accepted question, in characters")
    max_answer_chars: Count = Field(default=4000, description="longest accepted answer, in characters")
    score_with_champion: bool = Field(
        default=False,
        description="send each question to the running gateway too; a different answer gives the row a "
        "doubt. The requests count as traffic of the gateway, whose key comes from RATCHET_GATEWAY_KEY",
    )
    prompts: str = Field(
        default="",
        description="folder of prompt templates; each overrides the packaged template with the same file "
        "name",
    )
    seed: int = Field(
        default=29,
        ge=0,
        description="seed of all random draws, and of the requests if the endpoint accepts one",
    )
    grounded: GroundedConfig = Field(
        default_factory=GroundedConfig, description="how much of an answer has to occur in its passage"
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
