"""Versions change under load: 50 requests a second, half of them streams, 20 swaps and a rollback.

No request fails, no answer is of two versions.
"""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import NamedTuple

import aiohttp
from served import put_in_charge, running_gateway, wait_until_served

SWAPS, A_SECOND = 20, 50
WORDS = 6


class Seen(NamedTuple):
    status: int
    header: str
    fingerprints: frozenset[str]
    words: frozenset[str]
    count: int
    last: bool  # it came to its end


def test_swaps_and_a_rollback_under_load_fail_nobody_and_mix_nothing(tmp_path: Path):
    done = threading.Event()
    with running_gateway(tmp_path) as gateway:
        swapping = threading.Thread(target=swap, args=(tmp_path, done))
        swapping.start()
        seen = asyncio.run(load(gateway.url, done))
        swapping.join()
        logged = gateway.logged()

    assert len(seen) > 200 and {(one.status, one.count, one.last) for one in seen} == {(200, WORDS, True)}
    assert all(one.words == one.fingerprints == {f"pydoc@v{one.header}"} for one in seen), (
        "an answer of two versions"
    )
    assert {int(one.header) for one in seen} == set(range(1, SWAPS + 2)), "every version answered"
    assert seen[-1].header == str(SWAPS), "rolled back to the one before"
    assert {entry.status for entry in logged} == {200} and len(logged) == len(seen)
    assert set(gateway.stub.loaded) <= {f"pydoc@v{version}" for version in range(1, SWAPS + 2)}


def swap(root: Path, done: threading.Event) -> None:
    try:
        for version in range(2, SWAPS + 2):
            put_in_charge(root, version, previous=version - 1)
            wait_until_served(root, champion=version)
        put_in_charge(root, SWAPS, previous=SWAPS - 1)
        wait_until_served(root, champion=SWAPS)
    finally:
        done.set()


async def load(url: str, done: threading.Event) -> list[Seen]:
    """Open loop: a slow answer holds back no later request. In the order in which they were asked."""
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:
        asked: list[asyncio.Task[Seen]] = []
        while not done.is_set():
            asked.append(asyncio.create_task(ask(session, len(asked))))
            await asyncio.sleep(1 / A_SECOND)
        await asyncio.sleep(0.1)
        asked += [asyncio.create_task(ask(session, len(asked)))]
        return await asyncio.gather(*asked)


async def ask(session: aiohttp.ClientSession, number: int) -> Seen:
    """0.3 s for an answer, so that swaps fall into the middle of it."""
    stream = number % 2 == 0
    body = {
        "model": "pydoc",
        "user": f"u{number}",
        "stream": stream,
        "messages": [{"role": "user", "content": f"wait:0.3 words:{WORDS}"}],
    }
    async with session.post("/v1/chat/completions", json=body) as answered:
        text, header = await answered.text(), answered.headers.get("x-ratchet-version", "")
    if answered.status != 200:
        return Seen(answered.status, header, frozenset(), frozenset({text}), 0, False)
    if not stream:
        chat = json.loads(text)
        words = chat["choices"][0]["message"]["content"].split()
        return Seen(200, header, frozenset({chat["system_fingerprint"]}), frozenset(words), len(words), True)
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    chunks = [json.loads(event) for event in events[:-1]]
    words = "".join(
        chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if "choices" in chunk
    ).split()
    return Seen(
        200,
        header,
        frozenset(chunk["system_fingerprint"] for chunk in chunks),
        frozenset(words),
        len(words),
        events[-1] == "[DONE]",
    )
