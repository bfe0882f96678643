"""Prepare one request for a model, and turn the tokens that the model chooses into the pieces of an answer.

Engines share this code, so that template, stop tokens, text, reasoning and calls do not depend on the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ratchet.data.examples import ToolCall, media_of
from ratchet.engines.transcript import Transcript
from ratchet.errors import MediaError, RatchetError, UserError
from ratchet.models.chat_template import ChatFormat
from ratchet.models.reasoning import ReasoningReader
from ratchet.serving.bundle import Bundle
from ratchet.serving.engine import Ask, Ended, Piece, Scored

if TYPE_CHECKING:
    import torch

    from ratchet.engines.vocabulary import Constraint, Vocabulary


class Row:
    """One request under way.

    `tell` passes a piece, the end or an error to the request's owner; `since` is on time.perf_counter.
    """

    def __init__(self, ask: Ask, since: float, tell: Callable[[Piece | Ended | RatchetError], None]) -> None:
        self.ask, self.since, self.tell = ask, since, tell
        self.cancelled = False
        self.prompt: list[int] = []
        self.media: tuple[str, ...] = ()  # names of the prompt's pictures, in ask.media
        self.features: dict[str, bytes] = {}  # what the model saw in them, where the log keeps it
        self.distance = 0  # from the number of tokens so far to the position of the next one
        self.answer: list[int] = []  # tokens so far; the next forward pass reads the newest
        self.room = 0  # answer tokens that may still come
        self.prompt_nll: float | None = None  # mean over the prompt's tokens but the first, in nats
        self.temperature = 0.0
        self.generator: torch.Generator | None = None
        self.constraint: Constraint | None = None  # of ask.form or ask.must_call
        self.vocabulary: Vocabulary | None = None  # if tokens are scored
        self._nll, self._measured = 0.0, 0  # sum over the answer's tokens, in nats, and their number
        self._queue_ms = 0.0
        self._text, self._told = "", 0  # if tools are offered: all text, and how much of it was passed on
        self._scored: list[Scored] = []  # tokens that were not passed on yet
        self._chat: ChatFormat
        self._transcript: Transcript
        self._reader: ReasoningReader | None = None  # if the version reasons before it answers

    def prepare(self, bundle: Bundle, chat: ChatFormat, length: int) -> bool:
        """Fill in the token ids, by the version's template, and the settings; return False if refused.

        `length`: the most tokens of the prompt and its answer together.
        """
        ask = self.ask
        self._queue_ms = (time.perf_counter() - self.since) * 1000
        # A grammar holds from the first token on, so an answer under a grammar has no reasoning.
        reasons = ask.reasons and ask.form is None and not ask.must_call
        try:
            self.media = media_of(ask.messages)
            chat = chat.showing(ask.media) if self.media else chat
            self.prompt = chat.fit_prompt(ask.messages, length, ask.tools, reasons=reasons)
        except MediaError as error:
            self.tell(error)
            return False
        except Exception as error:  # noqa: BLE001  (the client whose messages caused it gets it)
            known = isinstance(error, RatchetError)
            self.tell(UserError(str(error) if known else f"the messages cannot be encoded: {error}"))
            return False
        self.room = min(ask.max_tokens or bundle.generation.max_new_tokens, length - len(self.prompt))
        self.temperature = bundle.generation.temperature if ask.temperature is None else ask.temperature
        self._chat, self._transcript = chat, Transcript(chat.decode, ask.stop)
        self._reader = ReasoningReader(chat.reasoning) if chat.reasoning and reasons else None
        return True

    def take(self, token: int, logprob: float | None, score: Callable[[], Scored] | None = None) -> bool:
        """Add a token and pass its text on; return whether the answer ended.

        `logprob` is in nats, None where it is not known; `score` is called if the client wants scored tokens
        and this one is told. Raises UserError: the grammar cannot go on.
        """
        self.answer.append(token)
        self.room -= 1
        if logprob is not None:
            self._nll, self._measured = self._nll - logprob, self._measured + 1
        if self.constraint:
            self.constraint.take(token)
        stopped = token in self._chat.stop_ids
        reasoned = self._reader is not None and self._reader.reasons
        text = "" if stopped else self._transcript.add(token)
        stopped = stopped or self._transcript.stopped
        ended = stopped or self.room == 0
        if ended:
            text += self._transcript.end()
            stopped = stopped or self._transcript.stopped
        reasoning, text = _split(self._reader, text, ended=ended)
        if self._reader and self._reader.reasons:
            self._scored = []  # tokens that open the reasoning are not scored
        elif score and token not in self._chat.stop_ids and not reasoned:
            self._scored.append(score())
        calls: tuple[ToolCall, ...] = ()
        if self.ask.tools:
            text, calls = self._tell_apart(text, ended=ended)
        if text or calls or reasoning or (ended and self._scored):
            self.tell(Piece(text, tuple(self._scored), calls, reasoning))
            self._scored = []
        if ended:
            self.tell(
                Ended(
                    "tool_calls" if calls else "stop" if stopped else "length",
                    len(self.prompt),
                    len(self.answer),
                    self.prompt_nll,
                    self._nll / self._measured if self._measured else None,
                    self._queue_ms,
                    self.features,
                )
            )
        return ended

    def _tell_apart(self, text: str, *, ended: bool) -> tuple[str, tuple[ToolCall, ...]]:
        """Return the text, without calls, that was not passed on yet, and the calls once the answer ended."""
        calls: tuple[ToolCall, ...] = ()
        self._text += text
        if ended:
            said = self._chat.read_calls(self._text, self.ask.tools)
            new, calls = said.content[self._told :], said.tool_calls
        else:
            new = self._text[self._told : self._chat.settled(self._text)]
        self._told += len(new)
        return new, calls if self.ask.parallel_calls else calls[:1]


def _split(reader: ReasoningReader | None, text: str, *, ended: bool) -> tuple[str, str]:
    """Split a piece of an answer into reasoning and content."""
    if reader is None:
        return "", text
    parts = [reader.add(text), *([reader.end()] if ended else [])]
    return "".join(part.reasoning for part in parts), "".join(part.content for part in parts)
