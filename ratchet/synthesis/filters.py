"""What is refused of a teacher's rows, and what gets a doubt; each with a reason that is counted (docs/synthesis.md lists them)."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ratchet.config.params import Config
from ratchet.data.examples import Example, Meta, RowError
from ratchet.data.validation import REVIEW, Origin, Validator
from ratchet.llm.replies import Pair
from ratchet.synthesis.known_rows import Known

BOILERPLATE = re.compile(
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b|\bi(?:'|’)?(?: a)?m (?:just |only )?an? (?:ai|language model)\b|\bmy (?:training data|knowledge cut-?off)\b",
    re.IGNORECASE,
)
REFUSAL = re.compile(
    r"\A\W*(?:i(?:'|’)?(?: a)?m (?:very |really )?sorry\b|sorry,|i apologi[sz]e\b|unfortunately, i\b|i (?:can(?:not|'t|’t| not)|am unable|(?:'|’)m unable|won(?:'|’)t|do not have access|don(?:'|’)t have access)\b"
    r"|i(?:'|’)m (?:unable|not able)\b|i am not able\b|no answer\b|n/?a\W*\Z)",
    re.IGNORECASE,
)
REFERS = re.compile(
    r"\b(?:(?:the|this) (?:passage|excerpt|snippet)|(?:the|this) (?:above|given|provided|following) (?:text|document|article|context|paragraph)"
    r"|(?:in|from|by|on|according to) (?:the|this) (?:text|document|article|context|paragraph)|according to the (?:author|above)|mentioned above|data-[0-9a-f]{12})\b",
    re.IGNORECASE,
)


CODE_SPAN = re.compile(r"`[^`\n]+`")
WORD = re.compile(r"[^\W\d_]+")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
THOUSANDS = re.compile(r"(?<=\d)[,](?=\d{3}(?:\D|$))")
STEM = 5  # letters of a longer word that have to agree: `refund` and `refunded` are one
# The words that carry no content; short ones in general do not (see `content_words`).
WORDS_WITHOUT_CONTENT = """
about after also although another because been before being between both could does doing done each either from have having here into its itself just
like made make makes many more most much must neither none only other over same shall should since some such than that their them then there these
they this those through under until upon used uses using very were what when where whether which while whom whose will with within without would your
"""
EMPTY = frozenset(WORDS_WITHOUT_CONTENT.split())


class Verdict(NamedTuple):
    """`example` when the row is kept; otherwise `reason`, with `detail` for people."""

    example: Example | None
    reason: str = ""
    detail: str = ""
    doubts: tuple[str, ...] = ()


class Filters:
    """What preparation would reject (ratchet/data/validation.py) is refused here already. `count_tokens` is of a text, where a tokenizer is there."""

    def __init__(
        self, config: Config, known: Known, *, count_tokens: Callable[[str], int] | None = None
    ) -> None:
        self._config, self._settings = config, config.synthesize
        self._validator = Validator(config.prepare)
        self._known, self._count_tokens = known, count_tokens

    def judge(
        self,
        pair: Pair,
        passage: str,
        meta: Meta,
        *,
        parent: str = "",
        question: str = "",
        system: str | None = None,
    ) -> Verdict:
        """`parent` is the row that this one is another wording of, with its `question`: it may be near to that one. Remembers what is kept."""
        system = self._settings.system if system is None else system
        turns = [
            *([("system", system)] if system.strip() else []),
            ("user", pair.question),
            ("assistant", pair.answer),
        ]
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
                f"a number or code differs from the question that was worded anew: {', '.join(sorted(changed)[:5])}",
            )
        if passage and not parent:
            reason, detail, more = self._check_grounds(example, passage)
            if reason:
                return Verdict(None, reason, detail)
            doubts += more
        if twin := self._known.find(example, but=parent):
            return Verdict(
                None,
                twin.reason,
                f"near to the row {twin.id}" if twin.id else "it has 13 words in a row from a golden row",
            )
        self._known.add(example, "run")
        return Verdict(example, doubts=doubts)

    def _check_row(self, turns: list[tuple[str, str]], meta: Meta) -> tuple[Example, tuple[str, ...]]:
        """As preparation will see it; what a person may overrule is a doubt. Raises RowError."""
        line = json.dumps(
            {"messages": [{"role": role, "content": content} for role, content in turns], "meta": meta}
        ).encode()
        origin, doubts = Origin("", "synthetic", "messages"), list[str]()
        try:
            found = self._validator.check(line, origin).example
        except RowError as error:
            if error.reason not in REVIEW:
                raise
            found = self._validator.check(line, origin, doubts=False).example
            doubts.append(str(error))
        return Example(found.id, found.messages, meta), tuple(doubts)

    def _check_length(self, example: Example) -> tuple[str, str] | None:
        settings = self._settings
        if len(example.question) < 3 or not any(map(str.isalnum, example.question)):
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
        if self._count_tokens:
            tokens = sum(self._count_tokens(message.content) for message in example.messages)
            if tokens > self._config.tokenize.max_length:
                return (
                    "too_long",
                    f"{tokens} tokens; tokenize.max_length is {self._config.tokenize.max_length}",
                )
        return None

    def _check_grounds(self, example: Example, passage: str) -> tuple[str, str, tuple[str, ...]]:
        """(reason of a refusal, its detail, doubts)."""
        bounds, found = self._settings.grounded, ground(example.answer, passage)
        if found.numbers:
            lacking = f"the passage lacks {', '.join(found.numbers[:5])}"
            return ("number_not_in_passage", lacking, ()) if bounds.refuse else ("", "", (lacking,))
        if found.share < bounds.refuse:
            return (
                "not_in_passage",
                f"{found.share:.0%} of the answer's words stand in the passage; synthesize.grounded.refuse is {bounds.refuse:.0%}",
                (),
            )
        if found.share < bounds.doubt:
            return "", "", (f"only {found.share:.0%} of the answer's words stand in the passage",)
        return "", "", ()


def _check_words(example: Example) -> tuple[str, str] | None:
    for role, text in (("question", example.question), ("answer", example.answer)):
        if found := BOILERPLATE.search(unicodedata.normalize("NFKC", text)):
            return "boilerplate", f"the {role} says {found[0]!r}"
    if found := REFUSAL.search(example.answer):
        return "refusal", f"the answer begins with {found[0].strip()!r}"
    if found := REFERS.search(example.question) or REFERS.search(example.answer):
        return "refers_to_passage", f"nobody who asks sees {found[0]!r}"
    return None


def _exact_parts(text: str) -> set[str]:
    """What no other wording may change."""
    return {*numbers(text), *CODE_SPAN.findall(text)}


def read_counter(tokenizer: Path) -> Callable[[str], int] | None:
    """Counts the tokens of a text; None where there is no tokenizer yet."""
    if not tokenizer.exists():
        return None
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(tokenizer))
    return lambda text: len(found.encode(text, add_special_tokens=False).ids)


class Grounding(NamedTuple):
    """`share` of the answer's content words that the passage holds, 1 without any; `numbers` that it lacks."""

    share: float
    numbers: list[str]


def ground(answer: str, passage: str) -> Grounding:
    wanted, held = content_words(answer), content_words(passage)
    known = set(numbers(passage))
    missing = [number for number in dict.fromkeys(numbers(answer)) if number not in known]
    return Grounding(len(wanted & held) / len(wanted) if wanted else 1.0, missing)


def content_words(text: str) -> frozenset[str]:
    """Stems of words of four letters and more (of two, where letters are not Latin), lower case."""
    words = (word.casefold() for word in WORD.findall(text))
    return frozenset(
        word[:STEM]
        for word in words
        if (len(word) > 3 or (not word.isascii() and len(word) > 1)) and word not in EMPTY
    )


def numbers(text: str) -> list[str]:
    """As digits alone: `1,000` is `1000`, `10.50` is `10.5`."""
    return [_plain(THOUSANDS.sub("", number)) for number in NUMBER.findall(text)]


def _plain(number: str) -> str:
    number = number.lstrip("0") or "0"
    number = f"0{number}" if number[0] in ".," else number
    whole, dot, rest = number.partition(".")
    return f"{whole}.{rest.rstrip('0')}".rstrip(".") if dot and "." not in rest else number
