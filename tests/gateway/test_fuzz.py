"""Requests that hypothesis makes up, to every route of the gateway: no 5xx, no traceback, no stall.

A long run: `RATCHET_FUZZ_EXAMPLES=5000 python -m pytest tests/gateway/test_fuzz.py -n 0 --timeout 0`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patience import scaled
from served import NAME, Gateway, running_gateway

EXAMPLES = int(os.environ.get("RATCHET_FUZZ_EXAMPLES", "60"))
FUZZED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="RATCHET_FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
PAGES = ["/", "/review", "/metrics", "/healthz", "/readyz", "/v1/models"]
PREFIXES = ["/v1/models/", "/v1/chat/completions/", "/v1/responses/", "/evaluations/", "/monitor/reports/a/"]
WORDS = st.text(st.characters(codec="utf-8"), max_size=20)
NUMBERS = st.one_of(
    st.integers(-3, 3), st.integers(), st.floats(), st.sampled_from([2**63, -(2**63), 10**400, 1e308, -0.0])
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
MESSAGE = {"role": "user", "content": "What is hail?"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
TEXT = {"type": "text", "text": "And snow?"}
SCHEMA = {"name": "a", "schema": {"type": "object"}}
# Bodies that are taken, with every field that the route knows, so that one changed field is reached.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": NAME,
        "messages": [
            MESSAGE,
            {"role": "assistant", "content": "Ice."},
            {"role": "user", "content": [TEXT]},
        ],
        "user": "ana",
        "max_tokens": 4,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "seed": 1,
        "stop": ["x"],
        "stream": False,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 2,
        "response_format": {"type": "json_schema", "json_schema": SCHEMA},
        "tools": [TOOL],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "metadata": {"a": "b"},
        "reasoning_effort": "none",
    },
    "/v1/responses": {
        "model": NAME,
        "input": [MESSAGE],
        "instructions": "Be brief.",
        "max_output_tokens": 16,
        "temperature": 0.5,
        "top_logprobs": 1,
        "include": ["message.output_text.logprobs"],
        "text": {"format": {"type": "text"}},
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}],
        "tool_choice": "auto",
        "user": "ana",
        "stream": False,
    },
    "/v1/feedback": {
        "request_id": "chatcmpl-x",
        "user": "ana",
        "score": 0.5,
        "label": "a",
        "answer": "b",
        "comment": "c",
    },
    "/review": {"action": "next", "draft": None, "item": "i", "of": "o", "answer": "a", "by": "Ana"},
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    root: Path = tmp_path_factory.mktemp("fuzzed")
    with running_gateway(root, gateway={"timeout": scaled(5), "max_tokens": 16}) as running:
        yield running


@st.composite
def changed(draw: st.DrawFn, route: str) -> bytes:
    """A body that is taken but for some fields: left out, added, or another value at any depth."""
    body = json.loads(json.dumps(BODIES[route]))
    body = {key: body[key] for key in draw(st.sets(st.sampled_from(sorted(body)))) | set(list(body)[:2])}
    for _ in range(draw(st.integers(0, 3))):
        place: Any = body
        while True:
            keys = list(range(len(place))) if isinstance(place, list) else sorted(place)
            key = draw(st.sampled_from(keys)) if keys else None
            if key is None or not isinstance(place[key], dict | list) or draw(st.booleans()):
                break
            place = place[key]
        if key is not None:
            place[key] = draw(VALUES)
        elif isinstance(place, dict):
            place[draw(WORDS)] = draw(VALUES)
    return json.dumps(body).encode("utf-8", "surrogatepass")


def check(gateway: Gateway, answer: httpx.Response, caplog: pytest.LogCaptureFixture) -> None:
    assert answer.status_code < 500, (answer.status_code, answer.text[:500])
    assert "Traceback" not in answer.text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["message"] and set(error) == {"message", "type", "param", "code"}
    assert not [record for record in caplog.records if record.exc_info], caplog.text
    assert gateway.get("/healthz").status_code == 200


@pytest.mark.parametrize("route", list(BODIES))
def test_no_body_with_changed_fields_breaks_a_route(
    gateway: Gateway, route: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    taken: set[int] = set()

    @FUZZED
    @given(changed(route))
    def ask(body: bytes) -> None:
        answer = gateway.http.post(route, content=body, headers={"content-type": "application/json"})
        taken.add(answer.status_code)
        check(gateway, answer, caplog)

    ask()
    assert {400} < taken, f"the bodies reach only {taken}"


@pytest.mark.parametrize("route", list(BODIES))
def test_no_bytes_break_a_route(gateway: Gateway, route: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    nested = st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b'"\\ud800\\ud800"', b"1e999", b"NaN"])

    @FUZZED
    @given(st.one_of(st.binary(max_size=200), VALUES.map(lambda value: json.dumps(value).encode()), nested))
    def ask(body: bytes) -> None:
        answer = gateway.http.post(route, content=body, headers={"content-type": "application/json"})
        check(gateway, answer, caplog)

    ask()


def test_no_path_query_header_or_method_breaks_a_route(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    """As bytes on a socket, since a client would make them tidy first."""
    caplog.set_level(logging.WARNING)
    inside = st.text(st.sampled_from([*map(chr, range(33, 127)), "ä", "%", "/", "."]), max_size=30)
    names = st.sampled_from(["authorization", "x-session-id", "content-type", "expect", "upgrade", "range"])
    values = st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=40)
    paths = st.one_of(st.sampled_from(PAGES), st.tuples(st.sampled_from(PREFIXES), inside).map("".join))
    methods = st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "gét"])
    address = urlsplit(gateway.url)

    @FUZZED
    @given(methods, paths, inside, st.dictionaries(names, values, max_size=3))
    def ask(method: str, path: str, query: str, headers: dict[str, str]) -> None:
        lines = [f"{method} {path}?{query} HTTP/1.1", f"host: {address.netloc}", "connection: close"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        with socket.create_connection((address.hostname, address.port), timeout=scaled(10)) as one:
            one.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
            answer = b"".join(iter(lambda: one.recv(65_536), b""))
        status = int(answer.split(b" ", 2)[1]) if answer else 0
        assert 200 <= status < 500, (lines, answer[:500])
        assert b"Traceback" not in answer
        assert not [record for record in caplog.records if record.exc_info], caplog.text

    ask()
