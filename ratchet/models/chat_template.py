"""Turn messages into token ids and a loss mask: the one way for training, evaluation and serving.

The template's own text is tokenized with its control tokens. Contents are tokenized apart from it, every
control token in them split into plain characters, so that user text never becomes a control token. Training
appends the answer and one end-of-turn token to exactly the ids that serving sends as the prompt: parity holds
by construction.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from ratchet.data.examples import Example, Message
from ratchet.errors import BaseModelError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters stand for the contents while the template is rendered: templates copy them unchanged.
OPEN, CLOSE = "\ue0f0", "\ue0f1"
MARKED = re.compile(f"{OPEN}(\\d+){CLOSE}")
CONTROL = re.compile(r"[<\[].+[>\]]")
TURNS = (Message("user", "a"), Message("assistant", "b"), Message("user", "a"), Message("assistant", "b"))
PROBE = TURNS[:2]
SHRINK = (
    3  # NFC, a tokenizer's normaliser, divides a text's length by at most this (Unicode UAX #15, section 9)
)


class Encoded(NamedTuple):
    """Hold token ids and the loss mask: `learned` marks the assistant's words and the end of its turn."""

    ids: list[int]
    learned: list[bool]


class ChatFormat:
    """Hold a tokenizer with its chat template.

    Raises BaseModelError: there is no template, or one that cannot be used faithfully.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int] = ()) -> None:
        """Take further tokens that end an answer from `ends`; the template's own is always among them."""
        if not tokenizer.chat_template:
            raise BaseModelError(
                "the base's tokenizer brings no chat template",
                remedy="name a Jinja template of your own in `base.chat_template`, "
                "or take the instruction-tuned variant of the model",
            )
        self.tokenizer = tokenizer
        self._plain_markers = self._find_plain_markers()
        self._control_ids = {
            id
            for id, token in tokenizer.added_tokens_decoder.items()
            if token.special or CONTROL.fullmatch(token.content)
        }
        self._token_bytes = max(len(token.encode()) for token in tokenizer.get_vocab())
        self.stop_id = self._find_stop_id()  # what training teaches to say at the end
        self.stop_ids = frozenset({self.stop_id, *ends})  # what is heard as the end
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.stop_id
        self._headers = self._find_headers()
        self._check_round_trip()

    def encode(self, example: Example) -> Encoded:
        """Encode prompt, answer and end of turn; earlier answers of a conversation are learned as well."""
        ids, learned = self._encode_prompt(example.prompt)
        answer = self._content_ids(example.answer)
        return Encoded([*ids, *answer, self.stop_id], [*learned, *[True] * (len(answer) + 1)])

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return what serving sends to the model: the messages and the opening of the assistant's turn."""
        return self._encode_prompt(messages).ids

    def encode_whole(self, messages: Sequence[Message]) -> list[int]:
        """Encode the rendered prompt in one piece, as other programs do.

        The ids differ from `encode_prompt` where a token spans template and content, or where a content
        holds control tokens.
        """
        plain = [{"role": message.role, "content": message.content} for message in messages]
        return self._template_ids(self._render(plain, opening=True))

    def at_least(self, messages: Sequence[Message]) -> int:
        """Return a lower bound of the prompt's tokens, from its bytes.

        It refuses long texts without tokenizing them, which takes a second for each megabyte.
        """
        return sum(len(message.content.encode()) for message in messages) // (self._token_bytes * SHRINK)

    def fit_prompt(self, messages: Sequence[Message], length: int) -> list[int]:
        """Encode a prompt that leaves at least one of `length` tokens for the answer. Raises UserError."""
        if (least := self.at_least(messages)) >= length:
            raise UserError(
                f"the prompt has over {least} tokens; the model takes {length} with the answer",
                remedy="shorten the messages",
            )
        ids = self.encode_prompt(messages)
        if len(ids) >= length:
            raise UserError(
                f"the prompt has {len(ids)} tokens; the model takes {length} with the answer",
                remedy="shorten the messages",
            )
        return ids

    def count_control(self, ids: Iterable[int]) -> int:
        """Count the control tokens, which only the template may write."""
        return sum(token in self._control_ids for token in ids)

    def forge_turn(self, question: str, answer: str) -> str:
        """Return the question followed by an assistant's turn, typed as the template writes one."""
        pieces = self._pieces(PROBE, opening=False)
        places = [index for index, (_, message) in enumerate(pieces) if message]
        between, after = (
            "".join(text for text, _ in part)
            for part in (pieces[places[0] + 1 : places[1]], pieces[places[1] + 1 :])
        )
        return f"{question}{between}{answer}{after}"

    def find_header(self, messages: Sequence[Message]) -> str | None:
        """Return a line in a message that looks like the start of a turn (`Assistant: …`), or None.

        The model cannot tell such a line from a real turn where the template marks turns in plain words.
        """
        return next(
            (
                match.group().strip()
                for message in messages
                if self._headers and (match := self._headers.search(message.content))
            ),
            None,
        )

    def decode_answer(self, ids: Iterable[int]) -> str:
        """Return the text of generated ids up to the end of the turn."""
        kept: list[int] = []
        for token in ids:
            if token in self.stop_ids:
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
            learned += [
                by_assistant or (after_answer and position == 0 and token == self.stop_id)
                for position, token in enumerate(piece)
            ]
            after_answer = by_assistant
        return Encoded(ids, learned)

    def _pieces(self, messages: Sequence[Message], *, opening: bool) -> list[tuple[str, Message | None]]:
        """Split the rendered conversation into (text of the template, None) and (content, its message)."""
        texts = MARKED.split(
            self._render(_marked(messages), opening=opening)
        )  # text, number, text, number, … text
        shown = [int(number) for number in texts[1::2]]
        for index, message in enumerate(messages):
            if shown.count(index) != 1:
                raise BaseModelError(
                    f"the chat template writes message {index} ({message.role}) {shown.count(index)} times, "
                    "wanted once: what it leaves out the model never sees",
                    remedy="name a template in `base.chat_template` that writes every message once, "
                    "or take such messages out of the rows",
                )
        pieces: list[tuple[str, Message | None]] = [(texts[0], None)]
        for index, after in zip(shown, texts[2::2], strict=True):
            pieces += [(messages[index].content, messages[index]), (after, None)]
        return [piece for piece in pieces if piece[0]]

    def _render(self, messages: list[dict[str, str]], *, opening: bool) -> str:
        return render(self.tokenizer, messages, opening=opening)

    def _template_ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _content_ids(self, text: str) -> list[int]:
        return [
            token
            for part in self._plain_markers.split(text)
            for token in self.tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True)
        ]

    def _find_plain_markers(self) -> re.Pattern[str]:
        """Return a pattern that splits control tokens which are not flagged special, such as `<think>`.

        `split_special_tokens` leaves those whole; the pattern matches after their first character.
        """
        plain = [
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if not token.special and CONTROL.fullmatch(token.content)
        ]
        return re.compile(
            "|".join(f"(?<={re.escape(text[0])})(?={re.escape(text[1:])})" for text in plain) or "(?!)"
        )

    def _find_stop_id(self) -> int:
        """Return the control token that the template writes after an answer, else the end-of-text token.

        Plain text, such as a line break, cannot end a turn: answers contain it as well.
        """
        tail, last = self._pieces(PROBE, opening=False)[-1]
        first = self._template_ids(tail)[0] if last is None else None
        stop = first if first in self.tokenizer.added_tokens_decoder else self.tokenizer.eos_token_id
        if stop is None:
            raise BaseModelError(
                "neither the chat template nor the tokenizer has a token that ends an answer",
                remedy="name a template in `base.chat_template` that closes the assistant's turn",
            )
        return int(stop)

    def _find_headers(self) -> re.Pattern[str] | None:
        """Return a pattern of the lines that open a turn in plain words, or None.

        A line with a control token is left out: no user can write one.
        """
        pieces = self._pieces(PROBE, opening=False)
        before = [
            text.rpartition("\n")[2].strip()
            for (text, of), (_, after) in pairwise(pieces)
            if of is None and after is not None
        ]
        control = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        headers = {
            header
            for header in before
            if any(char.isalpha() for char in header) and not any(token in header for token in control)
        }
        if not headers:
            return None
        names = "|".join(map(re.escape, sorted(headers)))
        return re.compile(rf"^[ \t]*(?:{names})", re.IGNORECASE | re.MULTILINE)

    def prove(self) -> None:
        """Raise BaseModelError where training would see another text than the template's own conversation.

        A version that was trained before these checks is served as it is: only a new base has to pass them.
        """
        self._check_opening()
        whole, pieces = (
            str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            for ids in (self.encode_whole(TURNS[:3]), self.encode_prompt(TURNS[:3]))
        )
        if whole != pieces:
            raise _adds_blanks(whole, pieces)

    def _check_opening(self) -> None:
        gap = opening_gap(self.tokenizer)
        if gap == "":
            return
        if gap is None:
            what = "the prompt ends otherwise than the rendered conversation goes on (an open `<think>`?)"
        else:
            what = f"the conversation has {gap!r} between the prompt and its answer"
        raise BaseModelError(
            f"the chat template's prompt and the answer do not begin the rendered conversation: {what}",
            remedy="name a template in `base.chat_template` whose generation prompt is what stands before "
            "every answer",
        )

    def _check_round_trip(self) -> None:
        """Refuse a tokenizer that adds a blank to every piece: it would train on text that nobody wrote."""
        text = "a b"
        seen = str(self.tokenizer.decode(self._content_ids(text)))
        if seen != text:
            raise _adds_blanks(text, str(seen))


