"""Send requests in parallel and process the answers in order, so that timing does not change the kept rows.

At most `parallel` requests are in flight or wait to be processed. Each answer is stored in the draft before
it is used.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

from ratchet.config.params import Config
from ratchet.data.examples import MEDIA_MARK, Example, Meta
from ratchet.evaluation.metrics import token_f1
from ratchet.llm.client import AskError, Said, Teacher
from ratchet.llm.prompts import Prompt, Template
from ratchet.llm.replies import Pair, Score, Text, read_reply
from ratchet.llm.servers import width_of
from ratchet.synthesis.augment import Synonyms, vary
from ratchet.synthesis.draft import Answered, Draft, Refused, Row, key_of
from ratchet.synthesis.filters import Filters
from ratchet.synthesis.requests import Ask

Say = Callable[[str], None]
MOST_FAILURES = 5  # failed requests in a row after which the run ends
EVERY = 20  # requests between two lines of progress
SURPLUS = 2  # times the requested number of pairs, beyond which pairs are refused unread
AGREES = 0.5  # word F1 with the champion's answer below which the row gets a doubt
SEEN = 120  # characters of an answer that a doubt quotes


class Helpers(NamedTuple):
    """Further models and templates to use; None: not used. `champion` is the gateway."""

    judge: Teacher | None = None
    judging: Template | None = None
    champion: Teacher | None = None
    translating: Template | None = None
    synonyms: Synonyms | None = None


class GaveUp(Exception):
    """Too many requests in a row failed; the rows so far are kept."""


class Writer:
    """Fills a draft with rows; `provenance` is added to each row's meta."""

    def __init__(
        self,
        config: Config,
        draft: Draft,
        teacher: Teacher,
        filters: Filters,
        helpers: Helpers,
        *,
        provenance: Meta,
        say: Say,
    ) -> None:
        self._config, self._draft, self._teacher, self._filters, self._helpers = (
            config,
            draft,
            teacher,
            filters,
            helpers,
        )
        self._provenance, self._say = provenance, say
        self.asked, self.recalled, self.answered = 0, 0, 0
        self.failures = Counter[str]()
        self.written: dict[str, list[str]] = {}  # id of a chunk or row → questions written about it
        self.last_failure = ""
        self._in_a_row = 0

    @property
    def full(self) -> bool:
        return self._draft.kept >= self._draft.settings.count

    async def take(self, asks: Iterable[Ask], seed: int) -> None:
        """Send requests and keep the rows that pass, until the draft is full or no request is left.

        Raises SpentError, GaveUp, ConfigError, ServiceError (see ratchet/llm/client.py).
        """
        source, window = iter(asks), deque[tuple[Ask, asyncio.Task[Answered | AskError]]]()
        try:
            while not self.full:
                while len(window) < self._width() and (ask := next(source, None)) is not None:
                    window.append((ask, asyncio.create_task(self._answer(ask, seed))))
                if not window:
                    return
                ask, answering = window.popleft()
                await self._sift(ask, await answering, seed)
        except asyncio.CancelledError:
            for _, answering in window:
                answering.cancel()
            raise
        finally:
            await asyncio.gather(
                *(answering for _, answering in window), return_exceptions=True
            )  # requests in flight are paid for, so their answers are stored

    def _width(self) -> int:
        """Return how many requests may be in flight: not more than the missing rows need."""
        missing = self._draft.settings.count - self._draft.kept
        return min(
            width_of(self._config.synthesize.teacher), -(-missing // self._config.synthesize.per_chunk)
        )

    async def _answer(self, ask: Ask, seed: int) -> Answered | AskError:
        try:
            return await self._once(
                self._teacher,
                ask.prompt.version,
                ask.about,
                seed,
                lambda: self._teacher.ask(ask.prompt, ask.shape, seed=seed),
            )
        except AskError as error:
            return error

    async def _once(
        self, teacher: Teacher, version: str, about: str, seed: int, ask: Callable[[], Awaitable[Said]]
    ) -> Answered:
        """Return the answer from the draft, or ask for it and store it there."""
        key = key_of(prompt=version, model=teacher.model, about=about, seed=seed)
        if known := self._draft.recall(key):
            self.recalled += 1
            return known
        said = await ask()
        self.asked += 1
        answered = Answered(
            key, version, teacher.model, about, said.raw, said.usage, said.failure, said.fault
        )
        self._draft.remember(answered)
        return answered

    async def _sift(self, ask: Ask, answered: Answered | AskError, seed: int) -> None:
        if isinstance(answered, AskError):
            self.failures[answered.reason] += 1
            self._in_a_row, self.last_failure = self._in_a_row + 1, str(answered)
            if self._in_a_row >= MOST_FAILURES:
                raise GaveUp(f"{self._in_a_row} requests in a row failed, the last one: {answered}")
            return
        self._in_a_row = 0
        self.answered += 1
        if answered.failure:
            self.failures[answered.failure] += 1
        else:
            await self._keep_pairs(ask, ask.read(answered.raw), seed)
        if self.answered % EVERY == 0:
            self._say(
                f"{self.answered} answers: {self._draft.kept} rows kept, "
                f"{self._draft.refused.total()} refused"
            )

    async def _keep_pairs(self, ask: Ask, pairs: list[Pair], seed: int) -> None:
        meta = {**self._provenance, "prompt_version": ask.prompt.version, **ask.meta}
        passed: list[Row] = []
        most = SURPLUS * self._config.synthesize.per_chunk
        for pair in pairs[most:]:
            self._draft.refuse(
                Refused(
                    "surplus",
                    f"{len(pairs)} pairs came, {most} are looked at",
                    pair.question,
                    pair.answer,
                    meta,
                )
            )
        for pair in pairs[:most]:
            if self._draft.kept + len(passed) >= self._draft.settings.count:
                break
            self.written.setdefault(ask.about, []).append(pair.question)
            if row := self._pass(pair, ask, meta):
                passed.append(row)
        for row in await asyncio.gather(*(self._weigh(row, ask, seed) for row in passed)):
            if not self.full:
                self._draft.keep(row)
            for variant in await self._vary(row, ask, seed) if not self.full else []:
                if not self.full:
                    self._draft.keep(variant)

    def _pass(
        self, pair: Pair, ask: Ask, meta: Meta, *, of: Example | None = None, doubts: tuple[str, ...] = ()
    ) -> Row | None:
        """Return a row if the pair passes the filters; otherwise record a refusal and return None.

        `of` is the row of this run that the pair rewords.
        """
        parent, question = (of.id, of.question) if of else (ask.parent, ask.question)
        verdict = self._filters.judge(
            pair,
            ask.passage,
            meta,
            parent=parent,
            question=question.replace(MEDIA_MARK, ""),
            system=ask.system,
            media=ask.media,
        )
        if verdict.example is None:
            self._draft.refuse(Refused(verdict.reason, verdict.detail, pair.question, pair.answer, meta))
            return None
        return Row(verdict.example, ask.passage, (*verdict.doubts, *doubts))

    # --- doubts ---------------------------------------------------------------------------------------------

    async def _weigh(self, row: Row, ask: Ask, seed: int) -> Row:
        """Return the row with the judge's score, and with the doubts that judge and champion raise."""
        (score, doubts), others = await asyncio.gather(
            self._score(row, ask, seed), self._compare(row, ask, seed)
        )
        meta: Meta = dict(row.example.meta)
        if score is not None:
            meta |= {"judge": self._config.synthesize.judge.model, "judge_score": round(score, 3)}
        alone = not ask.passage and not ask.answer and (score is None or bool(doubts))
        unfounded = (
            ("neither a passage nor a known answer stands behind it, the teacher alone",) if alone else ()
        )
        return Row(
            Example(row.example.id, row.example.messages, meta),
            row.passage,
            (*row.doubts, *unfounded, *doubts, *others),
        )

    async def _score(self, row: Row, ask: Ask, seed: int) -> tuple[float | None, tuple[str, ...]]:
        judge, template = self._helpers.judge, self._helpers.judging
        if judge is None or template is None:
            return None, ()
        prompt = template.render(
            question=_asked(row), answer=row.example.answer, passage=row.passage
        ).showing(ask.prompt.pictures)
        try:
            answered = await self._once(
                judge, prompt.version, row.example.id, seed, lambda: judge.ask(prompt, Score, seed=seed)
            )
        except AskError as error:
            return None, (f"the judge gave no answer: {error.reason}",)
        if answered.failure:
            return None, (f"the judge gave no score: {answered.failure}",)
        found = read_reply(answered.raw, Score)
        if not 0 <= found.score <= 1:
            return None, (f"the judge's score is {found.score:g}, wanted 0 to 1",)
        least = self._config.synthesize.judge.min_score
        return found.score, (
            f"the judge scores it {found.score:.2f}, under {least:g}: {found.reason[:SEEN]}",
        ) if found.score < least else ()

    async def _compare(self, row: Row, ask: Ask, seed: int) -> tuple[str, ...]:
        champion = self._helpers.champion
        if champion is None:
            return ()
        system = row.example.messages[0].content if row.example.messages[0].role == "system" else ""
        prompt = Prompt("champion", system, _asked(row), ask.prompt.pictures)
        try:
            answered = await self._once(
                champion, prompt.version, row.example.id, seed, lambda: champion.say(prompt, seed=seed)
            )
        except AskError as error:
            return (f"the model in charge gave no answer: {error.reason}",)
        if token_f1(answered.raw, row.example.answer) >= AGREES:
            return ()
        return (f"the model in charge answers differently: {' '.join(answered.raw.split())[:SEEN]!r}",)

    # --- other wordings -------------------------------------------------------------------------------------

    async def _vary(self, row: Row, ask: Ask, seed: int) -> list[Row]:
        settings, question = self._config.synthesize.augment, _asked(row)
        draw = random.Random(f"{seed} {row.example.id}")  # noqa: S311 (no secret)
        found = list(vary(question, settings, self._helpers.synonyms or {}, draw))
        if back := await self._translate(row, seed):
            found.append(("back translation", back))
        rows = []
        for kind, text in found:
            meta: Meta = {**row.example.meta, "augmented": kind, "augmented_from": row.example.id}
            doubts = (*row.doubts, f"its question was worded anew by {kind}")
            if variant := self._pass(
                Pair(text, row.example.answer), ask, meta, of=row.example, doubts=doubts
            ):
                rows.append(variant)
        return rows

    async def _translate(self, row: Row, seed: int) -> str:
        template, language = self._helpers.translating, self._config.synthesize.augment.back_translate
        if template is None or not language:
            return ""
        prompt = template.render(text=_asked(row), language=language)
        try:
            answered = await self._once(
                self._teacher,
                prompt.version,
                f"{row.example.id} {language}",
                seed,
                lambda: self._teacher.ask(prompt, Text, seed=seed),
            )
        except AskError as error:
            self.failures[error.reason] += 1
            return ""
        if answered.failure:
            self.failures[answered.failure] += 1
            return ""
        return read_reply(answered.raw, Text).text.strip()


def _asked(row: Row) -> str:
    """Return the question without the places of its pictures."""
    return row.example.question.replace(MEDIA_MARK, "").strip()
