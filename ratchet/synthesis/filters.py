"""Decide which of a teacher's rows are refused and which get a doubt, with reasons that are counted.

docs/synthesis.md lists the reasons. `ground` compares an answer with its source passage: content words by
their stems, numbers exactly.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ratchet.config.params import Config
from ratchet.data.dedup import RUN
from ratchet.data.examples import MEDIA_MARK, Example, Message, Meta, RowError, make_raw_row
from ratchet.data.text import TEACHER_BOILERPLATE, TEACHER_REFUSAL
from ratchet.data.validation import Doubt, Origin, Validator
from ratchet.llm.replies import Pair
from ratchet.synthesis.known_rows import Known

REFERS = re.compile(
    r"\b(?:(?:the|this) (?:passage|excerpt|snippet)"
    r"|(?:the|this) (?:above|given|provided|following) (?:text|document|article|context|paragraph)"
    r"|(?:in|from|by|on|according to) (?:the|this) (?:text|document|article|context|paragraph)"
    r"|according to the (?:author|above)|mentioned above|data-[0-9a-f]{12})\b",
    re.IGNORECASE,
)
CODE_SPAN = re.compile(r"`[^`\n]+`")
LETTERS = re.compile(r"[^\W\d_]+")  # words without digits, since numbers are compared exactly
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
THOUSANDS = re.compile(r"(?<=\d)[,](?=\d{3}(?:\D|$))")
STEM = 5  # leading letters that identify a word, so that `refund` and `refunded` are the same
# Words of four letters and more that carry no content; shorter Latin ones never count (see `content_words`).
WORDS_WITHOUT_CONTENT = """
about after also although another because been before being between both could does doing done each either
from have having here into its itself just like made make makes many more most much must neither none only
other over same shall should since some such than that their them then there these they this those through
under until upon used uses using very were what when where whether which while whom whose will with within
without would your
"""
EMPTY = frozenset(WORDS_WITHOUT_CONTENT.split())


class Verdict(NamedTuple):
    """`example` if the row is kept; otherwise None, with `reason` and, for people, `detail`."""

    example: Example | None
    reason: str = ""
    detail: str = ""
    doubts: tuple[str, ...] = ()


class Filters:
    """The filters: they refuse what preparation would reject (ratchet/data/validation.py), and more.

    `count_tokens` counts the tokens of a text; None if there is no tokenizer yet. `longest` is the limit of a
    row in tokens if `tokenize.max_length` is `auto`: the base's context.
    """

    def __init__(
        self,
        config: Config,
        known: Known,
        *,
        count_tokens: Callable[[str], int] | None = None,
        longest: int | None = None,
    ) -> None:
        self._config, self._settings = config, config.synthesize
        self._validator = Validator(config.prepare)
        self._known, self._count_tokens = known, count_tokens
        asked = config.tokenize.max_length
        self._longest = longest if asked == "auto" else asked

    def judge(
        self,
        pair: Pair,
        passage: str,
        meta: Meta,
        *,
        parent: str = "",
        question: str = "",
        system: str | None = None,
        media: tuple[str, ...] = (),
    ) -> Verdict:
        """Return the verdict on a row, and remember the row if it is kept.

        The question shows the pictures that `media` names. If the row rewords another one, `parent` is that
        row's id and `question` its question: the two may be similar, but their numbers and code spans must
        agree.
        """
        system = self._settings.system if system is None else system
        asked = MEDIA_MARK * len(media) + pair.question.replace(MEDIA_MARK, "")
        turns = [
            Message("user", asked, media=media),
            Message("assistant", pair.answer.replace(MEDIA_MARK, "")),
        ]
        if system.strip():
            turns.insert(0, Message("system", system))
        try:
            example, doubts = self._check_row(turns, meta)
        except RowError as error:
            return Verdict(None, error.reason, str(error))
        for check in (_check_words, self._check_length):
            if found := check(example):
                return Verdict(None, *found)
        if question and (changed := _exact_parts(question) ^ _exact_parts(example.question)):
            return Verdict(
                None,
                "changed",
                "a number or code differs from the question that was worded anew: "
                f"{', '.join(sorted(changed)[:5])}",
            )
        if passage and not parent:
            reason, detail, more = self._check_grounds(example, passage)
            if reason:
                return Verdict(None, reason, detail)
            doubts += more
        if twin := self._known.find(example, but=parent):
            quoted = f"it has {RUN} words in a row from a golden row"
            return Verdict(None, twin.reason, f"near to the row {twin.id}" if twin.id else quoted)
        self._known.add(example, "run")
        return Verdict(example, doubts=doubts)

    def _check_row(self, turns: list[Message], meta: Meta) -> tuple[Example, tuple[str, ...]]:
        """Validate the row as preparation will.

        What a person may overrule becomes a doubt. Raises RowError for everything else.
        """
        line, doubts = json.dumps(make_raw_row(turns, meta)).encode(), list[str]()
        try:
            found = self._validator.check(line, Origin("", "synthetic", "messages")).example
        except Doubt as doubt:
            found = doubt.example
            doubts.append(str(doubt))
        return Example(found.id, found.messages, meta), tuple(doubts)

    def _check_length(self, example: Example) -> tuple[str, str] | None:
        settings = self._settings
        if len(example.question.replace(MEDIA_MARK, "")) < 3 or not any(map(str.isalnum, example.question)):
            return "too_short", f"the question is {example.question!r}"
        for name, text, most in (
            ("question", example.question, settings.max_question_chars),
            ("answer", example.answer, settings.max_answer_chars),
        ):
            if len(text) > most:
                return (
                    "too_many_chars",
                    f"the {name} has {len(text)} characters; synthesize.max_{name}_chars is {most}",
                )
        if self._count_tokens and self._longest:
            tokens = sum(self._count_tokens(message.content) for message in example.messages)
            if tokens > self._longest:
                return "too_long", f"{tokens} tokens; a row may have {self._longest} (tokenize.max_length)"
        return None

    def _check_grounds(self, example: Example, passage: str) -> tuple[str, str, tuple[str, ...]]:
        """Return (reason of a refusal or "", its detail, doubts)."""
        bounds, found = self._settings.grounded, ground(example.answer, passage)
        if found.numbers:
            lacking = f"the passage lacks {', '.join(found.numbers[:5])}"
            return ("number_not_in_passage", lacking, ()) if bounds.refuse else ("", "", (lacking,))
        if found.share < bounds.refuse:
            return (
                "not_in_passage",
                f"{found.share:.0%} of the answer's words stand in the passage; "
                f"synthesize.grounded.refuse is {bounds.refuse:.0%}",
                (),
            )
        if found.share < bounds.doubt:
            return "", "", (f"only {found.share:.0%} of the answer's words stand in the passage",)
        return "", "", ()


def _check_words(example: Example) -> tuple[str, str] | None:
    for role, text in (("question", example.question), ("answer", example.answer)):
        if found := TEACHER_BOILERPLATE.search(unicodedata.normalize("NFKC", text)):
            return "boilerplate", f"the {role} says {found[0]!r}"
    if found := TEACHER_REFUSAL.search(example.answer):
        return "refusal", f"the answer begins with {found[0].strip()!r}"
    if found := REFERS.search(example.question) or REFERS.search(example.answer):
        return "refers_to_passage", f"nobody who asks sees {found[0]!r}"
    return None


def _exact_parts(text: str) -> set[str]:
    """Find the numbers and code spans, which a new wording must not change."""
    return {*numbers(text), *CODE_SPAN.findall(text)}


class Grounding(NamedTuple):
    """How far a passage supports an answer.

    `share`: of the answer's content words, those in the passage (1 if there are none); `numbers`: those in
    the answer that the passage lacks.
    """

    share: float
    numbers: list[str]


def ground(answer: str, passage: str) -> Grounding:
    """Compare an answer with the passage that has to support it."""
    wanted, held = content_words(answer), content_words(passage)
    known = set(numbers(passage))
    missing = [number for number in dict.fromkeys(numbers(answer)) if number not in known]
    return Grounding(len(wanted & held) / len(wanted) if wanted else 1.0, missing)


def content_words(text: str) -> frozenset[str]:
    """Return the stems, in lower case, of the words that carry content.

    These have at least four letters (two, if not all are ASCII) and are not in `EMPTY`.
    """
    words = (word.casefold() for word in LETTERS.findall(text))
    return frozenset(
        word[:STEM]
        for word in words
        if (len(word) > 3 or (not word.isascii() and len(word) > 1)) and word not in EMPTY
    )


def numbers(text: str) -> list[str]:
    """Find the numbers in one spelling: `1,000` is `1000`, `10.50` is `10.5`."""
    return [_plain(THOUSANDS.sub("", number)) for number in NUMBER.findall(text)]


def _plain(number: str) -> str:
    number = number.lstrip("0") or "0"
    number = f"0{number}" if number[0] in ".," else number
    whole, dot, rest = number.partition(".")
    return f"{whole}.{rest.rstrip('0')}".rstrip(".") if dot and "." not in rest else number


def read_counter(tokenizer: Path) -> Callable[[str], int] | None:
    """Return a function that counts the tokens of a text, or None if there is no tokenizer yet."""
    if not tokenizer.exists():
        return None
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(tokenizer))
    return lambda text: len(found.encode(text, add_special_tokens=False).ids)
