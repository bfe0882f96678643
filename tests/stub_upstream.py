"""Serve OpenAI's protocol and vLLM's loading of adapters, for tests and the benchmark.

    python tests/stub_upstream.py PORT

Every word of an answer is the model's name, so that an answer of two versions would show. A prompt that
starts with `fault:` asks for one (see FAULTS); `wait:0.2` answers after 0.2 s, `words:30` with 30 words,
`call:NAME` calls that tool with the word `a`, `think:WORD` reasons with that word. Its only state is the list
of loaded adapters.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import uvicorn

WORDS = 4
FAULTS: dict[str, tuple[int, bytes]] = {
    "busy": (429, b'{"error": {"message": "too many"}}'),
    "broken": (500, b'{"error": {"message": "out of memory"}}'),
    "html": (200, b"<html>welcome to the proxy</html>"),
    "nothing": (200, b'{"choices": []}'),
    "nested": (200, b"[" * 100_000),
    "long": (400, b'{"error": {"message": "maximum context length is 64 tokens"}}'),
}


class Stub:
    """Remember the loaded models; without `models`, one has to be loaded before it answers."""

    def __init__(
        self, *, models: tuple[str, ...] = (), needs_loading: bool = False, delay: float = 0.0
    ) -> None:
        self.loaded: dict[str, str] = dict.fromkeys(models, "")
        self.needs_loading, self.delay = needs_loading, delay
        self.seen: list[dict[str, Any]] = []  # the newest bodies
        self.headers: dict[str, str] = {}
        self.hung_up = 0
        self.running = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        self.headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        body = await _read(receive)
        match scope["path"]:
            case "/v1/chat/completions":
                await self._complete(body, receive, send)
            case "/v1/models":
                await _send(send, 200, {"object": "list", "data": [{"id": name} for name in self.loaded]})
            case "/v1/load_lora_adapter":
                known = body["lora_name"] in self.loaded
                self.loaded[body["lora_name"]] = body["lora_path"]
                await _send(
                    send,
                    400 if known else 200,
                    {"error": {"message": f"The lora adapter '{body['lora_name']}' has already been loaded."}}
                    if known
                    else {},
                )
            case "/v1/unload_lora_adapter":
                self.loaded.pop(body["lora_name"], None)
                await _send(send, 200, {})
            case _:
                await _send(send, 404, {"error": {"message": "no such page"}})

    async def _complete(self, body: dict[str, Any], receive: Any, send: Any) -> None:
        self.seen = [*self.seen[-9:], body]
        model, orders = body["model"], _orders(body["messages"][-1]["content"])
        if self.needs_loading and model not in self.loaded:
            await _send(send, 404, {"error": {"message": f"The model `{model}` does not exist."}})
            return
        if "fault" in orders and orders["fault"] != "cut":
            status, raw = FAULTS[orders["fault"]]
            await _send(send, status, raw)
            return
        if "call" in orders:
            await _call_tool(body, orders["call"], send)
            return
        words = [model] * int(orders.get("words", WORDS))
        self.running += 1
        try:
            answer = self._stream if body.get("stream") else self._whole
            await _until_hangup(answer(body, words, orders, send), receive, self)
        finally:
            self.running -= 1

    async def _whole(self, body: dict[str, Any], words: list[str], orders: dict[str, str], send: Any) -> None:
        await asyncio.sleep(float(orders.get("wait", self.delay)))
        message = {"role": "assistant", "content": " ".join(words)}
        if "think" in orders:
            message["reasoning_content"] = orders["think"]
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        await _send(
            send,
            200,
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [choice],
                "usage": _usage(words),
            },
        )

    async def _stream(
        self, body: dict[str, Any], words: list[str], orders: dict[str, str], send: Any
    ) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/event-stream")],
            }
        )
        head = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": body["model"]}
        if "think" in orders:  # under the name that newer servers have
            delta = {"reasoning": orders["think"]}
            await _event(send, {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        for position, word in enumerate(words):
            await asyncio.sleep(float(orders.get("wait", self.delay)) / len(words))
            text = word if position == 0 else f" {word}"
            await _event(
                send, {**head, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
            )
            if orders.get("fault") == "cut":
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
        await _event(send, {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        await _event(send, {**head, "choices": [], "usage": _usage(words)})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _call_tool(body: dict[str, Any], name: str, send: Any) -> None:
    """Call a tool whole, or in three parts of a stream, as vLLM does."""
    function = {"name": name, "arguments": '{"word": "a"}'}
    if not body.get("stream"):
        message = {"role": "assistant", "content": None}
        message["tool_calls"] = [{"id": "c", "type": "function", "function": function}]
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
        await _send(send, 200, {"choices": [choice], "usage": _usage([name])})
        return
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for part in ({"name": name, "arguments": ""}, {"arguments": '{"word"'}, {"arguments": ': "a"}'}):
        delta = {"tool_calls": [{"index": 0, "function": part}]}
        await _event(send, {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    await _event(send, {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def _orders(prompt: str | list[dict[str, str]]) -> dict[str, str]:
    if isinstance(prompt, list):
        prompt = " ".join(part.get("text", "") for part in prompt)
    return dict(word.split(":", 1) for word in prompt.split() if ":" in word)


def _usage(words: list[str]) -> dict[str, int]:
    return {"prompt_tokens": 7, "completion_tokens": len(words), "total_tokens": 7 + len(words)}


async def _until_hangup(answer: Any, receive: Any, stub: Stub) -> None:
    task, gone = asyncio.ensure_future(answer), asyncio.ensure_future(receive())
    await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        stub.hung_up += 1
        task.cancel()
    gone.cancel()
    await asyncio.gather(task, gone, return_exceptions=True)


async def _read(receive: Any) -> Any:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return json.loads(body) if body else {}


async def _event(send: Any, chunk: dict[str, Any]) -> None:
    await send(
        {
            "type": "http.response.body",
            "body": b"data: " + json.dumps(chunk).encode() + b"\n\n",
            "more_body": True,
        }
    )


async def _send(send: Any, status: int, body: Any) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())],
        }
    )
    await send({"type": "http.response.body", "body": raw})


async def _live(receive: Any, send: Any) -> None:
    while True:
        event = (await receive())["type"].split(".")[1]
        await send({"type": f"lifespan.{event}.complete"})
        if event == "shutdown":
            return


if __name__ == "__main__":
    uvicorn.run(
        Stub(delay=float(sys.argv[2]) if len(sys.argv) > 2 else 0.0),
        port=int(sys.argv[1]),
        log_level="warning",
        access_log=False,
    )
