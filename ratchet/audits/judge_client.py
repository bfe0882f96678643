"""Ask a judge about answers and remember its replies, so that the same question costs nothing again.

Replies are kept in `.ratchet/judge.db` under a hash of judge and prompt. Quoted text stands between marks
that hold its hash (ratchet/llm/prompts.py), so an answer that asks for a good score stays data.
"""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from collections import Counter
from collections.abc import Coroutine, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from ratchet.config.evaluation import JudgeConfig
from ratchet.errors import ServiceError
from ratchet.llm.budget import Budget, SpentError
from ratchet.llm.client import AskError, Teacher
from ratchet.llm.prompts import Prompt, load_template
from ratchet.llm.replies import Malformed, Score, read_reply
from ratchet.llm.servers import width_of

FILE = Path(".ratchet/judge.db")
MOST_FAILURES = 5  # failed requests in a row, after which no more are sent
SEED = 0


class Choice(msgspec.Struct, frozen=True):
    better: Literal["first", "second", "equal"]
    reason: str = ""


class Ask(NamedTuple):
    prompt: Prompt
    shape: type[Score] | type[Choice]


class Replies(NamedTuple):
    """One score from 0 to 1 per ask; a choice of the first answer is 1, no usable reply is None.

    `failures` counts asks without a score by reason; `asked` counts the requests that were sent.
    """

    scores: list[float | None]
    failures: dict[str, int]
    asked: int


def ask_correctness(question: str, answer: str, reference: str) -> Ask:
    return Ask(
        load_template("judge_correctness", None).render(
            question=question, answer=answer, reference=reference
        ),
        Score,
    )


def ask_groundedness(question: str, answer: str, passage: str) -> Ask:
    return Ask(
        load_template("judge_groundedness", None).render(question=question, answer=answer, passage=passage),
        Score,
    )


def ask_preference(question: str, one: str, other: str, reference: str) -> list[Ask]:
    """Ask in both orders: judges prefer what stands first (Zheng et al. 2023, arXiv 2306.05685)."""
    template = load_template("judge_preference", None)
    return [
        Ask(template.render(question=question, first=first, second=second, reference=reference), Choice)
        for first, second in ((one, other), (other, one))
    ]


def prompt_version(metric: str) -> str:
    return load_template(f"judge_{metric}", None).version


def ask_all(asks: Sequence[Ask], config: JudgeConfig, home: Path, *, backoff: float = 1.0) -> Replies:
    """Return the replies in the order of `asks`, None where one failed.

    Raises ConfigError and ServiceError where no request can succeed: a refused key, a wrong address.
    """
    return asyncio.run(_ask_all(asks, config, home, backoff))


async def _ask_all(asks: Sequence[Ask], config: JudgeConfig, home: Path, backoff: float) -> Replies:
    failures, in_a_row, asked = Counter[str](), 0, 0
    with closing(_Memory(home / FILE)) as memory:
        judge = Teacher(
            config,
            Budget(max_cost=config.max_cost, max_tokens=config.max_run_tokens, section=config.section),
            section=config.section,
            backoff=backoff,
        )

        async def reply(ask: Ask, key: str) -> str | None:
            nonlocal in_a_row, asked
            if (raw := memory.recall(key)) is not None:
                return raw
            async with slots:
                if in_a_row >= MOST_FAILURES:
                    failures["not_tried"] += 1
                    return None
                asked += 1
                try:
                    said = await judge.ask(ask.prompt, ask.shape, seed=SEED)
                except (AskError, SpentError) as error:
                    failures[error.reason if isinstance(error, AskError) else error.limit] += 1
                    in_a_row += 1
                    return None
            in_a_row = 0
            if said.failure:
                failures[said.failure] += 1
                return None
            memory.keep(key, said.raw)
            return said.raw

        slots = asyncio.Semaphore(width_of(config))
        keys = [_key(config, ask) for ask in asks]
        once = dict(zip(keys, asks, strict=True))  # equal answers of two models are one question
        try:
            raws = dict(zip(once, await _gather([reply(ask, key) for key, ask in once.items()]), strict=True))
        finally:
            await judge.close()
    scores = [
        _value(raw, ask.shape) if (raw := raws[key]) is not None else None
        for key, ask in zip(keys, asks, strict=True)
    ]
    failures["out_of_range"] = sum(
        score is None and raws[key] is not None for key, score in zip(keys, scores, strict=True)
    )
    return Replies(scores, {reason: count for reason, count in sorted(failures.items()) if count}, asked)


async def _gather(asking: list[Coroutine[Any, Any, str | None]]) -> list[str | None]:
    """Run all coroutines; the first error cancels the others."""
    tasks = [asyncio.create_task(one) for one in asking]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _value(raw: str, shape: type[Score] | type[Choice]) -> float | None:
    """Return the score of a reply, or None where it cannot be read or is outside 0 to 1."""
    try:
        found = read_reply(raw, shape)
    except Malformed:
        return None
    if isinstance(found, Choice):
        return {"first": 1.0, "second": 0.0, "equal": 0.5}[found.better]
    return found.score if 0 <= found.score <= 1 else None


def _key(config: JudgeConfig, ask: Ask) -> str:
    parts = [
        config.protocol,
        config.url,
        config.model,
        config.temperature,
        ask.prompt.version,
        ask.prompt.system,
        ask.prompt.user,
    ]
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


class _Memory:
    """Replies that are kept in SQLite by key."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # for the owner only: replies may quote people's questions
        try:
            self._file = sqlite3.connect(path, timeout=10)
            self._file.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, raw TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise ServiceError(
                f"{FILE} cannot be used: {error}", remedy="remove the file: it only remembers replies"
            ) from None

    def recall(self, key: str) -> str | None:
        found = self._file.execute("SELECT raw FROM replies WHERE key = ?", (key,)).fetchone()
        return str(found[0]) if found else None

    def keep(self, key: str, raw: str) -> None:
        with self._file:
            self._file.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, raw))

    def close(self) -> None:
        self._file.close()
