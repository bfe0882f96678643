"""Chat template and loss mask: the one way from messages to token ids, for training, evaluation and serving.

The template's own text is tokenised with its control tokens; what people wrote is tokenised apart from it, with every
control token split into plain characters, so that user text never becomes a control token. Training appends the answer
and one end-of-turn token to exactly the ids that serving sends as the prompt: parity holds by construction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ratchet.errors import BaseModelError
from ratchet.examples import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters stand for the contents while the template is rendered; a template copies them as they are.
OPEN, CLOSE = "\ue0f0", "\ue0f1"


class Encoded(NamedTuple):
    """Token ids and, position by position, whether the loss counts: the assistant's words and the end of its turn."""

    ids: list[int]
    learned: list[bool]


class ChatFormat:
    """A tokenizer with a chat template. Raises BaseModelError when it has none, or one that cannot be used faithfully."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise BaseModelError(
                "the base's tokenizer brings no chat template",
                remedy="name a Jinja template of your own in `base.chat_template`, or take the instruction-tuned variant of the model",
            )
        self.tokenizer = tokenizer
        self.stop_id = self._find_stop_id()
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.stop_id
        self._check_round_trip()

    def encode(self, example: Example) -> Encoded:
        """Prompt, answer, end of turn. Earlier answers of a longer conversation are learned as well."""
        ids, learned = self._encode_prompt(example.prompt)
        answer = self._content_ids(example.answer)
        return Encoded([*ids, *answer, self.stop_id], [*learned, *[True] * (len(answer) + 1)])

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """What a server sends to the model: the messages and the opening of the assistant's turn."""
        return self._encode_prompt(messages).ids

    def decode_answer(self, ids: Iterable[int]) -> str:
        """Text of generated ids up to the end of the turn."""
        kept: list[int] = []
        for token in ids:
            if token == self.stop_id:
                break
            kept.append(token)
        return str(self.tokenizer.decode(kept, skip_special_tokens=True)).strip()

    def _encode_prompt(self, messages: Sequence[Message]) -> Encoded:
        ids: list[int] = []
        learned: list[bool] = []
        after_answer = False
        for text, message in self._pieces(messages, opening=True):
            piece = self._content_ids(text) if message else self._template_ids(text)
            by_assistant = message is not None and message.role == "assistant"
            ids += piece
            learned += [by_assistant or (after_answer and position == 0 and token == self.stop_id) for position, token in enumerate(piece)]
            after_answer = by_assistant
        return Encoded(ids, learned)

    def _pieces(self, messages: Sequence[Message], *, opening: bool) -> list[tuple[str, Message | None]]:
        """The rendered conversation cut at its contents: (text of the template, None) and (content, its message) in turn."""
        marked = [{"role": message.role, "content": f"{OPEN}{index}{CLOSE}"} for index, message in enumerate(messages)]
        rendered = str(self.tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=opening))
        pieces: list[tuple[str, Message | None]] = []
        for index, message in enumerate(messages):
            before, found, rendered = rendered.partition(f"{OPEN}{index}{CLOSE}")
            if not found:
                raise BaseModelError(
                    f"the chat template leaves out message {index} ({message.role}): the model would never see it",
                    remedy="name a template in `base.chat_template` that keeps every message, or take such messages out of the rows",
                )
            pieces += [(before, None), (message.content, message)]
        return [piece for piece in [*pieces, (rendered, None)] if piece[0]]

    def _template_ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _content_ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def _find_stop_id(self) -> int:
        """The first token that the template writes after an answer; the tokenizer's end-of-text where it writes none."""
        probe = [Message("user", "a"), Message("assistant", "b")]
        tail, last = self._pieces(probe, opening=False)[-1]
        stop = self._template_ids(tail)[0] if last is None and tail else self.tokenizer.eos_token_id
        if stop is None:
            raise BaseModelError("neither the chat template nor the tokenizer has a token that ends an answer", remedy="name a template in `base.chat_template` that closes the assistant's turn")
        return int(stop)

    def _check_round_trip(self) -> None:
        """A tokenizer that adds a blank at the start of every piece would train on text that nobody wrote."""
        text = "a b"
        seen = self.tokenizer.decode(self._content_ids(text))
        if seen != text:
            raise BaseModelError(f"this tokenizer turns {text!r} into {seen!r} when a piece is encoded by itself", remedy="take a base with a byte-level tokenizer (Llama 3, Qwen, SmolLM, Mistral Tekken …)")
