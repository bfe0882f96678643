"""How a chat template writes an answer's reasoning, learned from the template itself; reasoning read back.

Templates take reasoning under a key of the message (Qwen3), as a block in its content (SmolLM3), or write
none and open the block in their prompt (DeepSeek R1). One answer is rendered; what stands around its
reasoning is the format. Whether reasoning is learned at all stands in the template (`LEARN`), so that
training, gateway and exports know the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ratchet.data.examples import THINK, THOUGHT, overlap, trim_start
from ratchet.errors import BaseModelError

LEARN = "{#- base.reasoning: learn #}"  # begins the template of a base whose reasoning is learned
KEYS = ("reasoning_content", "reasoning", "thinking")
CONTENT = "content"
# Private-use characters that no template writes by itself.
FIRST, SECOND, ANSWER = "\ue0f2", "\ue0f3", "\ue0f4"
Write = Callable[[list[dict[str, Any]], bool], str]  # messages, with the opening of an answer → text


class Thought(NamedTuple):
    """Hold an answer, or a piece of one, in its two parts."""

    reasoning: str
    content: str


class ReasoningFormat(NamedTuple):
    """Hold what stands before an answer's reasoning, between it and the content, and before one without.

    `key` is the message's key that the template reads; `content`: a block in the content; empty: the template
    writes no reasoning. `in_history`: it writes that of earlier answers as well.
    """

    key: str
    before: str
    after: str
    direct: str  # begins an answer without reasoning: often an empty block, or a channel (gpt-oss)
    in_history: bool

    @property
    def opened(self) -> bool:
        """Tell whether the prompt opens the reasoning already."""
        return not self.before.strip()

    def put(self, turn: dict[str, Any], reasoning: str) -> dict[str, Any]:
        """Return a message as the template takes it."""
        if not reasoning or not self.key:
            return turn
        if self.key == CONTENT:
            return turn | {CONTENT: f"{THINK}\n{reasoning}\n{THOUGHT}\n\n{turn[CONTENT]}"}
        return turn | {self.key: reasoning}

    def read(self, text: str) -> Thought:
        """Split a whole answer."""
        reader = ReasoningReader(self)
        parts = reader.add(text), reader.end()
        return Thought("".join(part.reasoning for part in parts), "".join(part.content for part in parts))


class ReasoningReader:
    """Split an answer that comes in pieces; all parts joined are what `ReasoningFormat.read` returns.

    An answer that ends before its reasoning does has no content.
    """

    def __init__(self, format: ReasoningFormat) -> None:
        self._lead, self._close = format.before.strip(), format.after.strip()
        self._direct = format.direct.strip()
        self._place = "reasoning" if format.opened else "start"
        self._held = ""  # text that later pieces may still change or cut
        self._begun = False  # whether something of the present part was returned

    @property
    def reasons(self) -> bool:
        return self._place == "reasoning"

    def add(self, text: str) -> Thought:
        """Return what this piece makes certain."""
        self._held += text
        if self._place == "start":
            self._find_lead()
        reasoning = self._take_reasoning() if self._place == "reasoning" else ""
        return Thought(reasoning, self._take_content() if self._place == CONTENT else "")

    def end(self) -> Thought:
        """Return the rest."""
        if self._place == "reasoning":
            return Thought(self._release(self._held.rstrip()), "")
        return Thought("", self._take_content())

    def _find_lead(self) -> None:
        begun = self._held.lstrip()
        if begun.startswith(self._lead):
            self._place, self._held = "reasoning", begun.removeprefix(self._lead)
        elif self._direct and begun.startswith(self._direct):
            self._place, self._held = CONTENT, begun.removeprefix(self._direct)
        elif not self._lead.startswith(begun) and not self._direct.startswith(begun):
            self._place = CONTENT

    def _take_reasoning(self) -> str:
        said, close, rest = self._held.partition(self._close)
        if close:
            text = self._release(said.rstrip())
            self._place, self._held, self._begun = CONTENT, rest, False
            return text
        said = self._held[: len(self._held) - overlap(self._held, self._close)].rstrip()
        self._held = self._held[len(said) :]
        return self._release(said)

    def _take_content(self) -> str:
        if not self._begun and not self._held.strip():
            return ""  # blanks at the start may still become an indentation
        text, self._held = self._held, ""
        return self._release(text)

    def _release(self, text: str) -> str:
        text = text if self._begun else trim_start(text)
        self._begun = self._begun or bool(text)
        return text


def find_reasoning_format(write: Write, template: str) -> ReasoningFormat | None:
    """Learn the format from `write`, which renders messages by `template`; None where it has none.

    A template that merely copies contents has none: what its prompts look like with reasoning is unknown.
    """
    asked, answer = {"role": "user", CONTENT: "a"}, {"role": "assistant", CONTENT: ANSWER}
    prompt = write([asked], True)
    for key in (*KEYS, *([CONTENT] if THOUGHT in template else [])):
        bare = ReasoningFormat(key, "", "", "", False)
        first, second = (bare.put(answer, one) for one in (FIRST, SECOND))
        try:
            whole = write([asked, first], False)
            around = _around(whole.removeprefix(prompt)) if whole.startswith(prompt) else None
            if around:
                direct = _direct(write([asked, answer], False), prompt, around)
                kept = FIRST in write([asked, first, asked, second], False)
                return ReasoningFormat(key, *around, direct, kept)
        except (BaseModelError, TypeError, ValueError):
            continue  # a template may refuse a key
    opened = prompt.rstrip()
    if not opened.endswith(THINK):
        return None
    blank = prompt[len(opened) :]
    after = f"{blank}{THOUGHT}{blank}{blank}"
    return ReasoningFormat("", "", after, after, False)


def _around(answer: str) -> tuple[str, str] | None:
    """Return what stands before the reasoning and between it and the content."""
    before, reasoned, rest = answer.partition(FIRST)
    after, answered, _ = rest.partition(ANSWER)
    return (before, after) if reasoned and answered and after.strip() else None


def _direct(whole: str, prompt: str, around: tuple[str, str]) -> str:
    """Return what begins an answer without reasoning; `around` stands before and after reasoning."""
    before, after = around
    if whole.startswith(prompt):
        return whole.removeprefix(prompt).partition(ANSWER)[0]
    return "" if before.strip() else after
