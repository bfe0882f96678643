"""Compute a model's answers and likelihoods on rows: from the cache where it has them, otherwise from the
loaded model.

Rows go through the model in batches of similar lengths, and rows of different data batches never share a
forward batch. Test rows never move to another split, so new rows change no forward batch of old rows, and the
cache keeps what an unchanged model said of those.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pandas as pd

from ratchet.config.base import PREFERENCE
from ratchet.config.evaluation import EvaluateConfig
from ratchet.data.examples import Example, counted_in
from ratchet.errors import BaseModelError
from ratchet.evaluation.answer_cache import Answers, identity, open_answers
from ratchet.evaluation.custom_metrics import Custom, custom_score
from ratchet.evaluation.metrics import row_metrics
from ratchet.evaluation.slices import slice_columns
from ratchet.models.adapters import (
    base_settings,
    can_be_switched_off,
    load_base_of,
    load_trained,
    share_a_base,
)
from ratchet.models.chat_template import ChatFormat, Encoded, encode_last_answer
from ratchet.models.generation import Likelihood, answer_likelihoods, likelihoods_and_answers
from ratchet.models.loading import load_adapter, load_chat, quiet
from ratchet.pipeline.stage import say

SWAPPED, ATTACKED, BLIND = "swapped rows", "attacked rows", "blind rows"
COPIES = {SWAPPED: "swapped", ATTACKED: "attacked", BLIND: "blind"}  # group → what its rows are called


class Asked(NamedTuple):
    """Rows to answer. `groups` names the group of each row; only rows of one group share a forward batch.

    Groups of COPIES hold rows that were asked as they are, too. `worse`: rows with the worse answer of a
    preference, of which only the likelihood is measured.
    """

    rows: list[Example]
    groups: list[str]
    worse: Sequence[Example] = ()
    media: Mapping[str, bytes] = MappingProxyType({})  # the rows' pictures by name

    def counted(self) -> str:
        """Tell how many rows there are, and how many copies of each kind."""
        copies = Counter(group for group in self.groups if group in COPIES)
        told = [f"{count} {COPIES[group]} copies" for group, count in copies.items()]
        return " and ".join([f"{len(self.rows) - copies.total()} rows", *told])


class Answered(NamedTuple):
    """What a model said; `worse`: a row's id → negative log-likelihood of its worse answer, in nats."""

    answers: list[str]
    likelihoods: list[Likelihood]
    worse: Mapping[str, float] = {}


class Player(NamedTuple):
    """A model that answers: `base` with what was trained in `trained`, or the untouched base, loaded as
    `like` requires.
    """

    name: str
    base: Path
    trained: Path | None
    like: Path


class Models:
    """Load each model when it has to answer.

    Plain adapters share one base in memory; any other model is loaded alone.
    """

    def __init__(self) -> None:
        self._model: Any = None
        self._base: Path | None = None
        self._held: dict[str, Path] = {}

    @contextmanager
    def play(self, player: Player) -> Iterator[Any]:
        if player.trained is None:
            with self._bare(player) as model:
                yield model
            return
        first = next(iter(self._held.values()), None)
        if first and self._base == player.base and share_a_base(first, player.trained):
            if player.name not in self._held:
                load_adapter(self._model, player.trained, name=player.name)
            self._model.set_adapter(player.name)
        else:
            self._model, self._held = None, {}  # free the memory before the next model is loaded
            self._model, self._base = load_trained(player.base, player.trained, name=player.name), player.base
        self._held[player.name] = player.trained
        yield self._model

    @contextmanager
    def _bare(self, player: Player) -> Iterator[Any]:
        held = next(iter(self._held.values()), None)
        if (
            held
            and self._base == player.base
            and can_be_switched_off(held)
            and base_settings(held) == base_settings(player.like)
        ):
            with self._model.disable_adapter():
                yield self._model
            return
        self._model, self._held = None, {}
        yield load_base_of(player.base, player.like)


