"""Check whether a raw row is fit to learn from; the first fault decides.

The order: size, encoding, JSON, schema, length, characters, control tokens, secrets and personal data, time,
licence, doubts, language. Checks that depend on other rows (duplicates, leakage, caps, contradictions) are in
tasks/prepare.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import msgspec

from ratchet.config.data import PrepareConfig
from ratchet.data.examples import (
    CONTINUE,
    PART_OF,
    Example,
    Meta,
    RawRow,
    RowError,
    make_example,
    map_texts,
    texts_of,
)
from ratchet.data.forms import (
    FORMS,
    MEANT,
    MEDIA_KEYS,
    PICTURE_KEYS,
    SOUND_KEYS,
    read_conversation,
    read_row,
    recognise_form,
)
from ratchet.data.pii import MASK, find_secret, mask_names, mask_personal
from ratchet.data.text import BOILERPLATE, check_loop, check_text, clean, find_mixed_word, language_of
from ratchet.errors import ConfigError

# Reasons that a person may overrule.
REVIEW = frozenset({"mixed_script", "boilerplate", "instruction_in_answer", "contradiction"})
MOST_TURNS = 64
META_KEYS = ("meta", "metadata")  # keys of an object of single values beside the messages
FILMS = re.compile(r"video", re.IGNORECASE)
MEDIA = re.compile(f"image|picture|photo|pixel|audio|{FILMS.pattern}", re.IGNORECASE)
INSTRUCTION = re.compile(
    r"\b(?:ignore|disregard|forget) (?:all |any |the )*(?:previous|prior|above|earlier)"
    r" (?:instructions?|prompts?|messages?)\b"
    r"|\b(?:give|assign|rate) (?:this|the) (?:answer|response)"
    r" (?:a |the )?(?:full|maximum|highest|score|10)\b"
    r"|\byou are now (?:in )?(?:developer|dan|jailbreak)\b",
    re.IGNORECASE,
)
TIME_KEYS = ("time", "timestamp", "created_at", "date")
EPOCH_LEAST = 10**8  # seconds, in 1973; a number over a hundred times as large is in milliseconds
LONGEST_META = 2000  # characters of one text
CLOCK_SKEW = timedelta(days=1)  # a row may be this much later than its batch


class Checked(NamedTuple):
    """A fit row, with findings that do not make it unfit."""

    example: Example
    boilerplate: bool = False
    sanitised: tuple[str, ...] = ()  # what was changed, once for each text


class Doubt(RowError):
    """A doubt about an otherwise fit row, which a person may overrule; `example` would then be learned."""

    def __init__(self, reason: str, message: str, example: Example) -> None:
        super().__init__(reason, message)
        self.example = example


class Origin(NamedTuple):
    """What the manifest says about a row's batch."""

    batch: str
    source: str
    form: str = "auto"
    time: str = ""  # UTC, ISO 8601
    licence: str = ""
    held_out: bool = False
    like: str = ""


