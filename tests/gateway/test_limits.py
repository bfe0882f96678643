"""Limits by themselves: rates, slots, bodies that trickle in, patience that ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ratchet.gateway import limits
from ratchet.gateway.limits import Gone, Rate, Slots, patience, read_body
from ratchet.serving.faults import Fault


def test_a_rate_fills_steadily_and_each_name_has_its_own():
    now = 0.0
    rate = Rate(60, clock=lambda: now)
    for _ in range(60):
        rate.take("a")
    with pytest.raises(Fault, match="over 60 requests in a minute") as refused:
        rate.take("a")
    assert refused.value.status == 429 and refused.value.retry_after == 1
    rate.take("b")

    now = 1.0
    rate.take("a")
    with pytest.raises(Fault):
        rate.take("a")


def test_no_rate_is_no_limit():
    for _ in range(1000):
        Rate(0).take("a")


def test_a_slot_comes_back_whatever_happens():
    slots = Slots(1)
    with pytest.raises(KeyError), slots.hold():
        with pytest.raises(Fault, match="1 requests are under way"), slots.hold():
            pass
        raise KeyError
    with slots.hold():
        assert slots.held == 1
    assert slots.held == 0


def receive_of(*messages: dict[str, Any]) -> Any:
    """What it has, then nothing for ever."""
    left = list(messages)

    async def receive() -> dict[str, Any]:
        if left:
            return left.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    return receive


def part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_is_joined_and_a_large_one_refused():
    assert asyncio.run(read_body(receive_of(part(b"ab", True), part(b"c")), "", 3)) == b"abc"
    for receive, declared in ((receive_of(part(b"ab", True), part(b"cd")), ""), (receive_of(), "4")):
        with pytest.raises(Fault, match="wanted at most 3") as refused:
            asyncio.run(read_body(receive, declared, 3))
        assert refused.value.status == 413


def test_a_body_that_never_ends_is_408(monkeypatch):
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.05)
    with pytest.raises(Fault, match="2 bytes did") as refused:
        asyncio.run(read_body(receive_of(part(b"ab", True)), "", 3))
    assert refused.value.status == 408 and (b"connection", b"close") in refused.value.headers()


def test_a_client_that_hangs_up_within_its_body_is_gone():
    with pytest.raises(Gone):
        asyncio.run(read_body(receive_of(part(b"ab", True), {"type": "http.disconnect"}), "", 3))


async def wait_under(receive: Any, seconds: float, work: float) -> str:
    async with patience(receive, seconds):
        await asyncio.sleep(work)
    return "done"


def test_patience_ends_with_the_time_or_with_the_client():
    assert asyncio.run(wait_under(receive_of(), 5, 0)) == "done"
    with pytest.raises(Fault, match=r"over 0\.05 s"):
        asyncio.run(wait_under(receive_of(), 0.05, 5))
    with pytest.raises(Gone):
        asyncio.run(wait_under(receive_of({"type": "http.disconnect"}), 5, 5))


def test_a_timeout_of_the_work_itself_passes_through():
    async def work() -> None:
        async with patience(receive_of(), 5):
            raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        asyncio.run(work())