def players_of(base: Path, incumbent: Path | None, candidate: Path) -> list[Player]:
    """List candidate, champion (None before the first promotion) and untouched base.

    Models that share a base in memory follow each other, so the base is loaded once.
    """
    players = [Player("candidate", base, candidate, candidate), Player("base", base, None, candidate)]
    if incumbent:
        own_base = incumbent / "base" if (incumbent / "base").exists() else base
        together = own_base == base and share_a_base(candidate, incumbent)
        players.insert(1 if together else 2, Player("champion", own_base, incumbent, incumbent))
    return players


def each_model(base: Path, incumbent: Path | None, candidate: Path) -> Iterator[tuple[str, Any, ChatFormat]]:
    """Yield (name, model, chat) of each model in turn, for measurements on the model itself.

    Use a model before you request the next one, which may replace it in memory.
    """
    models = Models()
    for player in players_of(base, incumbent, candidate):
        with models.play(player) as model:
            yield player.name, model.eval(), load_chat(player.base)


def answer(
    player: Player, models: Models, asked: Asked, config: EvaluateConfig, cache: Path | None = None
) -> Answered:
    """Answer the rows and measure their likelihoods, both in the order of the rows.

    Raises BaseModelError when a likelihood is not finite.
    """
    started = time.perf_counter()
    chat = load_chat(player.base, asked.media)
    prompts = [chat.encode_prompt(row.prompt, row.tools) for row in asked.rows]
    wholes = [encode_last_answer(chat, row, prompt) for row, prompt in zip(asked.rows, prompts, strict=True)]
    worse = [encode_last_answer(chat, row) for row in asked.worse]

    def answers(model: Any, batch: list[int]) -> list[Any]:
        """Return [likelihood, text, whether the answer was cut off] per row."""
        measured, made = likelihoods_and_answers(
            model,
            [wholes[index] for index in batch],
            [prompts[index] for index in batch],
            chat,
            max_new_tokens=config.max_new_tokens,
        )
        return [
            [*likelihood, chat.decode_answer(ids), chat.stop_ids.isdisjoint(ids[-1:])]
            for likelihood, ids in zip(finite(measured), made, strict=True)
        ]

    def likelihoods(model: Any, batch: list[int]) -> list[Any]:
        rows = [worse[index] for index in batch]
        settings: dict[str, Any] = {"pad_id": chat.pad_id, "batch_size": len(rows)}
        return finite(answer_likelihoods(model, rows, inputs=chat.inputs, **settings))

    def finite(found: list[Likelihood]) -> list[Likelihood]:
        if broken := sum(not math.isfinite(each.nll) or not math.isfinite(each.prompt_nll) for each in found):
            raise BaseModelError(
                f"{player.name}: the likelihood of {broken} of {len(found)} answers is not finite",
                remedy="its weights are broken: train again",
            )
        return found

    kinds: list[tuple[Callable[[Any, list[int]], list[Any]], list[list[int]], Sequence[str], Any]] = [
        (answers, _marked(wholes), asked.groups, [chat.pad_id, sorted(chat.stop_ids), config.max_new_tokens]),
        (likelihoods, _marked(worse), ["worse answers"] * len(worse), [chat.pad_id]),
    ]
    with open_answers(cache, identity(player.base, player.trained, player.like) if cache else "") as known:
        parts = [
            _Part(compute, batch, _key([compute.__name__, settings], [ids[index] for index in batch]))
            for compute, ids, groups, settings in kinds
            for batch in batches(ids, groups, config.batch_size)
        ]
        found = [known.get(part.key, len(part.batch)) for part in parts]
        cached = sum(entries is not None for entries in found)
        if cached < len(parts):
            _compute(parts, found, models.play(player), known)
    columns: dict[Any, dict[int, Any]] = defaultdict(dict)
    for part, entries in zip(parts, found, strict=True):
        assert entries is not None
        columns[part.compute] |= zip(part.batch, entries, strict=True)
    where = f", {cached / len(parts):.0%} of it from the cache" if cached else ""
    say(f"evaluate: {player.name} on {asked.counted()} in {time.perf_counter() - started:.0f} s{where}")
    of_rows = [columns[answers][index] for index in range(len(asked.rows))]
    of_worse = [Likelihood(*columns[likelihoods][index]) for index in range(len(worse))]
    said = [chat.read_answer(text, row.tools) for (*_, text, _), row in zip(of_rows, asked.rows, strict=True)]
    if broken_off := sum(cut_off for *_, cut_off in of_rows):
        say(
            f"evaluate: {broken_off} of {len(said)} answers of {player.name} were cut off at "
            f"`evaluate.max_new_tokens` ({config.max_new_tokens})"
        )
    if cut := sum(bool(one.reasoning) and not one.text for one in said):
        say(
            f"evaluate: WARNING: {player.name} came to no answer {cut} of {len(said)} times: reasoning and "
            f"answer have `evaluate.max_new_tokens` ({config.max_new_tokens}) together"
        )
    return Answered(
        [one.text for one in said],
        [Likelihood(*measured) for *measured, _, _ in of_rows],
        {row.id: found.nll for row, found in zip(asked.worse, of_worse, strict=True)},
    )