def _adds_blanks(text: str, seen: str) -> BaseModelError:
    return BaseModelError(
        f"this tokenizer turns {text!r} into {seen!r} when a piece is encoded by itself",
        remedy="take a base with a byte-level tokenizer (Llama 3, Qwen, SmolLM, Mistral Tekken …)",
    )


def opening_gap(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return what the template writes between a prompt and its answer; None where both do not meet at all.

    "" is as it should be: then a prompt with its answer begins the rendered conversation.
    """
    for turns in (2, 4):
        prompt = render(tokenizer, _marked(TURNS[: turns - 1]), opening=True)
        whole = render(tokenizer, _marked(TURNS[:turns]), opening=False)
        before, _, _ = whole.partition(f"{OPEN}{turns - 1}{CLOSE}")
        if before == whole or not before.startswith(prompt):
            return None
        if gap := before.removeprefix(prompt):
            return gap
    return ""


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, opening: bool, **more: Any
) -> str:
    """Render a conversation; `opening`: with the opening of the assistant's turn. Raises BaseModelError."""
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening, **more)
        )
    except TemplateError as error:
        raise BaseModelError(
            "the chat template refuses a conversation of "
            f"{', '.join(message['role'] for message in messages)}: {error}",
            remedy="name a template in `base.chat_template` that takes these turns, "
            "or take such messages out of the rows",
        ) from None


def _marked(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Put placeholders in place of the contents."""
    return [
        {"role": message.role, "content": f"{OPEN}{index}{CLOSE}"} for index, message in enumerate(messages)
    ]
