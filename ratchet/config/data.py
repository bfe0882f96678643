"""Sections of params.yaml: where rows come from, and how they are prepared, tokenized and reviewed."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ratchet.config.base import Count, Section, Share

FEW = 2  # this many dropped rows never fail a batch or a split, however small it is


class ProjectConfig(Section):
    """The name under which versions are registered."""

    name: str = Field(
        default="pydoc",
        pattern=r"^[a-z0-9][a-z0-9._-]*$",
        description="name of the registered model, of its git tags, of the MLflow experiment and, in API "
        "requests, of the model; choose it before the first training, since another name begins a new "
        "registered model",
    )


class PydocSource(Section):
    """The built-in example: documentation strings of packages installed on this machine."""

    packages: list[str] = Field(
        default=["stdlib"],
        min_length=1,
        description="import names of the packages to read; files are parsed, never imported; `stdlib` is "
        "the standard library",
    )
    module_depth: int = Field(
        default=1,
        ge=1,
        le=4,
        description="levels of a module's name that are the answer, below the package (`numpy.linalg` is "
        "one level below `numpy`); more levels make more and rarer answers",
    )
    min_objects: int = Field(
        default=40,
        ge=1,
        description="documented objects that a module needs before questions about it are made; lower it "
        "for small packages",
    )
    summaries: Share = Field(
        default=0.05, description="share of the objects that give a second row, from the name to the summary"
    )
    share: Share = Field(
        default=1.0,
        description="share of the objects that give rows, chosen by hash; below 1 the others are kept out "
        "and can serve as users' questions",
    )


class JsonlSource(Section):
    """Files that fsspec can read: JSON, CSV, TSV, Parquet or Arrow, recognised by their content."""

    path: str = Field(
        default="",
        description="file, glob, folder of `datasets.save_to_disk`, or fsspec URL (`s3://…`, "
        "`hf://datasets/…`)",
    )
    form: Literal[
        "auto", "messages", "completion", "preference", "instruction", "question", "sharegpt", "text"
    ] = Field(
        default="auto",
        description="form of the rows; `auto` recognises it from the keys of the first row; name it when "
        "that guess is wrong",
    )


class SqlSource(Section):
    """Rows of a database, read by SQLAlchemy; the password comes from RATCHET_SQL_PASSWORD."""

    url: str = Field(
        default="",
        description="SQLAlchemy URL without a password: `postgresql+psycopg://USER@HOST/DATABASE`, "
        "`sqlite:///FILE`",
    )
    query: str = Field(default="", description="SELECT statement whose result rows become rows")


class FeedbackSource(Section):
    """Answers from the request log that people corrected or approved."""

    min_score: Share = Field(
        default=1.0,
        description="lowest feedback score at which an answer counts as approved; a corrected answer needs "
        "no score",
    )
    window_days: float = Field(
        default=30.0, gt=0, description="age in days beyond which feedback gives no rows"
    )
    min_user_age_days: float = Field(
        default=7.0,
        ge=0,
        description="days since a user's first request before their feedback counts, against accounts made "
        "to vote; at most half of `request_log.keep_days`. It does not apply while the log itself is "
        "younger, because then every user is new",
    )
    max_rows_per_user: Count = Field(
        default=20,
        description="rows that one user's feedback may bring into a batch, so that no single person teaches "
        "the model",
    )
    max_rows_per_key: Count = Field(
        default=200,
        description="rows that may come into a batch through one API key; applies once there are several "
        "keys",
    )
    max_trigger_rows: Count = Field(
        default=20,
        description="rows that may share one answer and a sequence of words that other rows hardly contain; "
        "if more do, all of them are left out as a possible planted trigger. A new topic with a single "
        "answer looks the same: raise it then",
    )


class MediaConfig(Section):
    """Which pictures and recordings are taken, and from where."""

    max_megapixels: float = Field(
        default=25.0,
        gt=0,
        le=89,
        description="largest picture, in millions of pixels as its head says; a larger one is never decoded",
    )
    max_bytes: Count = Field(
        default=50 * 2**20, description="largest picture or recording, in bytes of its file"
    )
    max_seconds: float = Field(
        default=30.0,
        gt=0,
        le=3600,
        description="longest recording, in seconds. Models with Whisper's features hear 30 s at a time, so a "
        "row with a longer recording is rejected when it becomes tokens",
    )
    folder: str = Field(
        default="",
        description="folder from which paths of pictures and recordings count, where they do not count "
        "from the folder of the file that names them; a path never leads out of it",
    )
    max_frames: Count = Field(
        default=100,
        description="most frames of an animated picture, of which the first is taken; a longer one is a "
        "film, of which the first frame says little",
    )
    hosts: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+(:[0-9]+)?$")]] = Field(
        default=[],
        description="hosts (`cdn.example.com`, `localhost:9000`) from which pictures and recordings are "
        "fetched, over HTTPS, or HTTP from this machine; a row with an address on any other host is rejected "
        "(`media_url`). No redirect is followed",
    )


class IngestConfig(Section):
    """Where new rows come from."""

    source: Literal["pydoc", "jsonl", "sql", "feedback", "review"] = Field(
        default="pydoc", description="source that `ratchet ingest` reads when the command names none"
    )
    licence: str = Field(
        default="unknown",
        description="licence of the rows, recorded with the batch in the manifest (see "
        "`prepare.require_licence`)",
    )
    columns: dict[str, str] = Field(
        default={},
        description="key of a known form → column of the file or query, for `jsonl` and `sql`, such as "
        "`{prompt: text, completion: category}`; other columns are read only if the form or "
        "`prepare.extra_keys` names them",
    )
    pydoc: PydocSource = Field(default_factory=PydocSource, description="settings of the source `pydoc`")
    jsonl: JsonlSource = Field(default_factory=JsonlSource, description="settings of the source `jsonl`")
    sql: SqlSource = Field(default_factory=SqlSource, description="settings of the source `sql`")
    feedback: FeedbackSource = Field(
        default_factory=FeedbackSource, description="settings of the source `feedback`"
    )
    media: MediaConfig = Field(
        default_factory=MediaConfig, description="pictures and recordings of the rows of `jsonl` and `sql`"
    )


class DatatroveConfig(Section):
    """Workers that prepare rows; they and this machine share the folder `.ratchet/prepare` of the project."""

    executor: Literal["local", "slurm", "ray"] = Field(
        default="local",
        description="where workers run. `local`: processes on this machine; `slurm`: jobs of `sbatch`; "
        "`ray`: the cluster that RAY_ADDRESS names (needs the package `ray`)",
    )
    workers: Count = Field(default=2, description="shards that are worked on at the same time")
    shard_rows: Count = Field(
        default=50_000, description="rows of a shard: what is lost when a worker is killed"
    )
    tries: Count = Field(default=3, description="attempts per shard before the preparation fails")
    partition: str = Field(default="", description="partition of Slurm that takes the jobs")
    time_limit: str = Field(
        default="02:00:00", description="longest time of one of Slurm's jobs, as HH:MM:SS"
    )

    @model_validator(mode="after")
    def _names_a_partition(self) -> DatatroveConfig:
        if self.executor == "slurm" and not self.partition:
            raise ValueError("prepare.datatrove.executor is slurm, which needs prepare.datatrove.partition")
        return self


class PrepareConfig(Section):
    """How rows are checked, freed of duplicates and divided into training, validation and test rows."""

    renamed: ClassVar = {"prepare.retention_days": "prepare.max_age_days"}

    engine: Literal["local", "datatrove"] = Field(
        default="local",
        description="what prepares the rows. `local`: this process, one row at a time; `datatrove`: several "
        "workers, for many millions of rows (extra `scale`). Both accept the same rows",
    )
    datatrove: DatatroveConfig = Field(
        default_factory=DatatroveConfig, description="workers of the engine `datatrove`"
    )
    validation_share: Share = Field(
        default=0.1, description="share of the clusters of near duplicates that become validation rows"
    )
    test_share: Share = Field(
        default=0.12,
        description="share of the clusters of near duplicates that become test rows; raise it if the gate "
        "has too few rows to decide",
    )
    near_search: bool = Field(
        default=True,
        description="search for near duplicates (about 1 kB of memory per row); if false, the hash of the "
        "prompt alone chooses a row's split",
    )
    near_duplicate: float = Field(
        default=0.8,
        gt=0.0,
        le=1.0,
        description="Jaccard similarity of word shingles at and above which two rows are near duplicates "
        "and share a split; lower finds more",
    )
    max_near: Count = Field(
        default=3,
        description="rows kept of one cluster of near duplicates; further ones add nothing new",
    )
    leak: float = Field(
        default=0.7,
        gt=0.0,
        le=1.0,
        description="Jaccard similarity to a golden row or to a row of another split at and above which a "
        "row is rejected",
    )
    picture_distance: int = Field(
        default=6,
        ge=-1,
        le=8,
        description="bits, of the 64 of a difference hash, in which two pictures that look alike may differ "
        "and still count as one, whose rows all stand in one split; -1: only the same file does",
    )
    max_leaked_share: Share = Field(
        default=0.05,
        description="share of rows similar to golden rows or to two splits (see `leak`) above which a batch "
        "fails, if it is also more than 20 rows",
    )
    max_chars: Count = Field(
        default=50_000, description="longest accepted row, in characters of all its texts together"
    )
    unknown_keys: Literal["reject", "drop"] = Field(
        default="reject",
        description="whether a row with keys that its form does not have is rejected, or the keys are "
        "dropped",
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
        description="keys that rows may have in addition to those of their form; single values are copied "
        "to `meta`",
    )
    control_tokens: Literal["reject", "keep"] = Field(
        default="reject",
        description="what happens to rows that contain a control token of some model family (`<s>`, "
        "`[INST]`); `keep` reads it as plain characters, which never become a control token here",
    )
    isolates: Literal["reject", "keep"] = Field(
        default="reject",
        description="what happens to rows with the direction isolates U+2066 to U+2069, which W3C "
        "recommends around text of the other direction; overrides (U+202A to U+202E) are always rejected",
    )
    allowed_tokens: list[str] = Field(
        default=[],
        description="control tokens, such as `<s>`, that rows may contain as plain text although "
        "`control_tokens` is `reject`",
    )
    personal_data: Literal["reject", "mask", "keep"] = Field(
        default="reject",
        description="what happens to rows with e-mail addresses or with phone, card, IBAN or national id "
        "numbers; `mask` replaces these by placeholders",
    )
    names_model: str = Field(
        default="",
        description="name or folder of the spaCy model with which Presidio finds people's names, which are "
        "then treated as `personal_data` says; needs the extra `names`; empty: names are not searched for",
    )
    blocked: list[str] = Field(
        default=[],
        description="regular expressions, case ignored; a row that matches one of them is rejected",
    )
    canaries: list[str] = Field(
        default=[],
        description="strings that must never appear in data again; a row that contains one fails the "
        "preparation",
    )
    languages: list[str] = Field(default=[], description="accepted languages, as ISO 639-1 codes; empty: any")
    contradictions: Literal["review", "keep"] = Field(
        default="review",
        description="what happens to a row that answers a known prompt differently; `review` sends it to a "
        "person. A person's correction always replaces the older answer",
    )
    max_boilerplate_share: Share = Field(
        default=0.005,
        description="share of a batch's answers that may contain assistant boilerplate (`As an AI …`); "
        "further ones go to review",
    )
    source_field: str = Field(
        default="",
        description="key of `meta` that names a row's origin, such as a web site, for `max_source_share`; "
        "empty: no limit",
    )
    max_source_share: Share = Field(
        default=0.2,
        description="share of a batch that rows of one origin may make up; set it above 1 / number of "
        "origins",
    )
    max_user_rows: Count = Field(
        default=20,
        description="rows of one `meta.user` that are accepted per batch; 1 % of the batch where that is "
        "fewer, but at least 5",
    )
    max_label_shift: Share = Field(
        default=1.0,
        description="total variation distance (0 to 1) between the short answers of a batch and those of "
        "earlier batches above which the batch fails; 1: never",
    )
    trigger_rows: int = Field(
        default=0,
        ge=0,
        description="rows of a batch with the same new phrase and the same answer above which they are "
        "rejected as a planted trigger; 0: not searched for. Set it where rows come from strangers",
    )
    max_age_days: float = Field(
        default=0.0,
        ge=0,
        description="age in days, relative to its batch, above which a row with a time is rejected; 0: no "
        "limit",
    )
    require_licence: bool = Field(
        default=False, description="reject rows for which neither the batch nor `meta` names a licence"
    )
    warn_rejected_share: Share = Field(
        default=0.01, description="share of rejected rows above which a warning about the batch is printed"
    )
    max_rejected_share: Share = Field(
        default=0.05,
        description="share of rejected rows above which a batch fails; also the share of rows longer than "
        "`tokenize.max_length` above which `tokenize` fails. Raise it only after reading the rejected rows",
    )
    max_reason_share: Share = Field(
        default=0.02,
        description="share of rows rejected for one and the same reason above which a batch fails",
    )
    min_rows: Count = Field(default=20, description="accepted training rows below which nothing is trained")

    def may_drop(self, rows: int) -> int:
        """Return how many of `rows` may be dropped before a batch or a split fails; it is at least 2."""
        return int(max(FEW, self.max_rejected_share * rows))

    @model_validator(mode="after")
    def _something_to_train(self) -> PrepareConfig:
        if self.validation_share + self.test_share > 0.8:
            raise ValueError(
                "prepare.validation_share + prepare.test_share is over 0.8: nothing is left to train on"
            )
        return self


class TokenizeConfig(Section):
    """How rows become token ids and are packed into windows."""

    max_length: Annotated[int, Field(ge=16)] | Literal["auto"] = Field(
        default="auto",
        description="longest row, in tokens; longer rows are rejected, never cut. `auto`: a multiple of 64 "
        "that fits 99.5 % of the training rows and every golden row, at most the base's context; the stage "
        "prints and records it",
    )
    window: Annotated[int, Field(ge=16)] | Literal["auto"] = Field(
        default="auto",
        description="length of a packed window, in tokens; `auto`: twice the longest row, limited to 2,048 "
        "tokens and to the base's context, but never shorter than the longest row",
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
        "doubts are always reviewed. Raise it for a teacher that you do not trust yet",
    )
    max_rejects: Share = Field(
        default=0.1,
        description="share of rejected or edited rows in that sample above which the whole draft is refused",
    )