def _marked(rows: Sequence[Encoded]) -> list[list[int]]:
    """Return the tokens of each row, then how many of them are learned, and a number for each picture."""
    return [[*row.ids, -sum(row.learned), *(-int(name[:15], 16) for name in row.media)] for row in rows]


class _Part(NamedTuple):
    """One forward batch, by places in the list of rows."""

    compute: Callable[[Any, list[int]], list[Any]]
    batch: list[int]
    key: str


def _compute(
    parts: Sequence[_Part], found: list[list[Any] | None], load: AbstractContextManager[Any], known: Answers
) -> None:
    with load as model, quiet():
        model.eval()
        for place, part in enumerate(parts):
            if found[place] is None:
                found[place] = entries = part.compute(model, part.batch)
                known.put(part.key, entries)


def batches(ids: Sequence[list[int]], groups: Sequence[str], size: int) -> Iterator[list[int]]:
    """Yield the positions of the rows in batches of similar lengths within their group.

    The division depends only on the rows of the group.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    for group in sorted(members):
        order = sorted(members[group], key=lambda index: (len(ids[index]), ids[index]))
        for start in range(0, len(order), size):
            yield order[start : start + size]


def _key(settings: Any, ids: list[list[int]]) -> str:
    return sha256(json.dumps([settings, ids]).encode()).hexdigest()


def frame_of(
    rows: list[Example],
    model: str,
    found: Answered,
    config: EvaluateConfig,
    media: Mapping[str, bytes] = MappingProxyType({}),
) -> pd.DataFrame:
    """Make a table with one line per row; a model without likelihoods gets NaN there.

    `media` has the rows' pictures by name.
    """
    likelihoods = found.likelihoods
    columns: dict[str, Any] = {
        "id": [row.id for row in rows],
        "batch": [counted_in(row) for row in rows],
        "kind": [str(row.meta.get("kind", "")) for row in rows],
        "model": [model] * len(rows),
        "question": [row.question for row in rows],
        "reference": [row.answer for row in rows],
        "answer": found.answers,
        "answer_nll": [each.nll / each.tokens for each in likelihoods] or math.nan,
        "answer_tokens": [each.tokens for each in likelihoods] or 0,
        "prompt_nll": [each.prompt_nll / max(1, each.prompt_tokens) for each in likelihoods] or math.nan,
    }
    if PREFERENCE in config.metrics:
        columns["worse_nll"] = [found.worse.get(row.id, math.nan) for row in rows]
    return pd.DataFrame(columns | slice_columns(rows, config, media))


def add_scores(
    table: pd.DataFrame, rows: list[Example], config: EvaluateConfig, custom: dict[str, Custom]
) -> pd.DataFrame:
    """Add one column per metric."""
    pairs = list(zip(table.answer, table.reference, strict=True))
    scores = {
        name: [metric(answer, reference) for answer, reference in pairs]
        for name, metric in row_metrics(config).items()
    }
    of = {row.id: row for row in rows}
    scores |= {
        name: [
            custom_score(name, metric, answer, of[id])
            for answer, id in zip(table.answer, table.id, strict=True)
        ]
        for name, metric in custom.items()
    }
    return table.assign(**scores)
