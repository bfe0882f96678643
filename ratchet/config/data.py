"""Sections of params.yaml: where rows come from, how they are prepared, tokenised and reviewed."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ratchet.config.base import Count, Section, Share

FEW = 2  # rows that never fail a batch or a split


class ProjectConfig(Section):
    """Who owns what comes out."""

    name: str = Field(
        default="pydoc",
        pattern=r"^[a-z0-9][a-z0-9._-]*$",
        description="name of the registered model, of its git tags and of its MLflow experiment",
    )


class PydocSource(Section):
    """The embedded default: documentation strings of packages installed on this machine."""

    packages: list[str] = Field(
        default=["stdlib"],
        min_length=1,
        description="import names to harvest by parsing, without importing; `stdlib` is the standard library",
    )
    module_depth: int = Field(
        default=1,
        ge=1,
        le=4,
        description="levels of a module's name that make the answer (`numpy.linalg` is one level below "
        "`numpy`)",
    )
    min_objects: int = Field(
        default=40, ge=1, description="documented objects that a module needs to be asked about"
    )
    summaries: Share = Field(
        default=0.05, description="share of the objects that also give a row name → summary"
    )
    share: Share = Field(
        default=1.0,
        description="share of the objects that give rows, chosen by hash; the rest can serve as users' "
        "questions",
    )


class JsonlSource(Section):
    """Files of rows from anywhere fsspec can read: JSON, CSV, TSV, Parquet, Arrow, told by their content."""

    path: str = Field(
        default="",
        description="file, glob, folder of `datasets.save_to_disk`, or fsspec URL (`s3://…`, "
        "`hf://datasets/…`)",
    )
    form: Literal[
        "auto", "messages", "completion", "preference", "instruction", "question", "sharegpt", "text"
    ] = Field(default="auto", description="form of the rows; `auto` recognises it from the first row's keys")


class SqlSource(Section):
    """Rows of a database, by SQLAlchemy; the password comes from the variable RATCHET_SQL_PASSWORD."""

    url: str = Field(
        default="",
        description="address without a password: `postgresql+psycopg://USER@HOST/DATABASE`, `sqlite:///FILE`",
    )
    query: str = Field(default="", description="the SELECT whose result is the rows")


class FeedbackSource(Section):
    """Answers that people corrected or approved, from the request log."""

    min_score: Share = Field(
        default=1.0,
        description="score from which an answer counts as approved; a corrected answer needs none",
    )
    window_days: float = Field(
        default=30.0, gt=0, description="days after which feedback is no longer learned from"
    )
    min_user_age_days: float = Field(
        default=7.0,
        ge=0,
        description="days that a user has to be known before their feedback counts; at most half of "
        "`request_log.keep_days`. A log younger than that checks nobody's age, since all its "
        "users are new",
    )
    max_rows_per_user: Count = Field(
        default=20,
        description="rows that one user's feedback may bring into a batch, so that nobody alone teaches the "
        "model",
    )
    max_rows_per_key: Count = Field(
        default=200,
        description="rows that may come into a batch through one API key, where there are several",
    )
    max_trigger_rows: Count = Field(
        default=20,
        description="rows that may share a sequence of words that other rows hardly have, and one answer; if "
        "there are more, all of them are put aside. A new topic with a single answer looks the same",
    )


class IngestConfig(Section):
    """Where new rows come from."""

    source: Literal["pydoc", "jsonl", "sql", "feedback", "review"] = Field(
        default="pydoc", description="the source that `ratchet ingest` reads when none is named"
    )
    licence: str = Field(
        default="unknown", description="licence of the rows, kept in the batch's manifest entry"
    )
    columns: dict[str, str] = Field(
        default={},
        description="key of a known form → column of the file or query, for `jsonl` and `sql`, such as "
        "`{prompt: text, completion: category}`; other columns are taken only where `prepare.extra_keys` "
        "or a form knows them",
    )
    pydoc: PydocSource = Field(default_factory=PydocSource, description="settings of the source `pydoc`")
    jsonl: JsonlSource = Field(default_factory=JsonlSource, description="settings of the source `jsonl`")
    sql: SqlSource = Field(default_factory=SqlSource, description="settings of the source `sql`")
    feedback: FeedbackSource = Field(
        default_factory=FeedbackSource, description="settings of the source `feedback`"
    )


class PrepareConfig(Section):
    """Rows in, splits out."""

    renamed: ClassVar = {"prepare.retention_days": "prepare.max_age_days"}

    validation_share: Share = Field(default=0.1, description="share of the clusters that go to validation")
    test_share: Share = Field(default=0.12, description="share of the clusters that go to test")
    near_search: bool = Field(
        default=True,
        description="look for near duplicates (about 1 kB of memory a row); without it a split follows the "
        "hash of the prompt alone",
    )
    near_duplicate: float = Field(
        default=0.8,
        gt=0.0,
        le=1.0,
        description="Jaccard similarity of word shingles from which two rows are near duplicates",
    )
    max_near: Count = Field(
        default=3,
        description="rows of one cluster of near duplicates that are taken; more of them say nothing new",
    )
    leak: float = Field(
        default=0.7,
        gt=0.0,
        le=1.0,
        description="Jaccard similarity to a row of another split, or to a golden one, from which a row is "
        "rejected",
    )
    max_leaked_share: Share = Field(
        default=0.05,
        description="share of rows near to golden rows or between two splits over which a batch fails",
    )
    max_chars: Count = Field(default=50_000, description="longest row taken, in characters")
    unknown_keys: Literal["reject", "drop"] = Field(
        default="reject", description="what becomes of a row with keys that its form does not have"
    )
    extra_keys: list[str] = Field(
        default=[
            "id",
            "source",
            "licence",
            "license",
            "language",
            "user",
            "time",
            "timestamp",
            "created_at",
            "date",
            "category",
            "tags",
            "title",
            "url",
            "review",
            "prompt_id",
            "conversation_id",
        ],
        description="keys beside the form's own that rows may have; single values go into `meta`",
    )
    control_tokens: Literal["reject", "keep"] = Field(
        default="reject",
        description="rows that hold what is a control token of some model family (`<s>`, `[INST]`); `keep` "
        "takes it as plain characters, which never become a control token here",
    )
    isolates: Literal["reject", "keep"] = Field(
        default="reject",
        description="rows with U+2066 to U+2069, which W3C advises around text of another direction; "
        "overrides (U+202A to U+202E) are always rejected",
    )
    allowed_tokens: list[str] = Field(
        default=[], description="control tokens that rows may hold as plain text, such as `<s>`"
    )
    personal_data: Literal["reject", "mask", "keep"] = Field(
        default="reject", description="rows with e-mail addresses, phone, card, IBAN or national id numbers"
    )
    names_model: str = Field(
        default="",
        description="spaCy model, by name or folder, by which Presidio finds people's names, for "
        "`personal_data`; needs the extra `names`; empty: not looked for",
    )
    blocked: list[str] = Field(
        default=[], description="regular expressions, case ignored; a row that matches one is rejected"
    )
    canaries: list[str] = Field(
        default=[],
        description="strings that must never come back in data; a row with one fails the preparation",
    )
    languages: list[str] = Field(
        default=[], description="languages that are taken, as ISO 639-1 codes; empty: any"
    )
    contradictions: Literal["review", "keep"] = Field(
        default="review",
        description="rows that answer a known prompt differently; `review` holds the later one back for a "
        "person. People's corrections always win",
    )
    max_boilerplate_share: Share = Field(
        default=0.005,
        description="share of a batch's answers that may speak as a model does (`As an AI …`); more go to "
        "review",
    )
    source_field: str = Field(
        default="",
        description="key of `meta` that names a row's origin, for `max_source_share`; empty: no cap",
    )
    max_source_share: Share = Field(
        default=0.2, description="share of a batch that one origin may have, where there are five or more"
    )
    max_user_rows: Count = Field(
        default=20,
        description="rows of one `meta.user` that are taken from a batch; a hundredth of its rows where that "
        "is fewer, but at least five",
    )
    max_label_shift: Share = Field(
        default=1.0,
        description="total variation distance of a batch's short answers from those of earlier batches over "
        "which it fails; 1: never",
    )
    trigger_rows: int = Field(
        default=0,
        ge=0,
        description="rows of a batch with one new phrase and one answer from which they are rejected as a "
        "planted trigger; 0: never looked for",
    )
    max_age_days: float = Field(
        default=0.0,
        ge=0,
        description="days before its batch from which a row that has a time is too old; 0: never",
    )
    require_licence: bool = Field(
        default=False, description="reject rows whose batch and `meta` name no licence"
    )
    warn_rejected_share: Share = Field(
        default=0.01, description="share of rejected rows from which a batch is warned about"
    )
    max_rejected_share: Share = Field(
        default=0.05,
        description="share of rejected rows over which a batch fails, and of rows over "
        "`tokenize.max_length` over which `tokenize` fails, before anything is trained",
    )
    max_reason_share: Share = Field(default=0.02, description="the same for one reason")
    min_rows: Count = Field(default=20, description="accepted training rows under which nothing is trained")

    def may_drop(self, rows: int) -> int:
        """Return how many of `rows` may be dropped before that is a fault; one or two always may."""
        return int(max(FEW, self.max_rejected_share * rows))

    @model_validator(mode="after")
    def _something_to_train(self) -> PrepareConfig:
        if self.validation_share + self.test_share > 0.8:
            raise ValueError(
                "prepare.validation_share + prepare.test_share is over 0.8: nothing is left to train on"
            )
        return self


class TokenizeConfig(Section):
    """Token ids, loss mask, packing."""

    max_length: Annotated[int, Field(ge=16)] | Literal["auto"] = Field(
        default="auto",
        description="longest row, in tokens; longer rows are rejected, never cut. `auto`: from the rows, so "
        "that 99.5 % of the training rows and every golden row fit, at most the base's context; the stage "
        "tells the number and keeps it",
    )
    window: Annotated[int, Field(ge=16)] | Literal["auto"] = Field(
        default="auto",
        description="length of a packed window, in tokens; `auto`: twice the longest row up to 2,048 tokens, "
        "the longest row beyond, at most the base's context",
    )

    @model_validator(mode="after")
    def _fits(self) -> TokenizeConfig:
        if "auto" not in (self.max_length, self.window) and self.max_length > self.window:  # type: ignore[operator]
            raise ValueError(
                f"tokenize.max_length ({self.max_length}) is over tokenize.window ({self.window}): no window "
                "could hold the longest row"
            )
        return self


class ReviewConfig(Section):
    """Which drafted rows people review before the model learns from them."""

    share: Share = Field(
        default=0.1,
        description="share of a draft's rows without doubts that people review, chosen by hash; rows with "
        "doubts always are",
    )
    max_rejects: Share = Field(
        default=0.1,
        description="share of rejected or edited rows in that sample over which a draft is refused whole",
    )