class Validator:
    """The checks that the settings ask for. Raises ConfigError for a `blocked` entry that is no pattern."""

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        self._allowed = None if config.control_tokens == "keep" else frozenset(config.allowed_tokens)
        self._isolates = config.isolates == "keep"
        self._extra = frozenset({*META_KEYS, *config.extra_keys})
        self._blocked = [(entry, _compile(entry)) for entry in config.blocked]

    def check(self, line: bytes, origin: Origin) -> Checked:
        """Read and check one line.

        Raises RowError for an unfit row, and Doubt for what a person may overrule; a row that a person has
        accepted raises no Doubt.
        """
        row = read_row(line)
        named = FORMS.get(origin.form)  # the form of the batch's first row; later ones may differ
        form = recognise_form(row) if named is None or named.starts.isdisjoint(row) else origin.form
        self._check_keys(row, form)
        said = read_conversation(row, form)
        if len(said.messages) > MOST_TURNS:
            raise RowError("too_many_turns", f"{len(said.messages)} messages; at most {MOST_TURNS} are taken")
        answers = [said.rejected] if said.rejected else []
        length = sum(map(len, texts_of([*said.messages, *answers], said.tools)))
        if length > self._config.max_chars:  # first, because some checks are slow on long texts
            raise RowError(
                "too_many_chars", f"{length} characters; `prepare.max_chars` is {self._config.max_chars}"
            )
        sanitised = Counter(said.notes)
        messages = map_texts(
            [*said.messages, *answers], lambda text: clean(text, sanitised, isolates=self._isolates)
        )
        meta = self._meta(row)
        example = said._replace(
            messages=messages[: len(said.messages)], rejected=messages[-1] if answers else None
        ).example(meta)
        for text in _texts(example):
            check_text(text, self._allowed)
            self._check_blocked(text)
        # A system message stands in every row and is not learned, so it may say a thing as often as it likes.
        for message in (*example.messages, *([example.rejected] if example.rejected else ())):
            if message.role != "system":
                for text in texts_of([message]):
                    check_loop(text)
        example = self._without_personal(example, sanitised)
        _check_time(meta, origin.time, self._config.max_age_days)
        if self._config.require_licence and origin.licence in ("", "unknown") and not meta.get("licence"):
            raise RowError(
                "no_licence",
                "neither the row nor its batch names a licence; `prepare.require_licence` is true",
            )
        example = msgspec.structs.replace(example, meta=_with_origin(meta, origin))
        accepted, fault = is_accepted(origin.source, meta), self._find_language_fault(example)
        if not accepted and (doubt := _find_doubt(example)):
            # If the row has a language fault too, the doubt is reported, but nobody can overrule it.
            raise RowError(*doubt) if fault else Doubt(*doubt, example)
        if fault:
            raise fault
        boilerplate = not accepted and BOILERPLATE.search(example.answer) is not None
        return Checked(example, boilerplate, tuple(sanitised.elements()))

    def _check_keys(self, row: RawRow, form: str) -> None:
        unread = row.keys() - FORMS[form].keys
        if lost := unread & MEANT:
            raise RowError(
                "unknown_key",
                f"the keys {_names(lost)} belong to a conversation, and a row of the form {form!r} has no "
                f"place for them; it reads {sorted(FORMS[form].keys)} (`ingest.columns` renames columns)",
            )
        unknown = unread - self._extra
        shown = not row.keys().isdisjoint(MEDIA_KEYS)  # then an `image_id` says nothing more
        if any((FILMS if shown else MEDIA).search(key) for key in unknown):
            raise RowError(
                "media",
                f"the keys {_names(unknown)} name pictures, recordings or films; pictures are read from the "
                f"keys {', '.join(PICTURE_KEYS[:4])} …, recordings from {', '.join(SOUND_KEYS[:4])} … "
                "(`ingest.columns` renames columns), films are not read",
            )
        if unknown and self._config.unknown_keys == "reject":
            raise RowError(
                "unknown_key",
                f"the keys {_names(unknown)} are unknown in a row of the form {form!r}; name them in "
                "`prepare.extra_keys` if they say nothing that is to be learned, or drop them; `--columns "
                "image=NAME` (or prompt, completion …) says what they hold",
            )

    def _meta(self, row: RawRow) -> Meta:
        """Collect the single values of `meta` and of the keys in `prepare.extra_keys`."""
        if row.keys().isdisjoint(self._extra):
            return {}
        said = {key: row[key] for key in self._config.extra_keys if key in row}
        for key in META_KEYS:
            if isinstance(given := row.get(key), dict):
                said |= _flat(given)
        meta: Meta = {
            key: value for key, value in said.items() if isinstance(value, str | int | float | bool)
        }
        for text in (*meta, *(value for value in meta.values() if isinstance(value, str))):
            self._check_meta(text)
        return meta

    def _check_meta(self, text: str) -> None:
        """Raise RowError for an unfit text: `meta` is not learned, but every file with the row has it."""
        if len(text) > LONGEST_META:
            raise RowError(
                "long_meta",
                f"a text of {len(text)} characters beside the messages; at most {LONGEST_META} are taken",
            )
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise RowError(
                    "lone_surrogate", "a text beside the messages holds half a character (a lone surrogate)"
                ) from None
        if kind := find_secret(text):
            raise RowError(
                "secret",
                f"a text beside the messages holds a secret ({kind}); it has to be changed where it is valid",
            )
        self._check_blocked(text)

    def _without_personal(self, example: Example, sanitised: Counter[str]) -> Example:
        texts = _texts(example)
        for text in texts:
            if kind := find_secret(text):
                raise RowError(
                    "secret", f"a text holds a secret ({kind}); it has to be changed where it is valid"
                )
        policy = self._config.personal_data
        if policy == "keep":
            return example
        found = [kinds for text in texts if (kinds := self._mask(text)[1])]
        if not found:
            return example
        if policy == "reject":
            raise RowError(
                "personal_data",
                f"a text holds personal data: {', '.join(found[0])} "
                "(`prepare.personal_data`: mask takes the row without it)",
            )
        sanitised["personal_data"] += 1
        answers = [example.rejected] if example.rejected else []
        masked = map_texts([*example.messages, *answers], lambda text: self._mask(text)[0])
        return make_example(
            masked[: len(example.messages)],
            example.meta,
            tools=example.tools,
            rejected=masked[-1] if answers else None,
            desirable=example.desirable,
        )

    def _mask(self, text: str) -> tuple[str, list[str]]:
        text, kinds = mask_personal(text)
        if self._config.names_model:
            named = mask_names(text, self._config.names_model, MASK.format("name"))
            kinds += ["name"] * (named != text)
            text = named
        return text, kinds

    def _find_language_fault(self, example: Example) -> RowError | None:
        text = example.answer if example.question == CONTINUE else example.question
        if self._config.languages and (language := language_of(text)) not in (None, *self._config.languages):
            return RowError(
                "language",
                f"the question seems to be in {language!r}; `prepare.languages` is {self._config.languages}",
            )
        return None

    def _check_blocked(self, text: str) -> None:
        for entry, pattern in self._blocked:
            if pattern.search(text):
                raise RowError("blocked", f"a text matches {entry!r} of `prepare.blocked`")
        for number, canary in enumerate(self._config.canaries, start=1):
            if canary in text:
                raise RowError("canary", f"a text holds canary {number} of `prepare.canaries`")


