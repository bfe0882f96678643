"""Answer the same rows on three paths (trainer, gateway, merged model), and return tokens and logits.

The gateway's path is its own code from the request's bytes on: parsing, template, continuous batching, text.
Only HTTP is left out.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from ratchet.config.params import Config
from ratchet.config.serving import GatewayConfig
from ratchet.data.examples import Example, Message, Tool, ToolCall, to_openai
from ratchet.engines.answering import Row
from ratchet.engines.decoding import Decoder
from ratchet.engines.loaded_model import LoadedModel
from ratchet.errors import RatchetError
from ratchet.models.chat_template import ChatFormat
from ratchet.models.generation import by_length, greedy_ids
from ratchet.models.loading import load_chat
from ratchet.serving.bundle import Bundle
from ratchet.serving.engine import Ended, Piece
from ratchet.serving.faults import Fault
from ratchet.serving.protocol import parse_chat

TOP = 32  # logits per position that are kept for comparison; a token beyond them is no tie
# ids, mask (batch, seq), and what the model takes of pictures → logits (batch, seq, vocab)
Forward = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]


class Answer(NamedTuple):
    """An answer; `ids` includes the token that ended it, `fault` is the reason why there is no answer."""

    prompt: list[int]
    ids: list[int]
    text: str
    finish: str  # "stop" or "length"
    fault: str = ""
    media: tuple[str, ...] = ()  # names of the prompt's pictures


class Top(NamedTuple):
    """The strongest logits at each position of an answer."""

    ids: Tensor  # (answer, TOP)
    logits: Tensor  # (answer, TOP)


def whole_text(message: Message) -> str:
    """Return an answer's whole text: its reasoning, where it has some, then its content."""
    return "\n".join(filter(None, (message.reasoning, message.text)))


def model_answers(
    model: Any,
    chat: ChatFormat,
    prompts: list[list[int]],
    *,
    tools: Sequence[Sequence[Tool]],
    media: Sequence[tuple[str, ...]],
    max_new_tokens: int,
    batch_size: int,
) -> list[Answer]:
    """Ask a model as the evaluation does; `tools` and `media` are what each prompt offers and shows."""
    made: list[list[int]] = [[]] * len(prompts)
    for chosen in split_by_pictures(media):
        found = greedy_ids(
            model,
            [prompts[index] for index in chosen],
            chat,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            media=[media[index] for index in chosen] if media[chosen[0]] else (),
        )
        for index, ids in zip(chosen, found, strict=True):
            made[index] = ids
    return [
        Answer(
            prompt,
            ids,
            whole_text(chat.read_answer(chat.decode_answer(ids), offered)),
            "stop" if chat.stop_ids & {*ids[-1:]} else "length",
            media=shown,
        )
        for prompt, ids, offered, shown in zip(prompts, made, tools, media, strict=True)
    ]


def split_by_pictures(media: Sequence[tuple[str, ...]]) -> list[list[int]]:
    """Return the places of rows without pictures and of those with some, which never share a forward pass."""
    places = range(len(media))
    parts = [index for index in places if not media[index]], [index for index in places if media[index]]
    return [part for part in parts if part]


