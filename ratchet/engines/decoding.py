"""Decode rows together on a model (`ratchet/engines/loaded_model.py`).

Rows share one key-value cache, padded on the left. Each has its own positions, so that its neighbours in the
batch cannot change it (beyond the last bits of a float). Rows of different versions go through one forward
pass, each with its own adapter, if PEFT can mix their methods; other versions have a decoder each, on the
same model. A row that ends leaves at once, with the cache columns that only it needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from ratchet.engines.answering import Row
from ratchet.engines.loaded_model import LoadedModel
from ratchet.engines.picture_pooling import pool
from ratchet.errors import RatchetError, ServiceError, UserError
from ratchet.media.names import is_sound
from ratchet.models.cache import join, select
from ratchet.models.chat_template import ChatFormat
from ratchet.serving.bundle import Bundle
from ratchet.serving.engine import Scored

if TYPE_CHECKING:
    from ratchet.engines.vocabulary import Vocabulary

# The most tokens of joining prompts in one forward pass; rows under way get a token between two passes.
PREFILL_TOKENS = 4096
# The most logits of one pass if prompts are measured: 256 MiB in float32.
PREFILL_LOGITS = 2**26
log = logging.getLogger("ratchet.gateway")


class Joining(NamedTuple):
    """Prompts that went through the model but have not joined the other rows yet."""

    rows: list[Row]
    cache: Any
    mask: Tensor  # (batch, virtual + seq)
    logits: Tensor  # (batch, vocab), of the first answer token


class Decoder:
    """The decoder of the versions that share a batch; one thread owns it."""

    def __init__(self, loaded: LoadedModel, *, measure_prompts: bool, keep_features: bool = False) -> None:
        self._measure_prompts, self._keep_features = measure_prompts, keep_features
        self._loaded = loaded
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

    def add(self, bundle: Bundle, chat: ChatFormat) -> None:
        """Load a version. Raises BaseModelError: it does not fit the model."""
        self._loaded.add(bundle)
        self._bundles[bundle.version], self._chats[bundle.version] = bundle, chat

    def remove(self, version: int) -> None:
        """Unload a version; its rows under way, of which there should be none, end with an error."""
        self._fail(
            [row for row in self._rows if row.ask.version == version],
            ServiceError(f"v{version} was unloaded", remedy="come again: another version is in charge now"),
        )
        del self._bundles[version], self._chats[version]
        self._loaded.remove(version)

    # --- one round ---

    @torch.inference_mode()
    def round(self, waiting: list[Row]) -> None:
        """Let `waiting` join, then add one token to every row; errors go to the rows concerned."""
        self._leave([row for row in self._rows if row.cancelled])
        ready = [row for row in waiting if not row.cancelled and self._prepare(row)]
        for together in ([row for row in ready if not row.media], [row for row in ready if row.media]):
            joining = self._try(together, partial(self._prefill, together)) if together else None
            if joining:
                self._try([*self._rows, *joining.rows], partial(self._join, joining))
        self._step_all()

    def _step_all(self) -> None:
        if self._rows:
            self._try(self._rows, self._step)

    def _try(self, rows: list[Row], work: Callable[[], Any]) -> Any:
        """Run `work`; a failure (mostly out of memory) ends only these rows, with an error."""
        try:
            return work()
        except Exception as error:
            log.exception("decoding failed")
            reason = (str(error) or type(error).__name__).splitlines()[0]
            self._fail(
                rows,
                ServiceError(
                    f"the model failed: {reason}", remedy="set gateway.max_batch lower if memory ran out"
                ),
            )

    def fail_all(self, error: RatchetError, others: list[Row]) -> None:
        self._fail([*self._rows, *others], error)

    def _fail(self, rows: list[Row], error: RatchetError) -> None:
        for row in rows:
            row.tell(error)
        self._leave(rows)

    def _prepare(self, row: Row) -> bool:
        bundle, chat = self._bundles[row.ask.version], self._chats[row.ask.version]
        if not row.prepare(bundle, chat, bundle.max_length - self._loaded.num_virtual(bundle.version)):
            return False
        if row.temperature > 0:
            row.generator, seed = torch.Generator(), row.ask.seed
            row.generator.manual_seed(seed % 2**63) if seed is not None else row.generator.seed()
        return True

    def _prefill(self, rows: list[Row]) -> Joining:
        """Run the prompts, padded on the left, through the model, in forward passes of bounded size.

        Virtual tokens stand before the padding. Rows with pictures go through in one pass, since the model
        puts all pictures of a pass in their places at once.
        """
        length = max(len(row.prompt) for row in rows)
        # A batch with virtual tokens holds one version only.
        device, version = self._loaded.device, rows[0].ask.version
        ids = torch.tensor(  # (batch, seq)
            [[0] * (length - len(row.prompt)) + row.prompt for row in rows], device=device
        )
        mask = torch.tensor(
            [[0] * (length - len(row.prompt)) + [1] * len(row.prompt) for row in rows], device=device
        )
        virtual = self._loaded.num_virtual(version)
        mask = pad(mask, (virtual, 0), value=1)  # (batch, virtual + seq)
        positions = mask.cumsum(-1).sub(1).clamp(min=0)[:, virtual:]  # (batch, seq)
        cache = self._loaded.new_cache(version, len(rows))
        nll, logits = torch.zeros(len(rows), device=device), torch.empty(0)
        shown = any(row.media for row in rows)
        size = length if shown else self._prefill_size(len(rows))
        inputs = self._inputs(rows, ids) if shown else {}
        if shown and (found := self._loaded.find_positions(ids, mask, inputs)):
            positions, distances = found
            for row, distance in zip(rows, distances.tolist(), strict=True):
                row.distance = distance
        for start in range(0, length, size):
            if start:
                self._step_all()
            end = min(start + size, length)
            watching = self._loaded.watched() if shown and self._keep_features else nullcontext([])
            with watching as seen:
                logits = self._loaded.forward(
                    [row.ask.version for row in rows],
                    ids[:, start:end],
                    mask[:, : virtual + end],
                    positions[..., start:end],
                    cache,
                    whole=self._measure_prompts,
                    inputs=inputs,
                )
            if seen:
                self._note_features(rows, seen[0], ids.where(mask[:, virtual:].bool(), -1))
            if self._measure_prompts:
                nll += _nll(logits, ids[:, start + 1 : end + 1], mask[:, virtual + start : virtual + end])
        if self._measure_prompts:
            for row, total in zip(rows, nll.tolist(), strict=True):
                row.prompt_nll = total / (len(row.prompt) - 1) if len(row.prompt) > 1 else None
        return Joining(rows, cache, mask, logits[:, -1].float())

    def _inputs(self, rows: list[Row], ids: Tensor) -> dict[str, Tensor]:
        """Return what the model takes of the rows' pictures; `ids` is (batch, seq)."""
        pictures = {name: row.ask.media[name] for row in rows for name in row.media}
        chat = self._chats[rows[0].ask.version]  # versions that share a base share its processor
        return chat.showing(pictures).inputs([row.media for row in rows], ids)

    def _note_features(self, rows: list[Row], embeddings: Tensor, ids: Tensor) -> None:
        """Note what the model saw in each row's pictures; `ids` is (batch, seq), -1 for padding."""
        processor = self._chats[rows[0].ask.version].processor
        if processor is None:
            return
        image_id = processor.image_id
        shown = [[name for name in row.media if not is_sound(name)] for row in rows]
        sizes = [
            [processor.tokens_of(row.ask.media[name]).count(image_id) for name in names]
            for row, names in zip(rows, shown, strict=True)
        ]
        for row, names, found in zip(rows, shown, pool(embeddings, ids, image_id, sizes), strict=True):
            row.features = dict(zip(names, found, strict=True))

    def _prefill_size(self, num_rows: int) -> int:
        """Return how many positions of each row go through the model in one pass."""
        size = PREFILL_TOKENS // num_rows
        if self._measure_prompts:
            size = min(size, PREFILL_LOGITS // (num_rows * self._loaded.vocab_size))
        return max(16, size)

    def _join(self, joining: Joining) -> None:
        """Append the new rows to the cache; the shorter of the two caches is padded on the left."""
        rows, cache, mask = joining.rows, joining.cache, joining.mask
        if self._mask is None:
            self._rows, self._cache, self._mask = list(rows), cache, mask
        else:
            length = max(self._mask.shape[1], mask.shape[1])
            join(self._cache, cache, length)
            self._mask = torch.cat([pad(part, (length - part.shape[1], 0)) for part in (self._mask, mask)])
            self._rows = [*self._rows, *rows]
        self._extend(rows, joining.logits)

    def _step(self) -> None:
        assert self._mask is not None
        newest = torch.tensor([row.answer[-1:] for row in self._rows], device=self._loaded.device)
        positions = self._mask.sum(-1, keepdim=True)  # (batch, 1)
        if any(row.distance for row in self._rows):
            positions += torch.tensor([[row.distance] for row in self._rows], device=positions.device)
        self._mask = torch.cat([self._mask, torch.ones_like(positions)], dim=1)
        versions = [row.ask.version for row in self._rows]
        logits = self._loaded.forward(versions, newest, self._mask, positions, self._cache, whole=False)
        self._extend(self._rows, logits[:, -1].float())

    def _leave(self, rows: list[Row]) -> None:
        """Remove rows, and the cache columns that only they needed."""
        kept = [index for index, row in enumerate(self._rows) if row not in rows]
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[index] for index in kept]
        if not kept:
            self._cache, self._mask = None, None
            return
        assert self._mask is not None
        mask = self._mask[kept]
        start = int(mask.argmax(-1).min())
        self._mask = mask[:, start:]
        select(self._cache, kept, start)

    def _extend(self, rows: list[Row], logits: Tensor) -> None:
        """Add one token to each row by its logits (batch, vocab), pass on its text, remove ended rows."""
        logprobs = logits.log_softmax(-1)  # (batch, vocab)
        if broken := logprobs.isnan().any(-1).nonzero()[:, 0].tolist():
            self._fail(
                [rows[index] for index in broken],
                ServiceError("the model's output is not finite", remedy="ratchet rollback, if it stays so"),
            )
            sound = [index for index in range(len(rows)) if index not in broken]
            rows, logits, logprobs = [rows[index] for index in sound], logits[sound], logprobs[sound]
        tokens = logprobs.argmax(-1).tolist()
        for index, row in enumerate(rows):
            if row.constraint is not None or row.generator is not None:
                tokens[index] = _choose(logits[index], row)
        chosen = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None])[:, 0].tolist()
        ended = []
        for row, token, logprob, likely in zip(rows, tokens, chosen, logprobs, strict=True):
            try:
                done = row.take(token, logprob, _scorer(row, token, likely))
            except UserError as error:
                row.tell(error)
                done = True
            if done:
                ended.append(row)
        self._leave(ended)


