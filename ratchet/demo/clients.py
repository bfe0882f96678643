"""Ask the gateway questions with known answers, and give feedback: 1 for an exact match, else 0.

So the traffic and the rollout of the demo are based on real answers. Clients who show a picture also correct
a wrong answer.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx

from ratchet.errors import ServiceError
from ratchet.evaluation.metrics import exact_match

READY_SECONDS = 120.0


class Question(NamedTuple):
    text: str
    answer: str
    kind: str  # what it is about, as the table names it
    picture: bytes = b""  # a PNG, if it shows one


class Reply(NamedTuple):
    """The result of a question; `version` is 0 and `right` False if the request failed."""

    kind: str
    version: int
    right: bool
    fault: str
    milliseconds: float


def ask_gateway(
    url: str, model: str, questions: list[Question], *, users: list[str], parallel: int, key: str = ""
) -> list[Reply]:
    """Ask each question as the user at the same place in `users`; the replies have the same order.

    Raises ServiceError if no gateway with a version answers at `url`.
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(
        base_url=url,
        headers=headers,
        timeout=120,
        trust_env=False,
        limits=httpx.Limits(max_connections=parallel),
    ) as client:
        _wait_until_ready(client, url)
        with ThreadPoolExecutor(parallel) as pool:
            return list(pool.map(lambda pair: _ask(client, model, *pair), zip(questions, users, strict=True)))


def _wait_until_ready(client: httpx.Client, url: str) -> None:
    """Wait until the gateway is ready: a version that was just promoted is still being loaded."""
    said, end = "", time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        try:
            answered = client.get("/readyz")
        except httpx.HTTPError as error:
            raise ServiceError(
                f"nothing answers at {url}: {error}", remedy="ratchet up, or ratchet serve"
            ) from None
        if answered.is_success:
            return
        said = answered.text[:300]
        time.sleep(0.3)
    raise ServiceError(
        f"the gateway at {url} has no version to answer with: {said}",
        remedy="ratchet status, and .ratchet/logs/gateway.log, say why",
    )


def _ask(client: httpx.Client, model: str, question: Question, user: str) -> Reply:
    started = time.perf_counter()
    body = {"model": model, "user": user, "messages": [{"role": "user", "content": _content(question)}]}
    try:
        answered = client.post("/v1/chat/completions", json=body)
        took = (time.perf_counter() - started) * 1000
        if answered.status_code != httpx.codes.OK:
            return Reply(question.kind, 0, False, f"{answered.status_code}: {answered.text[:200]}", took)
        right = exact_match(answered.json()["choices"][0]["message"]["content"], question.answer) == 1.0
        feedback = {"request_id": answered.headers["x-request-id"], "user": user, "score": float(right)}
        if question.picture and not right:
            feedback["answer"] = question.answer
        said = client.post("/v1/feedback", json=feedback)
    except httpx.HTTPError as error:
        return Reply(
            question.kind,
            0,
            False,
            f"{type(error).__name__}: {error}",
            (time.perf_counter() - started) * 1000,
        )
    fault = "" if said.is_success else f"feedback {said.status_code}: {said.text[:200]}"
    return Reply(question.kind, int(answered.headers["x-ratchet-version"]), right, fault, took)


def _content(question: Question) -> str | list[dict[str, Any]]:
    """Return the content of the user's message: OpenAI's parts where there is a picture."""
    if not question.picture:
        return question.text
    url = f"data:image/png;base64,{base64.b64encode(question.picture).decode()}"
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.text}]


class Score(NamedTuple):
    version: int
    kind: str
    asked: int
    right: int


def summarise(replies: list[Reply]) -> Iterator[Score]:
    """Count the right answers for each version and kind."""
    for version in sorted({reply.version for reply in replies}):
        for kind in sorted({reply.kind for reply in replies if reply.version == version}):
            found = [reply for reply in replies if (reply.version, reply.kind) == (version, kind)]
            yield Score(version, kind, len(found), sum(reply.right for reply in found))
