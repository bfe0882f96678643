"""Turn messages into token ids and a loss mask, in the same way for training, evaluation and serving.

The template's own text is tokenized with its control tokens. Contents are tokenized separately, with every
control token in them split into plain characters, so that user text never becomes a control token. Training
appends the answer and one end-of-turn token to exactly the ids that serving sends as the prompt, so both
always agree. If reasoning is learned (`base.reasoning`), the template writes it, and the answer is all that
the template writes between the prompt and the end of the turn.

Pictures and recordings stand in contents as MEDIA_MARK. The template writes the model's image or audio token
there, as its own text; the model's processor then replaces it by all tokens that stand for the medium.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ratchet.data.examples import (
    MEDIA_MARK,
    THINK,
    THOUGHT,
    Example,
    Message,
    Tool,
    ToolCall,
    call_text,
    media_of,
    texts_of,
    trim,
)
from ratchet.errors import BaseModelError, DataError, MediaError, UserError
from ratchet.media.names import is_sound, kind_of
from ratchet.models.reasoning import LEARN, ReasoningFormat, find_reasoning_format
from ratchet.models.tool_calls import PROBE_TOOL, PROBES, CallFormat, find_call_format

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from ratchet.models.processors import MediaProcessor

# Private-use characters around a message's number stand for its content while the template is rendered, since
# templates copy them unchanged.
OPEN, CLOSE = "\ue0f0", "\ue0f1"
REASON = "r"  # before the number: the placeholder stands for the message's reasoning, not its content
PART = "p"  # after the number: the placeholder stands for one of the texts between a message's media
SOUND_MARK = "\ue0f2"  # in place of a MEDIA_MARK, where a recording stands, while the template is rendered
MARKS = {False: MEDIA_MARK, True: SOUND_MARK}  # the key tells whether it is a recording
TYPES = {MEDIA_MARK: "image", SOUND_MARK: "audio"}  # of the parts that templates take
KINDS = {MEDIA_MARK: "pictures", SOUND_MARK: "recordings"}
MARKED = re.compile(f"{OPEN}({REASON}?\\d+(?:{PART}\\d+)?){CLOSE}")
NO_MEDIA: Mapping[str, bytes] = MappingProxyType({})
EMPTY_BLOCK = re.compile(f"{THINK}\\s*{THOUGHT}\\s*\\Z")
CONTROL = re.compile(r"[<\[].+[>\]]")
ANY_MARK = re.compile(f"([{MEDIA_MARK}{SOUND_MARK}])")
TURNS = (Message("user", "a"), Message("assistant", "b"), Message("user", "a"), Message("assistant", "b"))
PROBE = TURNS[:2]
SHRINK = (
    3  # NFC, a tokenizer's normaliser, divides a text's length by at most this (Unicode UAX #15, section 9)
)


class Encoded(NamedTuple):
    """Token ids and the loss mask: `learned` is true for the assistant's tokens and the end of its turn."""

    ids: list[int]
    learned: list[bool]
    media: tuple[str, ...] = ()  # names of the row's pictures and recordings, in order


class ContentForm(NamedTuple):
    """How a template takes the contents of messages that may have pictures and recordings.

    `parts`: as a list of texts and media; otherwise as one text with `written[mark]` for a medium.
    `written` has the marks of the kinds that the template writes.
    """

    parts: bool
    written: dict[str, str]

    def convert(self, content: str) -> str | list[dict[str, str]]:
        """Return a content with MARKS in the form that the template takes."""
        if not self.parts:
            for mark, token in self.written.items():
                content = content.replace(mark, token)
            return content
        texts = ANY_MARK.split(content)  # text, mark, text, mark, … text
        found: list[dict[str, str]] = []
        for mark, text in zip(["", *texts[1::2]], texts[::2], strict=True):
            found += [{"type": TYPES[mark]}] if mark else []
            found += [{"type": "text", "text": text}] if text or len(texts) == 1 else []
        return found