def engine_answers(
    loaded: LoadedModel,
    bundle: Bundle,
    chat: ChatFormat,
    asked: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[Answer]:
    """Answer the rows as the gateway's engine `local` does, by continuous batching."""
    decoder = Decoder(loaded, measure_prompts=False)
    decoder.add(bundle, chat)
    heard = [_Heard(bundle, row, max_new_tokens, chat.media) for row in asked]
    waiting = deque(one.row for one in heard if one.row)
    while waiting or decoder.size:
        decoder.round([waiting.popleft() for _ in range(min(len(waiting), batch_size - decoder.size))])
    return [one.answer() for one in heard]


def llama_cpp_answers(
    bundle: Bundle, asked: Sequence[Example], config: Config, scratch: Path, *, max_new_tokens: int
) -> list[Answer]:
    """Answer the rows, one at a time, as the gateway's engine `llama_cpp` does.

    Raises ConfigError: llama.cpp is not installed; BaseModelError, ServiceError: it cannot serve the version.
    """
    heard = [_Heard(bundle, row, max_new_tokens, {}) for row in asked]
    asyncio.run(_compute(bundle, [one.row for one in heard if one.row], config, scratch))
    return [one.answer() for one in heard]


async def _compute(bundle: Bundle, rows: Sequence[Row], config: Config, scratch: Path) -> None:
    from ratchet.engines.llama_cpp_engine import LlamaCppEngine

    engine = LlamaCppEngine(config, scratch)
    try:
        await engine.load(bundle)
        for row in rows:
            async for _ in engine.compute(row):
                pass
    finally:
        await engine.close()


def for_one(bundle: Bundle, rows: Sequence[Example], config: Config) -> tuple[Bundle, Config]:
    """Return settings for one request at a time and no more context than these rows need.

    llama.cpp reserves the memory of all contexts at its start; a base's whole context may take gigabytes.
    """
    chat = load_chat(bundle.adapter)
    longest = max(len(chat.encode_prompt(row.prompt, row.tools)) for row in rows)
    most = longest + max(config.evaluate.max_new_tokens, bundle.generation.max_new_tokens)
    gateway = config.gateway.model_copy(update={"max_batch": 1})
    return bundle._replace(max_length=min(bundle.max_length, most)), config.model_copy(
        update={"gateway": gateway}
    )


def replayed_answer(
    bundle: Bundle, chat: ChatFormat, row: Example, prompt_tokens: int, ids: list[int]
) -> Answer:
    """Return the engine's answer where the model generates exactly `ids`."""
    return engine_answers(
        cast(LoadedModel, Script(prompt_tokens, ids)),
        bundle,
        chat,
        [row],
        max_new_tokens=len(ids),
        batch_size=1,
    )[0]


class _Heard:
    """A request to the engine, and what the engine has sent back."""

    def __init__(self, bundle: Bundle, row: Example, max_new_tokens: int, media: Mapping[str, bytes]) -> None:
        self._reasoning, self._text, self._fault, self._finish = "", "", "", ""
        self._calls: tuple[ToolCall, ...] = ()
        self.row: Row | None = None
        body = {
            "model": bundle.name,
            "messages": to_openai(row.prompt, media),
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "tools": row.tools,
        }
        limits = GatewayConfig(
            max_tokens=max_new_tokens,
            max_pictures=max(1, len(row.media)),
            max_sounds=max(1, len(row.media)),
            max_sound_seconds=3600,
        )
        try:
            chat = parse_chat(json.dumps(body).encode(), limits)
        except Fault as fault:
            self._fault = str(fault)
        else:
            self.row = Row(chat.ask("parity", bundle.version), time.perf_counter(), self._take)

    def _take(self, said: Piece | Ended | RatchetError) -> None:
        if isinstance(said, Piece):
            self._reasoning += said.reasoning
            self._text += said.text
            self._calls += said.calls
        elif isinstance(said, Ended):
            self._finish = "stop" if said.finish == "tool_calls" else said.finish
        else:
            self._fault = str(said)

    def answer(self) -> Answer:
        return (
            Answer(
                self.row.prompt,
                self.row.answer,
                whole_text(Message("assistant", self._text, self._calls, self._reasoning)),
                self._finish,
                self._fault,
            )
            if self.row
            else Answer([], [], "", "", self._fault)
        )


class Script:
    """A stand-in for a loaded model that generates the given tokens one after the other."""

    device = torch.device("cpu")

    def __init__(self, prompt_tokens: int, ids: list[int]) -> None:
        self._prompt_tokens, self._ids = prompt_tokens, ids

    def add(self, bundle: Bundle) -> None:
        """Accept any version: all generate the same tokens."""

    def num_virtual(self, version: int) -> int:
        return 0

    def find_positions(self, ids: Tensor, mask: Tensor, inputs: Mapping[str, Tensor]) -> None:
        """Count all tokens alike: positions do not change what is generated."""

    def new_cache(self, version: int, num_rows: int) -> Any:
        from transformers import DynamicCache

        return DynamicCache()

    def forward(
        self,
        versions: list[int],
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: Any,
        *,
        whole: bool,
        inputs: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Tensor:
        place = min(max(0, int(mask.sum()) - self._prompt_tokens), len(self._ids) - 1)
        logits = torch.zeros(1, 1, max(self._ids) + 1)
        logits[0, 0, self._ids[place]] = 1.0
        return logits


# --- logits ---


def model_forward(model: Any) -> Forward:
    """Return a model's forward pass without the logits of virtual tokens, which stand before the row's."""
    return lambda ids, mask, inputs: model(
        input_ids=ids, attention_mask=mask, use_cache=False, **inputs
    ).logits[:, -ids.shape[1] :]


def engine_forward(loaded: LoadedModel, version: int) -> Forward:
    def forward(ids: Tensor, mask: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        virtual = loaded.num_virtual(version)
        positions = torch.arange(virtual, virtual + ids.shape[1], device=ids.device).expand(len(ids), -1)
        if found := loaded.find_positions(ids, mask, inputs):
            positions = found[0]
        return loaded.forward(
            [version] * len(ids),
            ids,
            pad(mask, (virtual, 0), value=1),
            positions,
            loaded.new_cache(version, len(ids)),
            whole=True,
            inputs=inputs,
        )

    return forward


def strongest(
    forward: Forward, device: Any, answers: Sequence[Answer], *, chat: ChatFormat, batch_size: int
) -> list[Top]:
    """Return the strongest logits at each position of each answer."""
    found: list[Any] = [None] * len(answers)
    for index, logits in _answer_logits(forward, device, answers, chat, batch_size):
        top = logits.topk(min(TOP, logits.shape[-1]))
        found[index] = Top(top.indices, top.values)
    return found


def differences(
    forward: Forward,
    device: Any,
    answers: Sequence[Answer],
    tops: Sequence[Top],
    *,
    chat: ChatFormat,
    batch_size: int,
) -> list[Tensor]:
    """Return one tensor (answer,) per answer: the largest difference of the strongest logits by position.

    A difference is a share of the position's largest logit, or of 1 where that is smaller.
    """
    found: list[Tensor] = [torch.empty(0)] * len(answers)
    for index, logits in _answer_logits(forward, device, answers, chat, batch_size):
        top = tops[index]
        found[index] = (logits.gather(1, top.ids) - top.logits).abs().max(-1).values / scale(top)
    return found


def scale(top: Top) -> Tensor:
    """Return each position's largest logit, at least 1: (answer,)."""
    return top.logits.abs().max(-1).values.clamp(min=1.0)


@torch.inference_mode()
def _answer_logits(
    forward: Forward, device: Any, answers: Sequence[Answer], chat: ChatFormat, batch_size: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield (index, logits (answer, vocab)) of each row; padding follows a row, so it cannot change it."""
    for part in split_by_pictures([answer.media for answer in answers]):
        lengths = [len(answers[index].prompt) + len(answers[index].ids) for index in part]
        for places in by_length(lengths, batch_size):
            batch = [answers[part[place]] for place in places]
            rows = [[*answer.prompt, *answer.ids] for answer in batch]
            length = max(map(len, rows))
            padded = [row + [chat.pad_id] * (length - len(row)) for row in rows]
            ids = torch.tensor(padded, device=device)  # (batch, seq)
            mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
            inputs = chat.inputs([answer.media for answer in batch], ids) if batch[0].media else {}
            logits = forward(ids, mask, inputs)  # (batch, seq, vocab)
            for position, (place, answer) in enumerate(zip(places, batch, strict=True)):
                first = len(answer.prompt) - 1  # this position predicts the answer's first token
                yield part[place], logits[position, first : first + len(answer.ids)].float().cpu()