def _nll(logits: Tensor, following: Tensor, mask: Tensor) -> Tensor:
    """Sum the NLL of the following tokens over each row, padding left out: (batch), in nats.

    The same sum as in ratchet/models/generation.py, one chunk of a prompt at a time.
    """
    count = following.shape[1]  # one less than positions at the prompt's end
    logits = logits[:, :count].float()  # (batch, seq, vocab)
    losses = cross_entropy(logits.transpose(1, 2), following, reduction="none")  # (batch, seq)
    return losses.where(mask[:, :count].bool(), 0.0).sum(-1)


def _choose(logits: Tensor, row: Row) -> int:
    """Choose a token that the answer's grammar allows: the likeliest, or a drawn one."""
    allowed = row.constraint.mask(logits) if row.constraint else logits
    return int(allowed.argmax()) if row.generator is None else _sample(allowed, row)


def _scorer(row: Row, token: int, logprobs: Tensor) -> Callable[[], Scored] | None:
    if row.vocabulary is None:
        return None
    return partial(_score, row.vocabulary, token, logprobs, row.ask.top_logprobs or 0)


def _score(vocabulary: Vocabulary, token: int, logprobs: Tensor, num_top: int) -> Scored:
    """Return a token with the `num_top` likeliest alternatives, by the model's own logprobs, (vocab,)."""
    best = logprobs.topk(min(num_top, len(logprobs)))
    top = [
        Scored(vocabulary.bytes_of(other), logprob)
        for other, logprob in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return Scored(vocabulary.bytes_of(token), float(logprobs[token]), tuple(top))


def _sample(logits: Tensor, row: Row) -> int:
    """Draw a token by temperature from the smallest set that reaches top_p (arXiv 1904.09751)."""
    probabilities = (logits / max(row.temperature, 1e-4)).softmax(-1).cpu()
    if row.ask.top_p is not None and row.ask.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered > row.ask.top_p] = 0.0
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered)
    return int(torch.multinomial(probabilities, 1, generator=row.generator))
