"""Several servers of one model: a dead and a slow one change no row, and delay nothing."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from patience import scaled
from servers import serving
from teacher_stub import BROKEN, BUSY, Act, TeacherStub, good_answer, pair_of

from ratchet.audits.judge_client import ask_all, ask_correctness
from ratchet.config.evaluation import AnswerJudge
from ratchet.config.params import Config, parse_config
from ratchet.config.synthesis import TeacherConfig
from ratchet.errors import ConfigError
from ratchet.llm.budget import Budget
from ratchet.llm.client import AskError, Teacher
from ratchet.llm.prompts import Prompt, fence
from ratchet.llm.replies import Pairs
from ratchet.synthesis.draft import find_draft, read_rows
from tasks.synthesize import Wanted, synthesize

NOWHERE = "http://127.0.0.1:1/v1"
CHUNKS = 24
# A server that ends without a word while it answers its sixth request.
DYING = """
import os, sys, threading, uvicorn
sys.path.insert(0, sys.argv[1])
from servers import serving
from teacher_stub import TeacherStub
class Dying(TeacherStub):
    async def _answer(self, *arguments):
        if self.requests > 5:
            os._exit(9)
        await super()._answer(*arguments)
with serving(Dying()) as url:
    print(url, flush=True)
    threading.Event().wait()
