"""A base with the adapters of several versions, and the rows that are decoded on it together.

Rows share one key-value cache, padded on the left; each has its own positions, so that what stands beside it in the batch cannot
change it (beyond the last bits of a float). Rows of different versions go through one forward pass, each with its own adapter
(PEFT's mixed batches).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ratchet.chat import ChatFormat
from ratchet.errors import BaseModelError, RatchetError, UserError
from ratchet.files import read_json
from ratchet.gateway.engine import Ask, Ended, Piece
from ratchet.models import MANIFEST, WEIGHTS, load_adapter, load_base, load_tokenizer, quiet
from ratchet.serving import Bundle

MAX_RANK = 512
STEADY_TOKENS = 64  # up to here the text is looked at after each token, then after every eighth: decoding all of it again costs time
NEVER = "\ufffd"  # what a decoder writes for the first bytes of a character
log = logging.getLogger("ratchet.gateway")


class Row:
    """One request under way. `tell` passes a piece, the end or an error to whoever asked."""

    def __init__(self, ask: Ask, since: float) -> None:
        self.ask, self.since = ask, since
        self.tell: Callable[[Piece | Ended | RatchetError], None] = lambda _: None
        self.cancelled = False
        self.prompt: list[int] = []
        self.ids: list[int] = []
        self.room = 0  # answer tokens that may still come
        self.nll = 0.0
        self.prompt_nll: float | None = None
        self.queue_ms = 0.0
        self.sent = 0  # characters of the answer
        self.generator: torch.Generator | None = None


class Decoder:
    """Owned by one thread."""

    def __init__(self, base: Path, method: str, *, measure_prompts: bool) -> None:
        self._base_folder, self._method, self._measure_prompts = base, method, measure_prompts
        self._base = load_base(base, method=method)
        self._model: Any = None  # the base with its adapters, from the first one on
        self._bundles: dict[int, Bundle] = {}
        self._chats: dict[int, ChatFormat] = {}
        self._rows: list[Row] = []
        self._cache: Any = None
        self._mask: Tensor | None = None  # (batch, seq): 1 where a row has a token in the cache

    @property
    def size(self) -> int:
        return len(self._rows)

    @property
    def versions(self) -> set[int]:
        return set(self._bundles)

    def add(self, bundle: Bundle) -> None:
        """Raises BaseModelError: another base, another shape, a rank over 512, weights that are not finite."""
        _check_base(bundle, self._base_folder)
        _check_weights(bundle.adapter)
        name = _name(bundle.version)
        try:
            self._model = load_adapter(self._model if self._model is not None else self._base, bundle.adapter, name=name)
        except Exception as error:
            self._drop(name)
            if isinstance(error, RatchetError):
                raise
            raise BaseModelError(f"v{bundle.version} cannot be loaded: {error}", remedy="ratchet retrain makes another; the log of the gateway has the whole message") from error
        self._model.eval()
        self._bundles[bundle.version], self._chats[bundle.version] = bundle, ChatFormat(load_tokenizer(bundle.adapter))

    def remove(self, version: int) -> None:
        """Only when no row of it is under way."""
        del self._bundles[version], self._chats[version]
        self._drop(_name(version))

    def _drop(self, name: str) -> None:
        peft = getattr(self._model, "peft_config", {})
        if name in peft and len(peft) > 1:
            with quiet():
                self._model.delete_adapter(name)

    @torch.inference_mode()
    def round(self, joining: list[Row]) -> None:
        """Let these in, then one token for every row. What fails is told to the rows that it concerns."""
        self._leave([row for row in self._rows if row.cancelled])
        ready = [row for row in joining if not row.cancelled and self._prepare(row)]
        try:
            if ready:
                self._join(ready)
            elif self._rows:
                self._step()
        except RuntimeError as error:  # out of memory, above all
            log.exception("decoding failed")
            for row in [*self._rows, *(row for row in ready if row not in self._rows)]:
                row.tell(BaseModelError(f"the model failed: {str(error).splitlines()[0]}", remedy="set gateway.max_batch lower if memory ran out"))
            self._rows, self._cache, self._mask = [], None, None

    def _prepare(self, row: Row) -> bool:
        """Token ids by this version's own template. A prompt that does not fit is refused."""
        bundle, chat = self._bundles[row.ask.version], self._chats[row.ask.version]
        row.queue_ms = (time.perf_counter() - row.since) * 1000
        try:
            row.prompt = chat.encode_prompt(row.ask.messages)
        except RatchetError as error:
            row.tell(UserError(str(error)))
            return False
        wanted = row.ask.max_tokens or bundle.generation.max_new_tokens
        row.room = min(wanted, bundle.max_length - len(row.prompt))
        if row.room < 1:
            row.tell(UserError(f"the prompt has {len(row.prompt)} tokens; the model takes {bundle.max_length} with the answer", remedy="shorten the messages"))
            return False
        if (row.ask.temperature if row.ask.temperature is not None else bundle.generation.temperature) > 0:
            row.generator = torch.Generator()
            row.generator.manual_seed(row.ask.seed) if row.ask.seed is not None else row.generator.seed()
        return True

    def _join(self, rows: list[Row]) -> None:
        """Their prompts in one forward pass, padded on the left, then side by side with those under way."""
        from transformers import DynamicCache

        length = max(len(row.prompt) for row in rows)
        device = self._model.device
        pads = [length - len(row.prompt) for row in rows]
        ids = torch.tensor([[0] * pad + row.prompt for pad, row in zip(pads, rows, strict=True)], device=device)  # (batch, seq)
        mask = torch.tensor([[0] * pad + [1] * len(row.prompt) for pad, row in zip(pads, rows, strict=True)], device=device)
        cache = DynamicCache()
        logits = self._forward(rows, ids, mask, mask.cumsum(-1).sub(1).clamp(min=0), cache, whole=self._measure_prompts)
        if self._measure_prompts:
            _measure_prompts(rows, ids, mask, logits)
        self._merge(rows, cache, mask)
        self._extend(rows, logits[:, -1].float())

    def _step(self) -> None:
        assert self._mask is not None
        last = torch.tensor([[row.ids[-1]] for row in self._rows], device=self._model.device)
        position = self._mask.sum(-1, keepdim=True)
        self._mask = torch.cat([self._mask, torch.ones_like(position)], dim=1)
        logits = self._forward(self._rows, last, self._mask, position, self._cache, whole=False)
        self._extend(self._rows, logits[:, -1].float())

    def _forward(self, rows: list[Row], ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, *, whole: bool) -> Tensor:
        """Logits (batch, seq or 1, vocab). Rows of one version take the plain way, which is faster than a mixed batch."""
        names = [_name(row.ask.version) for row in rows]
        settings: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        settings |= {} if whole else {"logits_to_keep": 1}
        with quiet():
            if len(set(names)) > 1:
                return self._model(input_ids=ids, adapter_names=names, **settings).logits  # type: ignore[no-any-return]
            if self._model.active_adapters != [names[0]]:
                self._model.base_model.set_adapter(names[0], inference_mode=True)
            return self._model(input_ids=ids, **settings).logits  # type: ignore[no-any-return]

    def _merge(self, rows: list[Row], cache: Any, mask: Tensor) -> None:
        """Both caches at one length: the shorter one gets padding on its left."""
        if self._mask is None:
            self._rows, self._cache, self._mask = list(rows), cache, mask
            return
        length = max(self._mask.shape[1], mask.shape[1])
        for mine, theirs in zip(self._cache.layers, cache.layers, strict=True):
            mine.keys = torch.cat([_pad(mine.keys, length), _pad(theirs.keys, length)])
            mine.values = torch.cat([_pad(mine.values, length), _pad(theirs.values, length)])
        self._mask = torch.cat([torch.nn.functional.pad(part, (length - part.shape[1], 0)) for part in (self._mask, mask)])
        self._rows += rows

    def _leave(self, rows: list[Row]) -> None:
        """Take rows out, and the columns that only they needed."""
        if not rows:
            return
        kept = [index for index, row in enumerate(self._rows) if row not in rows]
        self._rows = [self._rows[index] for index in kept]
        if not kept:
            self._cache, self._mask = None, None
            return
        assert self._mask is not None
        mask = self._mask[kept]
        start = int(mask.argmax(-1).min())
        self._mask = mask[:, start:]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[kept, :, start:], layer.values[kept, :, start:]

    def _extend(self, rows: list[Row], logits: Tensor) -> None:
        """One token for each, told as far as it is text; those that ended leave."""
        logprobs = logits.log_softmax(-1)  # (batch, vocab)
        greedy = logprobs.argmax(-1).tolist()
        ended = []
        for index, row in enumerate(rows):
            token = greedy[index] if row.generator is None else _sample(logits[index], row)
            row.nll -= float(logprobs[index, token])
            row.ids.append(token)
            row.room -= 1
            if self._tell(row):
                ended.append(row)
        self._leave(ended)

    def _tell(self, row: Row) -> bool:
        """Pass on what is certain of the text. Whether the answer ended."""
        chat = self._chats[row.ask.version]
        stopped = row.ids[-1] == chat.stop_id
        last = stopped or row.room == 0
        if not last and len(row.ids) > STEADY_TOKENS and len(row.ids) % 8 and not row.ask.stop:
            return False
        text = chat.decode_answer(row.ids)
        cut = min((found for stop in row.ask.stop if (found := text.find(stop)) >= 0), default=None)
        if cut is not None:
            text, stopped, last = text[:cut], True, True
        certain = len(text) if last else _certain(text, row.ask.stop)
        if certain > row.sent:
            row.tell(Piece(text[row.sent : certain]))
            row.sent = certain
        if last:
            row.tell(Ended("stop" if stopped else "length", len(row.prompt), len(row.ids), row.prompt_nll, row.nll / len(row.ids), row.queue_ms))
        return last


