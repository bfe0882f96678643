"""Find out how a chat template writes an answer's reasoning, and read reasoning from answers.

Templates take reasoning from a key of the message (Qwen3), from a block in its content (SmolLM3), or write
none and open the block in their prompt (DeepSeek R1). The format is the text around the reasoning of one
rendered answer. A comment in the template (`LEARN`) says whether reasoning is learned, so that training,
gateway and exports agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ratchet.data.examples import THINK, THOUGHT, overlap, trim_start
from ratchet.errors import BaseModelError

LEARN = "{#- base.reasoning: learn #}"  # prefix of the template of a base whose reasoning is learned
KEYS = ("reasoning_content", "reasoning", "thinking")
CONTENT = "content"
# Private-use characters as placeholders, since no template writes them by itself.
FIRST, SECOND, ANSWER = "\ue0f2", "\ue0f3", "\ue0f4"
Write = Callable[[list[dict[str, Any]], bool], str]  # (messages, whether to open an answer) → text


class Thought(NamedTuple):
    """An answer, or a piece of one, divided into reasoning and content."""

    reasoning: str
    content: str


class ReasoningFormat(NamedTuple):
    """The text before an answer's reasoning, between reasoning and content, and before a direct answer.

    `key` is the message's key from which the template reads reasoning: "content" means a block in the
    content, "" that the template writes no reasoning. `in_history`: it also writes that of earlier answers.
    """

    key: str
    before: str
    after: str
    direct: str  # the text before an answer without reasoning: often an empty block, or a channel (gpt-oss)
    in_history: bool

    @property
    def opened(self) -> bool:
        """Whether the prompt itself opens the reasoning."""
        return not self.before.strip()

    def put(self, turn: dict[str, Any], reasoning: str) -> dict[str, Any]:
        """Return the message `turn` with `reasoning` where the template reads it."""
        if not reasoning or not self.key:
            return turn
        if self.key == CONTENT:
            return turn | {CONTENT: f"{THINK}\n{reasoning}\n{THOUGHT}\n\n{turn[CONTENT]}"}
        return turn | {self.key: reasoning}

    def read(self, text: str) -> Thought:
        """Split a complete answer into reasoning and content."""
        reader = ReasoningReader(self)
        parts = reader.add(text), reader.end()
        return Thought("".join(part.reasoning for part in parts), "".join(part.content for part in parts))


class ReasoningReader:
    """Splits an answer that arrives in pieces; all parts joined equal the result of `ReasoningFormat.read`.

    An answer that ends within its reasoning has no content.
    """

    def __init__(self, format: ReasoningFormat) -> None:
        self._lead, self._close = format.before.strip(), format.after.strip()
        self._direct = format.direct.strip()
        self._place = "reasoning" if format.opened else "start"
        self._held = ""  # text that may turn out to be part of a mark, or a trailing blank
        self._begun = False  # whether text of the current part was returned already

    @property
    def reasons(self) -> bool:
        return self._place == "reasoning"

    def add(self, text: str) -> Thought:
        """Add a piece, and return the text that no later piece can change."""
        self._held += text
        if self._place == "start":
            self._find_lead()
        reasoning = self._take_reasoning() if self._place == "reasoning" else ""
        return Thought(reasoning, self._take_content() if self._place == CONTENT else "")

    def end(self) -> Thought:
        """Return the remaining text; call it after the last piece."""
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
            return ""  # leading blanks may turn out to be the indentation of the first line
        text, self._held = self._held, ""
        return self._release(text)

    def _release(self, text: str) -> str:
        text = text if self._begun else trim_start(text)
        self._begun = self._begun or bool(text)
        return text


def find_reasoning_format(write: Write, template: str) -> ReasoningFormat | None:
    """Find the format of `template`, which `write` renders; None if it writes no reasoning.

    A template that only copies contents has no format: it does not say how its prompts begin reasoning.
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
            continue  # a template may reject a key
    opened = prompt.rstrip()
    if not opened.endswith(THINK):
        return None
    blank = prompt[len(opened) :]
    after = f"{blank}{THOUGHT}{blank}{blank}"
    return ReasoningFormat("", "", after, after, False)


def _around(answer: str) -> tuple[str, str] | None:
    """Return the text before the reasoning, and between reasoning and content; None unless both are there."""
    before, reasoned, rest = answer.partition(FIRST)
    after, answered, _ = rest.partition(ANSWER)
    return (before, after) if reasoned and answered and after.strip() else None


def _direct(whole: str, prompt: str, around: tuple[str, str]) -> str:
    """Return the text before an answer without reasoning; `around` is the text before and after reasoning."""
    before, after = around
    if whole.startswith(prompt):
        return whole.removeprefix(prompt).partition(ANSWER)[0]
    return "" if before.strip() else after