class ChatFormat:
    """A tokenizer with its chat template: it encodes conversations and reads answers.

    Raises BaseModelError: there is no template, or it cannot be used faithfully.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: Iterable[int] = (),
        processor: MediaProcessor | None = None,
        media: Mapping[str, bytes] = NO_MEDIA,
    ) -> None:
        """Analyse the template.

        `ends`: ids of tokens that end an answer, besides the template's own; `processor`: the model's own,
        if it reads pictures or sound; `media`: the pictures and recordings of rows, by name.
        """
        if not tokenizer.chat_template:
            raise BaseModelError(
                "the base's tokenizer brings no chat template",
                remedy="name a Jinja template of your own in `base.chat_template`, "
                "or take the instruction-tuned variant of the model",
            )
        self.tokenizer = tokenizer
        self.processor = processor
        self.media = media
        self._form = find_content_form(tokenizer, processor)
        self._plain_markers = self._find_plain_markers()
        self._control_ids = {
            id
            for id, token in tokenizer.added_tokens_decoder.items()
            if token.special or CONTROL.fullmatch(token.content)
        }
        self._token_bytes = max(len(token.encode()) for token in tokenizer.get_vocab())
        self.stop_id = self._find_stop_id()  # the end token that training teaches
        self.stop_ids = frozenset({self.stop_id, *ends})  # all tokens that end a generated answer
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.stop_id
        self._headers = self._find_headers()
        self._check_round_trip()

    def encode(self, example: Example) -> Encoded:
        """Encode prompt, answer and end of turn; earlier answers of the conversation are learned too.

        Raises BaseModelError: the template does not write the row's tools, or writes calls that cannot be
        read back from an answer; MediaError: the base cannot take the row's pictures or recordings;
        DataError: `media` lacks one of them; UserError: a tool or a call contains a control token.
        """
        self._check_row(example)
        ids, learned, shown = self._encode_prompt(example.prompt, example.tools)
        last = example.messages[-1]
        if last.tool_calls or self.reasoning:
            answer = self._ids_of(self._answer_text(example.messages, example.tools), example.messages)
        else:
            answer = self._content_ids(last.content)
        return Encoded([*ids, *answer, self.stop_id], [*learned, *[True] * (len(answer) + 1)], shown)

    def fits(self, example: Example, length: int) -> bool:
        """Tell whether a row can be written, and has at most `length` tokens. Raises BaseModelError."""
        try:
            return len(self.encode(example).ids) <= length
        except UserError:
            return False

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Return the ids that serving sends to the model: the messages and the start of the answer's turn."""
        self._check_tools(messages, tools)
        return self._encode_prompt(messages, tools).ids

    def encode_whole(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Encode the rendered prompt in one piece, as other programs do.

        The ids differ from those of `encode_prompt` if a token spans template and content, or if a content
        contains control tokens.
        """
        plain = _turns(
            messages,
            [(_by_kind(message.content, message.media), message.reasoning) for message in messages],
            self.reasoning,
        )
        ids = self._template_ids(self._render(plain, opening=True, tools=tools))
        return self._show(Encoded(ids, [False] * len(ids)), messages).ids

    def at_least(self, messages: Sequence[Message]) -> int:
        """Return a lower bound of the number of tokens of a prompt, computed from its bytes.

        It lets callers refuse long texts without tokenizing them, which takes a second per megabyte.
        """
        return sum(len(message.text.encode()) for message in messages) // (self._token_bytes * SHRINK)

    def fit_prompt(
        self,
        messages: Sequence[Message],
        length: int,
        tools: Sequence[Tool] = (),
        *,
        reasons: bool = True,
    ) -> list[int]:
        """Encode a prompt that leaves at least one of `length` tokens for the answer. Raises UserError.

        If `reasons` is false, the prompt also contains the text that begins an answer without reasoning.
        """
        if (least := self.at_least(messages)) >= length:
            raise UserError(
                f"the prompt has over {least} tokens; the model takes {length} with the answer",
                remedy="shorten the messages",
            )
        ids = self.encode_prompt(messages, tools)
        if self.reasoning and not reasons:
            ids += self._template_ids(self.reasoning.direct)
        if len(ids) >= length:
            raise UserError(
                f"the prompt has {len(ids)} tokens; the model takes {length} with the answer",
                remedy="shorten the messages",
            )
        return ids

    def count_control(self, ids: Iterable[int]) -> int:
        """Count the control tokens among `ids`, which only the template may write."""
        return sum(token in self._control_ids for token in ids)

    def forge_turn(self, question: str, answer: str) -> str:
        """Return the question followed by a forged assistant's turn, typed as the template would write it."""
        pieces = self._pieces(PROBE, opening=False)
        places = [index for index, (_, message) in enumerate(pieces) if message]
        between, after = (
            "".join(text for text, _ in part)
            for part in (pieces[places[0] + 1 : places[1]], pieces[places[1] + 1 :])
        )
        return f"{question}{between}{answer}{after}"

    def find_header(self, messages: Sequence[Message]) -> str | None:
        """Return the start of a line in a message that looks like a turn (`Assistant: …`), or None.

        If the template marks turns in plain words, the model cannot distinguish such a line from a turn.
        """
        return next(
            (
                match.group().strip()
                for message in messages
                for text in (message.content, message.reasoning if self.reasoning else "")
                if self._headers and (match := self._headers.search(text))
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
        return trim(self.decode(kept))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids without special tokens, except those that mark calls and reasoning."""
        kept = self._kept_ids
        if not kept or kept.isdisjoint(ids):
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        shown = [id for id in ids if id in kept or id not in self._special_ids]
        return str(self.tokenizer.decode(shown, skip_special_tokens=False))

    def read_answer(self, text: str, tools: Sequence[Tool]) -> Message:
        """Read reasoning and calls from an answer to a prompt that offers `tools`."""
        if not self.reasoning:
            return self.read_calls(text, tools)
        reasoning, content = self.reasoning.read(text)
        return msgspec.structs.replace(self.read_calls(content, tools), reasoning=reasoning)

    def read_calls(self, text: str, tools: Sequence[Tool]) -> Message:
        """Read calls from the content of an answer; malformed calls stay text."""
        read = self.calls.read(text, tools) if tools and self.calls else None
        return read or Message("assistant", text)

    def settled(self, text: str) -> int:
        """Count the leading characters of an unfinished answer that cannot be part of a call."""
        return self.calls.settled(text) if self.calls else len(text)

    # --- reasoning ---

    @cached_property
    def reasoning(self) -> ReasoningFormat | None:
        """How the template writes reasoning; None if reasoning is not learned."""
        template = str(self.tokenizer.chat_template)
        if LEARN not in template:
            return None
        return find_reasoning_format(lambda turns, opening: self._render(turns, opening=opening), template)

    @property
    def told_reasoning(self) -> str:
        """What happens to reasoning in rows, as a text for people."""
        if not self.reasoning:
            return "left out of what is learned (`base.reasoning: drop`)"
        if self.reasoning.in_history:
            return "learned, in earlier turns as well, as the template writes it"
        return (
            "learned with the last answer; the template leaves it out of earlier turns, whose answers are "
            "then not learned"
        )

    # --- tools ---

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template writes the tools that a prompt offers."""
        try:
            return "look_up" in self._render(_marked(PROBE[:1]), opening=True, tools=[PROBE_TOOL])
        except (BaseModelError, TypeError, ValueError):
            return False

    @cached_property
    def calls(self) -> CallFormat | None:
        """How the template writes calls; None if it writes none that can be read back."""
        if not self.takes_tools:
            return None

        def answer_of(calls: tuple[ToolCall, ...]) -> str:
            try:
                text = self._answer_text([PROBE[0], Message("assistant", "", calls)], [PROBE_TOOL])
            except (BaseModelError, TypeError, ValueError):
                return ""  # some templates accept only one call per turn
            return self.reasoning.read(text).content if self.reasoning else text

        return find_call_format(answer_of)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder
        return frozenset(id for id, token in added.items() if token.special)

    @cached_property
    def _kept_ids(self) -> frozenset[int]:
        """Ids of special tokens with which calls or reasoning are written, such as `[TOOL_CALLS]`."""
        around = "".join(self.reasoning[1:4]) if self.reasoning else ""
        if self.calls:
            around += self.calls.marks
        return frozenset(self._template_ids(around)) & self._special_ids

    @cached_property
    def _escapes_results(self) -> bool:
        """Whether the template writes the results of tools as JSON strings (Mistral's templates do)."""
        asked = [PROBE[0], Message("assistant", "", PROBES[:1]), Message("tool", 'a"b')]
        turns = _turns(asked, [(message.content, "") for message in asked])
        written = self._render(turns, opening=True, tools=[PROBE_TOOL])
        return 'a\\"b' in written

    def _answer_text(self, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        """Return the text that the template writes for the last message, an answer, up to the turn's end.

        Raises BaseModelError unless the rendered conversation begins with the prompt.
        """
        marked = _marked(messages, self.reasoning)
        before = self._render(marked[:-1], opening=True, tools=tools)
        whole = self._render(marked, opening=False, tools=tools)
        if whole.startswith(before):
            return self._up_to_end(whole, len(before))
        calls = bool(messages[-1].tool_calls)
        if self.reasoning and self.reasoning.opened and not calls:
            # DeepSeek R1's template writes no reasoning: its prompt opens the block, and the model closes it.
            index, reasoned = len(messages) - 1, bool(messages[-1].reasoning)
            return (_mark(index, REASON) if reasoned else "") + self.reasoning.after + _mark(index)
        raise BaseModelError(
            f"the chat template writes {'a call of a tool' if calls else 'an answer'} otherwise than its "
            "prompt begins the answer",
            remedy="name a template in `base.chat_template` whose generation prompt stands before "
            f"{'calls' if calls else 'every answer'}",
        )

    def _up_to_end(self, rendered: str, start: int) -> str:
        ends = [
            place
            for id in self.stop_ids
            if (place := rendered.find(str(self.tokenizer.convert_ids_to_tokens(id)), start)) >= 0
        ]
        return rendered[start : min(ends, default=len(rendered))]

    def _check_tools(self, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        """Raise BaseModelError for tools that the template cannot write, UserError for a control token."""
        if tools and not self.takes_tools:
            raise BaseModelError(
                "the base's chat template does not write the tools that a prompt offers",
                remedy="take a base whose template does (`ratchet base` tells), or name a template in "
                "`base.chat_template`",
            )
        called = [message for message in messages if message.tool_calls]
        if called and self.calls is None:
            raise BaseModelError(
                "the base's chat template writes no calls of tools, or none that can be read back",
                remedy="name a template in `base.chat_template` that writes a call's name and arguments",
            )
        bare = [Message("assistant", "", message.tool_calls) for message in called]
        for text in texts_of(bare, tools):
            if self._control.search(text):
                raise UserError(
                    f"a tool or a call holds the control token {self._control.findall(text)[0]!r}",
                    remedy="leave it out: the template writes tools and calls as they are",
                )

    def _check_row(self, example: Example) -> None:
        """Check that the template can write the tools and calls of a row, and that the calls read back.

        Raises BaseModelError: no tools or calls can be written; UserError: this row's hold a control token,
        or a call would be read otherwise from an answer, such as the number 5 as a text.
        """
        self._check_tools(example.messages, example.tools)
        for message in example.messages:
            if message.tool_calls and message.learned:
                bare = Message("assistant", "", message.tool_calls)
                text = self._answer_text([PROBE[0], bare], example.tools)
                if (read := self.read_answer(text, example.tools)).tool_calls != message.tool_calls:
                    raise UserError(
                        f"the call {call_text(message.tool_calls[0])[:200]} reads back as "
                        f"{read.text[:200]!r} from what the chat template writes",
                        remedy="give each argument its `type` in the tool's parameters",
                    )

    @cached_property
    def _control(self) -> re.Pattern[str]:
        contents = [self.tokenizer.added_tokens_decoder[id].content for id in self._control_ids]
        return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or "(?!)")

    # --- pictures and recordings ---

    @property
    def reads(self) -> tuple[str, ...]:
        """What rows may have besides texts: `pictures`, `recordings`, both or nothing."""
        return tuple(KINDS[mark] for mark in self._form.written) if self._form else ()

    def showing(self, media: Mapping[str, bytes]) -> ChatFormat:
        """Return the same format with other pictures and recordings."""
        other = copy(self)
        other.media = media
        return other

    def inputs(self, names: Sequence[Sequence[str]], ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what the model takes besides ids and mask, for a batch of rows in order.

        `names` are those of each row's pictures and recordings, `ids` is (batch, seq).
        """
        if self.processor is None:
            return {}
        media = [[self.media[name] for name in row] for row in names]
        found = self.processor.features(media) | self.processor.sequence_features(ids)
        return {name: value.to(ids.device) for name, value in found.items()}

    # --- the template's text and the contents ---

    def _show(self, row: Encoded, messages: Sequence[Message]) -> Encoded:
        """Put all tokens of its medium in the place of each image or audio token that the template wrote.

        Raises MediaError: the base cannot take it; DataError: it is missing in `media`.
        """
        names = media_of(messages)
        if not names:
            return row
        if self.processor is None:
            raise MediaError(
                f"a {kind_of(names[0])} is given, and the base reads text only",
                remedy="take a base that reads it as `base.model` (docs/training.md), or leave it out",
            )
        self._check_kinds(names)
        try:
            media = [self.media[name] for name in names]
        except DataError:
            raise
        except KeyError as error:
            raise DataError(
                f"the {kind_of(str(error.args[0]))} {error.args[0]} is missing",
                remedy="`dvc repro prepare` puts it into data/prepared/media, if its batch has it",
            ) from None
        ids: list[int] = []
        learned: list[bool] = []
        for token, piece in zip(row.learned, self.processor.pieces(row.ids, media), strict=True):
            ids += piece
            learned += [token] * len(piece)
        return Encoded(ids, learned, names)

    def _check_kinds(self, names: Sequence[str]) -> None:
        """Raise MediaError for a picture or recording that the template has no place for."""
        written = self._form.written if self._form else {}
        for number, name in enumerate(names):
            if MARKS[is_sound(name)] not in written:
                raise MediaError(
                    f"a {kind_of(name)} is given, and the base reads {' and '.join(self.reads)} only",
                    remedy="take a base that reads both, or leave it out",
                    medium=number,
                )

    def _encode_prompt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Encoded:
        rendered = self._render(_marked(messages, self.reasoning), opening=True, tools=tools)
        self._check_shown(rendered, messages)
        ids: list[int] = []
        learned: list[bool] = []
        place = 0
        for index, turn in (self._reasoned_turns if self.reasoning else self._calling_turns)(
            rendered, messages, tools
        ):
            self._add(rendered[place : turn.start], messages, ids, learned)
            ends = rendered.startswith(self._stop_text, turn.stop)
            piece = [*self._ids_of(rendered[turn], messages), *([self.stop_id] if ends else [])]
            ids += piece
            learned += [messages[index].learned] * len(piece)
            place = turn.stop + (len(self._stop_text) if ends else 0)
        self._add(rendered[place:], messages, ids, learned)
        return self._show(Encoded(ids, learned), messages)

    def _add(self, rendered: str, messages: Sequence[Message], ids: list[int], learned: list[bool]) -> None:
        """Encode a part of the rendered prompt in which answers are plain text, and append it to `ids`.

        If reasoning is learned, these answers are not learned, because the model would not answer like this.
        """
        after_answer = False
        for text, message in _split(rendered, messages):
            piece = self._piece_ids(text, message)
            is_answer = (
                message is not None and message.role == "assistant" and message.learned and not self.reasoning
            )
            ids += piece
            learned += [
                is_answer or (after_answer and position == 0 and token == self.stop_id)
                for position, token in enumerate(piece)
            ]
            after_answer = is_answer

    def _calling_turns(
        self, rendered: str, messages: Sequence[Message], tools: Sequence[Tool]
    ) -> Iterator[tuple[int, slice]]:
        """Find earlier answers that call tools: (index, place in the rendered prompt, end token excluded)."""
        for index, message in enumerate(messages):
            if not message.tool_calls:
                continue
            before = self._render(_marked(messages[:index]), opening=True, tools=tools)
            if not rendered.startswith(before):  # Qwen3's prompts end with a block that earlier turns lack
                before = EMPTY_BLOCK.sub("", before)
            end = rendered.find(self._stop_text, len(before))
            if not rendered.startswith(before) or end < 0:
                raise BaseModelError(
                    "the chat template writes an earlier call of a tool otherwise than its prompt begins it",
                    remedy="name a template in `base.chat_template` whose generation prompt stands before "
                    "calls",
                )
            yield index, slice(len(before), end)

    def _reasoned_turns(
        self, rendered: str, messages: Sequence[Message], tools: Sequence[Tool]
    ) -> Iterator[tuple[int, slice]]:
        """Find earlier answers written like new ones: (index, place in the rendered prompt, end excluded).

        The others mostly lack the reasoning with which a new answer begins, and follow no prompt that is ever
        sent; learning them would teach the model to answer without reasoning.
        """
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._render(_marked(messages[:index], self.reasoning), opening=True, tools=tools)
            answer = self._answer_text(messages[: index + 1], tools)
            if rendered.startswith(before + answer):
                yield index, slice(len(before), len(before) + len(answer))

    @cached_property
    def _stop_text(self) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(self.stop_id))

    def _ids_of(self, rendered: str, messages: Sequence[Message]) -> list[int]:
        return [id for text, message in _split(rendered, messages) for id in self._piece_ids(text, message)]

    def _piece_ids(self, text: str, message: Message | None) -> list[int]:
        """Encode `text`, which is the template's own if `message` is None, else a content of `message`."""
        if message is None:
            return self._template_ids(text)
        if message.role == "tool" and self._escapes_results:
            text = json.dumps(text, ensure_ascii=False)[1:-1]
        return self._content_ids(text)

    def _check_shown(self, rendered: str, messages: Sequence[Message]) -> None:
        shown = MARKED.findall(rendered)
        for index, message in enumerate(messages):
            times = [shown.count(name) for name in _names(index, message)]
            if any(count != 1 for count in times):
                raise BaseModelError(
                    f"the chat template writes message {index} ({message.role}) {_odd(times)} times, "
                    "wanted once: what it leaves out the model never sees",
                    remedy="name a template in `base.chat_template` that writes every message once, "
                    "or take such messages out of the rows",
                )

    def _pieces(self, messages: Sequence[Message], *, opening: bool) -> list[tuple[str, Message | None]]:
        """Split a rendered conversation into (text of the template, None) and (content, its message)."""
        rendered = self._render(_marked(messages), opening=opening)
        self._check_shown(rendered, messages)
        return _split(rendered, messages)

    def _render(self, messages: list[dict[str, Any]], *, opening: bool, tools: Sequence[Tool] = ()) -> str:
        more = {"tools": list(tools)} if tools else {}
        return render(self.tokenizer, messages, opening=opening, form=self._form, **more)

    def _template_ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _content_ids(self, text: str) -> list[int]:
        return [
            token
            for part in self._plain_markers.split(text)
            for token in self.tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True)
        ]

    def _find_plain_markers(self) -> re.Pattern[str]:
        """Return a pattern that splits control tokens without the flag `special`, such as `<think>`.

        `split_special_tokens` does not split these; the pattern matches after their first character.
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

        Plain text, such as a line break, cannot end a turn, because answers contain it too.
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

        Lines with a control token are left out, because no user can write one.
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
        """Raise BaseModelError if training would see another text than the template's own conversation.

        Only a new base has to pass; versions that were trained before these checks existed are still served.
        """
        self._check_opening()
        whole, pieces = (
            str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            for ids in (self.encode_whole(TURNS[:3]), self.encode_prompt(TURNS[:3]))
        )
        if whole != pieces:
            raise _adds_blanks(whole, pieces)

    def _check_opening(self) -> None:
        if self.reasoning:
            for turns in (2, 4):
                self._answer_text(TURNS[:turns], ())
            return
        gap = opening_gap(self.tokenizer, self._form)
        if gap == "":
            return
        more = ""
        if gap is None:
            what = "the prompt ends otherwise than the rendered conversation goes on (an open `<think>`?)"
            more = "; one that opens `<think>` is taken with `base.reasoning: learn`"
        else:
            what = f"the conversation has {gap!r} between the prompt and its answer"
        raise BaseModelError(
            f"the chat template's prompt and the answer do not begin the rendered conversation: {what}",
            remedy="name a template in `base.chat_template` whose generation prompt is what stands before "
            f"every answer{more}",
        )

    def _check_round_trip(self) -> None:
        """Refuse a tokenizer that adds a blank to every piece: training would see text that nobody wrote."""
        text = "a b"
        seen = str(self.tokenizer.decode(self._content_ids(text)))
        if seen != text:
            raise _adds_blanks(text, str(seen))


def encode_last_answer(chat: ChatFormat, row: Example, prompt: Sequence[int] | None = None) -> Encoded:
    """Encode a row so that only its last answer is learned or scored; earlier ones count as prompt.

    `prompt` has the ids of the row's prompt, if they are known already.
    """
    ids, _, shown = chat.encode(row)
    asked = len(chat.encode_prompt(row.prompt, row.tools) if prompt is None else prompt)
    return Encoded(ids, [position >= asked for position in range(len(ids))], shown)


def _adds_blanks(text: str, seen: str) -> BaseModelError:
    return BaseModelError(
        f"this tokenizer turns {text!r} into {seen!r} when a piece is encoded by itself",
        remedy="take a base with a byte-level tokenizer (Llama 3, Qwen, SmolLM, Mistral Tekken …)",
    )


def find_content_form(
    tokenizer: PreTrainedTokenizerBase, processor: MediaProcessor | None
) -> ContentForm | None:
    """Find by rendering how the template takes contents; None if no content can have a medium.

    Parts are preferred, because in most templates they alone write the model's image or audio token.
    """
    if processor is None:
        return None
    for parts in (True, False):
        written = {
            MARKS[sound]: token.placeholder
            for sound, token in processor.tokens.items()
            if _writes(tokenizer, ContentForm(parts, {MARKS[sound]: token.placeholder}))
        }
        if written:
            return ContentForm(parts, written)
    kind, placeholder = ("audio" if min(processor.tokens) else "image"), processor.placeholder
    raise BaseModelError(
        f"the base reads {processor.kinds}, and its chat template does not write {placeholder!r} for one",
        remedy=f"name a template in `base.chat_template` that writes it once for each part of type {kind}",
    )


def _writes(tokenizer: PreTrainedTokenizerBase, form: ContentForm) -> bool:
    """Tell whether the template writes the token of a medium once, beside the text."""
    ((mark, token),) = form.written.items()
    asked = [{"role": "user", "content": f"{_mark(0)}{mark}"}]
    try:
        said = render(tokenizer, asked, opening=True, form=form)
    except (BaseModelError, TypeError, ValueError, KeyError):
        return False
    return MARKED.findall(said) == ["0"] and said.count(token) == 1 and "'type'" not in said


def opening_gap(tokenizer: PreTrainedTokenizerBase, form: ContentForm | None = None) -> str | None:
    """Return the text that the template writes between a prompt and its answer.

    "" is right: then a prompt with its answer begins the rendered conversation. None: the rendered
    conversation does not begin with the prompt at all.
    """
    for turns in (2, 4):
        prompt = render(tokenizer, _marked(TURNS[: turns - 1]), opening=True, form=form)
        whole = render(tokenizer, _marked(TURNS[:turns]), opening=False, form=form)
        before, _, _ = whole.partition(f"{OPEN}{turns - 1}{CLOSE}")
        if before == whole or not before.startswith(prompt):
            return None
        if gap := before.removeprefix(prompt):
            return gap
    return ""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    opening: bool,
    form: ContentForm | None = None,
    **more: Any,
) -> str:
    """Render a conversation; `opening`: with the start of the assistant's turn. Raises BaseModelError.

    `form` is that of the contents, where they may show pictures.
    """
    from jinja2 import TemplateError

    if form:
        messages = [
            {**message, "content": form.convert(message["content"])} if message["content"] else message
            for message in messages
        ]
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


def _split(rendered: str, messages: Sequence[Message]) -> list[tuple[str, Message | None]]:
    """Split a rendered text at its placeholders, and leave out empty pieces.

    A piece is (text of the template, None) or (content or reasoning, its message).
    """
    texts = MARKED.split(rendered)  # text, mark, text, mark, … text
    pieces: list[tuple[str, Message | None]] = [(texts[0], None)]
    for mark, after in zip(texts[1::2], texts[2::2], strict=True):
        number, _, part = mark.removeprefix(REASON).partition(PART)
        message = messages[int(number)]
        content = message.content.split(MEDIA_MARK)[int(part)] if part else message.content
        pieces += [(message.reasoning if mark.startswith(REASON) else content, message), (after, None)]
    return [piece for piece in pieces if piece[0]]


def _mark(index: int, kind: str = "") -> str:
    return f"{OPEN}{kind}{index}{CLOSE}"


def _names(index: int, message: Message) -> list[str]:
    """Return the names of the placeholders for a message's content; the template writes each once."""
    if not message.media:
        return [f"{index}"] if message.content or not message.tool_calls else []
    return [f"{index}{PART}{place}" for place, text in _texts(message) if text]


def _texts(message: Message) -> list[tuple[int, str]]:
    return list(enumerate(message.content.split(MEDIA_MARK)))


def _placeholder(index: int, message: Message) -> str:
    """Return what stands for the content while the template is rendered; media keep their places."""
    if message.media:
        marked = MEDIA_MARK.join(
            f"{OPEN}{index}{PART}{place}{CLOSE}" if text else "" for place, text in _texts(message)
        )
        return _by_kind(marked, message.media)
    return _mark(index) if message.content or not message.tool_calls else ""


def _by_kind(content: str, media: Sequence[str]) -> str:
    """Replace the MEDIA_MARK of each recording by a SOUND_MARK."""
    if not any(map(is_sound, media)):
        return content
    first, *rest = content.split(MEDIA_MARK)
    return first + "".join(MARKS[is_sound(name)] + text for name, text in zip(media, rest, strict=True))


def _odd(times: Sequence[int]) -> int:
    return next(count for count in times if count != 1)


def _marked(messages: Sequence[Message], reasoning: ReasoningFormat | None = None) -> list[dict[str, Any]]:
    """Return the messages for a template, with placeholders for contents and reasoning."""
    marks = [
        (
            _placeholder(index, message),
            _mark(index, REASON) if message.reasoning else "",
        )
        for index, message in enumerate(messages)
    ]
    return _turns(messages, marks, reasoning)


def _turns(
    messages: Sequence[Message],
    texts: Sequence[tuple[str, str]],
    reasoning: ReasoningFormat | None = None,
) -> list[dict[str, Any]]:
    """Return the messages in the form that templates take, with `texts` (content, reasoning) as theirs.

    Calls and their results get ids by position, of nine letters and digits, as Mistral's templates require.
    """
    turns: list[dict[str, Any]] = []
    waiting: list[tuple[str, str]] = []
    count = 0
    for message, (content, thought) in zip(messages, texts, strict=True):
        turn: dict[str, Any] = {"role": message.role, "content": content}
        if reasoning:
            turn = reasoning.put(turn, thought)
        if message.tool_calls:
            waiting = [
                (f"call{count + place:05d}", call.name) for place, call in enumerate(message.tool_calls)
            ]
            count += len(waiting)
            turn["tool_calls"] = [
                {"type": "function", "id": id, "function": {"name": call.name, "arguments": call.arguments}}
                for (id, _), call in zip(waiting, message.tool_calls, strict=True)
            ]
        elif message.role == "tool" and waiting:
            turn["tool_call_id"], turn["name"] = waiting.pop(0)
        turns.append(turn)
    return turns