def _name(version: int) -> str:
    return f"v{version}"


def _pad(states: Tensor, length: int) -> Tensor:
    """Keys or values (batch, heads, seq, width), zeros on the left."""
    return torch.nn.functional.pad(states, (0, 0, length - states.shape[2], 0))


def _measure_prompts(rows: list[Row], ids: Tensor, mask: Tensor, logits: Tensor) -> None:
    """Mean NLL of the prompt's tokens but its first, in nats: as in ratchet/inference.py."""
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")  # (batch, seq - 1)
    counted = mask[:, 1:].bool() & mask[:, :-1].bool()
    means = (losses * counted).sum(-1) / counted.sum(-1).clamp(min=1)
    for row, mean in zip(rows, means.tolist(), strict=True):
        row.prompt_nll = mean


def _sample(logits: Tensor, row: Row) -> int:
    """Temperature, then the smallest set of tokens whose probability reaches top_p (Holtzman et al., arXiv 1904.09751)."""
    probabilities = (logits / max(row.ask.temperature or 1.0, 1e-4)).softmax(-1).cpu()
    if row.ask.top_p is not None and row.ask.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered > row.ask.top_p] = 0.0
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered)
    return int(torch.multinomial(probabilities, 1, generator=row.generator))


def _certain(text: str, stops: tuple[str, ...]) -> int:
    """Length of the text that nothing which comes can change: no half character, no beginning of a stop string."""
    end = len(text.rstrip(NEVER))
    for stop in stops:
        for size in range(min(len(stop) - 1, end), 0, -1):
            if text[:end].endswith(stop[:size]):
                end -= size
                break
    return end


def _check_base(bundle: Bundle, base: Path) -> None:
    theirs, ours = read_json(bundle.adapter / MANIFEST).get("base", {}), read_json(base / MANIFEST)
    if any(theirs.get(key) != ours.get(key) for key in ("model", "revision")):
        raise BaseModelError(
            f"v{bundle.version} was trained on {theirs.get('model')}@{theirs.get('revision')}, the base here is {ours.get('model')}@{ours.get('revision')}",
            remedy="the adapter and its base come from one commit; the folder .ratchet/serving may be removed",
        )


def _check_weights(folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    rank = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("r", 0)
    if not isinstance(rank, int) or not 0 < rank <= MAX_RANK:
        raise BaseModelError(f"the adapter's rank is {rank!r}, wanted 1 to {MAX_RANK}", remedy="set `adapter.rank` and retrain")
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise BaseModelError(f"{folder / WEIGHTS} is no safetensors file: {error}", remedy="remove .ratchet/serving; it is fetched again") from None
    if broken := [name for name, weight in weights.items() if not torch.isfinite(weight.float()).all()]:
        raise BaseModelError(f"{len(broken)} of {len(weights)} weights are not finite, the first {broken[0]}", remedy="the training diverged: lower `train.learning_rate`")
