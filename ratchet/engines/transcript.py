"""Decode an answer token by token: return text once it is certain, and stop at a stop string.

The joined pieces equal the text that `ChatFormat.decode_answer` makes of all tokens at once. Each token is
decoded together with the tokens before it, since its text may depend on its neighbours
(text-generation-inference decodes streams the same way).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ratchet.data.examples import overlap, trim_start

HALF = "\ufffd"  # a decoder writes it for an incomplete character


class Transcript:
    """The tokens and text of one answer; `stopped` says whether a stop string ended it."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, [stop for stop in stops if stop]
        self._newest: list[int] = []  # tokens; the text of the first `_read` is in `_held` or returned
        self._read = 0
        self._held = ""  # text that later tokens may still change or cut
        self._begun = False
        self.stopped = False

    def add(self, token: int) -> str:
        """Return the text that this token makes certain, often none."""
        self._newest.append(token)
        whole = self._decode(self._newest)
        if whole.endswith(HALF):
            return ""
        self._take_in(whole)
        self._newest, self._read = self._newest[self._read :], len(self._newest) - self._read
        end = len(self._held) - max((overlap(self._held, stop) for stop in self._stops), default=0)
        return self._release(len(self._held[:end].rstrip()))

    def end(self) -> str:
        """Return the remaining text, without blanks at its end."""
        self._take_in(self._decode(self._newest))
        self._newest, self._read = [], 0
        return self._release(len(self._held.rstrip()))

    def _take_in(self, whole: str) -> None:
        self._held += whole[len(self._decode(self._newest[: self._read])) :]
        cuts = [cut for stop in self._stops if (cut := self._held.find(stop)) >= 0]
        if cuts:
            self._held, self.stopped = self._held[: min(cuts)], True

    def _release(self, end: int) -> str:
        text, self._held = self._held[:end], self._held[end:]
        text = text if self._begun else trim_start(text)
        self._begun = self._begun or bool(text)
        return text
