"""Serve a scripted model that speaks OpenAI's and Anthropic's protocols, for tests of `ratchet synthesize`.

Without a script it answers well: a pair for each sentence of the passage that it is shown, and a score for
the judge. `stub.script["words in the prompt"] = [BUSY, MALFORMED, …]` answers the first requests that hold
these words in that way, later ones well.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

DATA = re.compile(r"<data-[0-9a-f]{12}>\n(.*?)\n</data-[0-9a-f]{12}>", re.DOTALL)


class Act(NamedTuple):
    """What the server does: a status, a text (`None`: the model's own), headers, a wait in seconds."""

    status: int = 200
    text: str | None = None
    around: str = "{}"
    headers: tuple[tuple[str, str], ...] = ()
    wait: float = 0.0
    finish: str = "stop"
    raw: bytes | None = None
    usage: bool = True


GOOD = Act()
MALFORMED = Act(text='{"pairs": [{"question": "What is')
WRONG_SHAPE = Act(text='{"pairs": [{"frage": "?", "antwort": 7}]}')
FENCED = Act(around="Here you are:\n\n```json\n{}\n```\nAnything else?")
THOUGHT = Act(around='<think>maybe {{"pairs": []}}?</think>\n{}')
REFUSES = Act(text="I'm sorry, but I can't help with that.")
FILTERED = Act(text="", finish="content_filter")
CUT = Act(text='{"pairs": [{"question": "What is', finish="length")
BROKEN = Act(status=500, raw=b'{"error": {"message": "out of memory"}}')
BUSY = Act(status=429, headers=(("retry-after", "1"),), raw=b'{"error": {"message": "slow down"}}')
HTML = Act(raw=b"<html>welcome to the proxy</html>")


class TeacherStub:
    """Answer by script; `serving(TeacherStub())` of tests/servers.py runs it.

    `echo` puts the request's key into error texts and answers, as careless servers do.
    """

    def __init__(
        self,
        *,
        answer: Callable[[str], Any] | None = None,
        delay: float = 0.0,
        key: str = "",
        takes_schema: bool = True,
        echo: bool = False,
    ) -> None:
        self.answer = answer or good_answer
        self.delay, self.key, self.takes_schema, self.echo = delay, key, takes_schema, echo
        self.script: dict[str, list[Act]] = {}
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.running = self.most_running = 0

    @property
    def requests(self) -> int:
        return len(self.seen)

    def prompts(self) -> list[str]:
        return [_prompt(body) for body in self.seen]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                event = (await receive())["type"].split(".")[1]
                await send({"type": f"lifespan.{event}.complete"})
                if event == "shutdown":
                    return
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        raw = b""
        while True:
            message = await receive()
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        body = json.loads(raw)
        self.seen.append(body)
        self.headers.append(headers)
        self.paths.append(scope["path"])
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self._answer(scope["path"], body, headers, send)
        finally:
            self.running -= 1

    async def _answer(self, path: str, body: dict[str, Any], headers: dict[str, str], send: Any) -> None:
        given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        if path not in ("/v1/chat/completions", "/v1/messages"):
            return await _send(send, 404, {"error": {"message": f"no page {path}"}})
        if self.key and given != self.key:
            return await _send(send, 401, {"error": {"message": f"Incorrect API key provided: {given}"}})
        if not self.takes_schema and "response_format" in body:
            return await _send(
                send, 400, {"error": {"message": "response_format json_schema is not supported here"}}
            )
        prompt = _prompt(body)
        act = next((acts.pop(0) for words, acts in self.script.items() if acts and words in prompt), GOOD)
        await asyncio.sleep(act.wait or self.delay)
        if act.raw is not None or act.status != 200:
            raw = act.raw or b""
            return await _send(
                send, act.status, raw + f" {given}".encode() if self.echo else raw, act.headers
            )
        text = (
            act.text
            if act.text is not None
            else act.around.replace("{{", "{")
            .replace("}}", "}")
            .replace("{}", json.dumps(self.answer(prompt)), 1)
        )
        text += f" {given}" if self.echo else ""
        await _send(send, 200, (_anthropic if path == "/v1/messages" else _openai)(text, act))


def good_answer(prompt: str) -> dict[str, Any]:
    """As the templates ask for: a score, wordings, a translation, or a pair a sentence."""
    data = DATA.findall(prompt)
    if '"score"' in prompt:
        return {"score": 0.9, "reason": "fine"}
    if '{"text"' in prompt:
        return {"text": f"{data[0].rstrip('?')}, please?"}
    if '{"questions"' in prompt:
        question = data[0].split("\n")[0].removeprefix("Question: ").rstrip("?")
        return {
            "questions": [
                f"{start} {question}{end}"
                for start, end in (
                    ("I would like to know:", "?"),
                    ("Please tell", " in short"),
                    ("Quick one —", " then?"),
                )
            ]
        }
    return {"pairs": [pair_of(sentence) for sentence in sentences(data[0])]}


def sentences(text: str) -> list[str]:
    return [found.strip() for found in re.findall(r"[^.\n]+\.", text) if len(found.split()) > 3]


def pair_of(sentence: str) -> dict[str, str]:
    return {"question": f"Please explain: {sentence.rstrip('.')}?", "answer": sentence}


def _prompt(body: dict[str, Any]) -> str:
    system = body.get("system", "")
    return "\n".join([system, *(_text(message["content"]) for message in body["messages"])])


def _text(content: Any) -> str:
    """Return a message's text, without its pictures."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def pictures_of(body: dict[str, Any]) -> list[bytes]:
    """Return the pictures of a request, in either protocol."""
    parts = [
        part
        for message in body["messages"]
        if isinstance(message["content"], list)
        for part in message["content"]
    ]
    data = [
        part["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
        if part["type"] == "image_url"
        else part["source"]["data"]
        for part in parts
        if part["type"] in ("image_url", "image")
    ]
    return [base64.b64decode(one, validate=True) for one in data]


def _openai(text: str, act: Act) -> dict[str, Any]:
    usage = {"usage": {"prompt_tokens": 300, "completion_tokens": 100}} if act.usage else {}
    return {
        "id": "x",
        "object": "chat.completion",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": act.finish}
        ],
        **usage,
    }


def _anthropic(text: str, act: Act) -> dict[str, Any]:
    reasons = {"stop": "end_turn", "length": "max_tokens", "content_filter": "refusal"}
    content = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": text}]
    return {
        "id": "x",
        "type": "message",
        "role": "assistant",
        "content": content,
        "stop_reason": reasons[act.finish],
        "usage": {"input_tokens": 300, "output_tokens": 100},
    }


async def _send(send: Any, status: int, body: Any, headers: tuple[tuple[str, str], ...] = ()) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(raw)).encode()),
        *((name.encode(), value.encode()) for name, value in headers),
    ]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": raw})