"""


class Slow(TeacherStub):
    """Answers after half a minute; `answered` counts how often that came to its end."""

    answered = 0

    async def _answer(self, *arguments) -> None:
        await asyncio.sleep(scaled(30))
        await super()._answer(*arguments)
        self.answered += 1


@contextmanager
def dying() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    program = [sys.executable, "-c", DYING, str(Path(__file__).parents[1])]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip() + "/v1", process
        finally:
            process.kill()


def settings(*urls: str, **teacher) -> Config:
    first, *more = urls
    given = {"url": first, "more_urls": more, "model": "big", "licence": "own", "tries": 2}
    given |= {"timeout": scaled(60), "parallel": 2, **teacher}
    raw = {"synthesize": {"teacher": given, "per_chunk": 2, "chunk_chars": 200, "overlap_chars": 0}}
    return parse_config(raw, Path("params.yaml"))


def write_documents(root: Path) -> None:
    (root / "docs").mkdir(parents=True)
    for number in range(CHUNKS):
        text = " ".join(f"word{number}x{place}" for place in range(8))
        (root / "docs" / f"{number:02}.txt").write_text(f"Clause {number} covers {text}.\n")


def written(root: Path, config: Config) -> tuple[list[tuple[str, str, object]], dict[str, int]]:
    """Write rows about the documents; return them in their order, and the failures."""
    found = synthesize(config, root, Wanted(documents=("docs",), count=1000), say=print, backoff=0.05)
    rows = read_rows(find_draft(root, found.draft))
    kept = [(row.example.question, row.example.answer, row.example.meta["chunk"]) for row in rows]
    assert len(kept) == found.kept == CHUNKS
    return kept, found.failures


def test_a_server_that_dies_and_a_slow_one_change_no_row_and_no_order(tmp_path):
    one, three = tmp_path / "one", tmp_path / "three"
    write_documents(one)
    write_documents(three)
    with serving(TeacherStub()) as url:
        expected, _ = written(one, settings(f"{url}/v1"))
    good, slow = TeacherStub(), Slow()

    with serving(good) as url, serving(slow, drain_seconds=1) as late, dying() as (dead, process):
        kept, failures = written(three, settings(dead, f"{late}/v1", f"{url}/v1"))
        assert process.wait(timeout=scaled(20)) == 9

    assert kept == expected
    assert failures == {}
    assert slow.requests > 0
    assert slow.answered == 0
    assert good.requests >= CHUNKS - 6


def test_a_judge_scores_by_several_servers_in_the_order_of_the_questions(tmp_path):
    def score(prompt: str) -> dict[str, object]:
        return {"score": int(prompt.split("number ")[1].split()[0]) / 100, "reason": ""}

    asks = [ask_correctness(f"What is number {number} ?", "yes", "yes") for number in range(20)]
    good, other = TeacherStub(answer=score), TeacherStub(answer=score, delay=0.02)
    with serving(good) as url, serving(other) as more:
        config = AnswerJudge(
            url=NOWHERE,
            more_urls=[f"{url}/v1", f"{more}/v1"],
            model="big",
            tries=2,
            parallel=2,
            max_tokens=64,
        )
        replies = ask_all(asks, config, tmp_path, backoff=0.05)
        again = ask_all(asks, config, tmp_path, backoff=0.05)

    assert replies.scores == [number / 100 for number in range(20)]
    assert replies.failures == {}
    assert good.requests > 0 and other.requests > 0
    assert good.requests + other.requests == 20
    assert (again.scores, again.asked) == (replies.scores, 0)


def ask(*urls: str, times: int = 1, **teacher) -> list[object]:
    async def run() -> list[object]:
        config = TeacherConfig(**settings(*urls, **teacher).synthesize.teacher.model_dump())
        client = Teacher(config, Budget(max_cost=1e9, max_tokens=10**12), backoff=0.01)
        prompt = Prompt("p@1", "You write pairs.", fence("Hail damage is covered from 10 mm on."))
        try:
            asking = (client.ask(prompt, Pairs, seed=number) for number in range(times))
            return list(await asyncio.gather(*asking, return_exceptions=True))
        finally:
            await client.close()

    return asyncio.run(run())


def test_a_failure_elsewhere_costs_no_try():
    broken, good = TeacherStub(), TeacherStub()
    broken.script = {"Hail": [BROKEN] * 99}
    with serving(broken) as bad, serving(good) as url:
        (said,) = ask(f"{bad}/v1", f"{url}/v1", tries=1)

    assert not isinstance(said, Exception)
    assert (broken.requests, good.requests) == (1, 1)


def test_a_busy_server_is_left_alone_as_long_as_it_asks():
    busy, good = TeacherStub(), TeacherStub()
    busy.script = {"Hail": [BUSY, *[Act(status=500)] * 99]}
    with serving(busy) as bad, serving(good) as url:
        said = ask(f"{bad}/v1", f"{url}/v1", times=8, parallel=1)

    assert [one for one in said if isinstance(one, Exception)] == []
    assert busy.requests <= 2
    assert good.requests == 8


def test_when_all_servers_fail_a_request_fails_after_its_tries():
    stubs = [TeacherStub(), TeacherStub()]
    for stub in stubs:
        stub.script = {"Hail": [BROKEN] * 99}
    with serving(stubs[0]) as one, serving(stubs[1]) as other:
        (said,) = ask(f"{one}/v1", f"{other}/v1", tries=3)

    assert isinstance(said, AskError)
    assert said.reason == "endpoint_error"
    assert [stub.requests for stub in stubs] == [2, 2]  # each at once, then the one that rested longer


def test_load_is_spread_over_the_servers():
    stubs = [TeacherStub(answer=good_answer, delay=0.05) for _ in range(3)]
    with serving(stubs[0]) as one, serving(stubs[1]) as two, serving(stubs[2]) as three:
        said = ask(f"{one}/v1", f"{two}/v1", f"{three}/v1", times=18, parallel=2)

    assert all(pair_of("Hail damage is covered from 10 mm on.")["answer"] in one.raw for one in said)
    assert sum(stub.requests for stub in stubs) == 18
    assert all(stub.requests >= 3 and stub.most_running <= 2 for stub in stubs)


@pytest.mark.parametrize("url", ["", "ftp://host/v1", "http://user:word@host/v1"])
def test_an_address_that_is_none_is_named(url):
    with pytest.raises(ConfigError, match=r"synthesize\.teacher\.more_urls"):
        ask("http://127.0.0.1:1/v1", url)