def check_lines(
    validator: Validator, lines: Iterable[tuple[int, bytes]], origin: Origin
) -> Iterator[tuple[int, Checked | RowError]]:
    """Check numbered lines; yield each number with the fit row or the fault that makes it unfit."""
    for number, line in lines:
        try:
            yield number, validator.check(line, origin)
        except RowError as error:
            yield number, error


def _texts(example: Example) -> list[str]:
    return texts_of([*example.messages, *([example.rejected] if example.rejected else [])], example.tools)


def _flat(given: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name nested values by their path: {"a": {"b": 1}} gives {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _names(keys: Iterable[str]) -> list[str]:
    return [key[:40] for key in sorted(keys)[:4]]


def is_accepted(source: str, meta: Meta) -> bool:
    """Tell whether a person accepted this very row; most rows of a reviewed draft are `unseen`."""
    return source == "review" and meta.get("review") in ("accepted", "edited")


def _find_doubt(example: Example) -> tuple[str, str] | None:
    """Return (reason, message) of a doubt that a person has to settle, or None."""
    for text in texts_of(example.messages):
        if word := find_mixed_word(text):
            return "mixed_script", f"the word {word[:40]!r} mixes alphabets that look alike"
    if INSTRUCTION.search(example.answer):
        return "instruction_in_answer", "the answer gives orders to a model or to who grades it"
    return None


def _with_origin(meta: Meta, origin: Origin) -> Meta:
    """Say where the row comes from; what the row itself says under these names does not count."""
    said = {key: value for key, value in meta.items() if key != PART_OF}
    part = {PART_OF: origin.like} if origin.like else {}
    return {**said, "batch": origin.batch, "source": origin.source, **part}


def _check_time(meta: Meta, batch_time: str, max_age_days: float) -> None:
    """Raise RowError for a row too old or from the future, relative to its batch, not to today.

    The same batch gets the same verdict on any day.
    """
    said = next(((key, when) for key in TIME_KEYS if (when := _time_of(meta.get(key)))), None)
    if said is None or not batch_time:
        return
    (key, when), pulled = said, datetime.fromisoformat(batch_time)
    if when > pulled + CLOCK_SKEW:
        raise RowError("from_the_future", f"its `{key}` is {when:%Y-%m-%d}, its batch is of {batch_time}")
    if max_age_days and when < pulled - timedelta(days=max_age_days):
        raise RowError(
            "too_old", f"its `{key}` is {when:%Y-%m-%d}; `prepare.max_age_days` is {max_age_days:g}"
        )


def _time_of(value: object) -> datetime | None:
    """Parse ISO 8601, with slashes too, or seconds or milliseconds since 1970; None for anything else."""
    try:
        if isinstance(value, str):
            when = datetime.fromisoformat(value.strip().replace("/", "-"))
            return when if when.tzinfo else when.replace(tzinfo=UTC)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > EPOCH_LEAST:
            return datetime.fromtimestamp(value / (1000 if value > 100 * EPOCH_LEAST else 1), UTC)
    except (ValueError, OverflowError, OSError):
        pass
    return None


def _compile(entry: str) -> re.Pattern[str]:
    try:
        return re.compile(entry, re.IGNORECASE)
    except re.error as error:
        raise ConfigError(
            f"prepare.blocked holds {entry!r}, which is no regular expression: {error}",
            remedy="mend it in params.yaml",
        ) from None
