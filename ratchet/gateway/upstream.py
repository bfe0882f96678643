"""The engine `openai`: a server that speaks the protocol, such as vLLM, with every version as a model `name@vN` of its own.

vLLM gets adapters at run time, each under a new name: the same name again could answer from the old one's prefix cache.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import httpx
import msgspec

from ratchet.config import Config
from ratchet.errors import BaseModelError, BusyError, ConfigError, ServiceError, UserError
from ratchet.gateway.engine import Ask, Ended, Piece
from ratchet.gateway.protocol import WholeAsk
from ratchet.serving import Bundle

KEY = "RATCHET_UPSTREAM_KEY"
CONNECT_SECONDS, LOAD_SECONDS = 5.0, 120.0
IDLE_SECONDS = 3.0  # under the 5 s after which uvicorn closes a quiet connection: ours must not be the one that is closed while in use
SEEN = 200  # characters of what came that a message quotes
THEIRS = {400, 413, 422}  # what is wrong with the request itself, such as a prompt that does not fit
Decoded = TypeVar("Decoded")

log = logging.getLogger("ratchet.gateway")


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Text(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    message: Text | None = None
    delta: Text | None = None
    finish_reason: str | None = None


class Completion(msgspec.Struct):
    """A whole answer or a chunk of one."""

    choices: list[Choice]
    usage: Usage | None = None


_decode = msgspec.json.Decoder(Completion)


class UpstreamEngine:
    def __init__(self, config: Config) -> None:
        """Raises ConfigError without an address. Nothing is asked yet."""
        if not config.gateway.upstream.startswith(("http://", "https://")):
            raise ConfigError(f"gateway.upstream is {config.gateway.upstream!r}", remedy="the engine `openai` needs the base URL of a server, such as http://127.0.0.1:8000/v1")
        key = os.environ.get(KEY)
        self._bundles: dict[int, Bundle] = {}
        self._loads = config.gateway.upstream_lora
        self._client = httpx.AsyncClient(
            base_url=config.gateway.upstream.rstrip("/"),
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(config.gateway.timeout, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=IDLE_SECONDS),
            trust_env=False,  # a proxy of the shell's would see every prompt
        )

    async def load(self, bundle: Bundle) -> None:
        """Raises BaseModelError (the upstream refuses or lacks it), ServiceError (it does not answer)."""
        if self._loads:
            await self._load_adapter(bundle)
        else:
            await self._find_model(bundle)
        self._bundles[bundle.version] = bundle

    async def unload(self, version: int) -> None:
        """What an upstream cannot let go of costs its memory only: a line in the log, no error."""
        bundle = self._bundles.pop(version, None)
        if bundle is None or not self._loads:
            return
        try:
            answered = await self._client.post("/unload_lora_adapter", json={"lora_name": _model(bundle)})
        except httpx.HTTPError as error:
            log.warning("%s stays loaded at the upstream: %s", _model(bundle), _describe(error))
            return
        if not answered.is_success and answered.status_code != httpx.codes.NOT_FOUND:
            log.warning("%s stays loaded at the upstream: %s", _model(bundle), _quote(answered))

    async def answer(self, ask: Ask) -> AsyncIterator[Piece | Ended]:
        """One piece for a whole answer, many for a streamed one."""
        bundle = self._bundles[ask.version]
        response = await self._open(_body(ask, bundle, stream=not isinstance(ask, WholeAsk)), bundle)
        streams = response.headers.get("content-type", "").startswith("text/event-stream")
        try:
            async for part in _read_stream(response) if streams else _read_whole(response):
                yield part
        except httpx.HTTPError as error:
            raise ServiceError(f"the upstream broke off: {_describe(error)}", remedy="see the upstream's log") from None
        finally:
            await response.aclose()

    async def close(self) -> None:
        await self._client.aclose()

    async def _open(self, body: dict[str, Any], bundle: Bundle) -> httpx.Response:
        """A second try where the upstream closed a quiet connection, or started anew and knows the adapter no more."""
        response = await self._send(body, again=True)
        if response.status_code == httpx.codes.NOT_FOUND and self._loads:
            await response.aclose()
            await self._load_adapter(bundle)
            response = await self._send(body)
        if not response.is_success:
            await _refuse(response)
        return response

    async def _send(self, body: dict[str, Any], *, again: bool = False) -> httpx.Response:
        request = self._client.build_request("POST", "/chat/completions", content=msgspec.json.encode(body), headers={"content-type": "application/json"})
        try:
            return await self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            if again and isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):
                return await self._send(body)
            raise ServiceError(f"the upstream {self._client.base_url} does not answer: {_describe(error)}", remedy="start it, or correct gateway.upstream in params.yaml") from None

    async def _load_adapter(self, bundle: Bundle) -> None:
        answered = await self._call("POST", "/load_lora_adapter", {"lora_name": _model(bundle), "lora_path": str(bundle.adapter)})
        if answered.is_success or "already" in answered.text:
            return
        if answered.status_code >= 500:
            raise ServiceError(f"the upstream could not load {_model(bundle)}: {_quote(answered)}", remedy="see the upstream's log")
        raise BaseModelError(
            f"the upstream refuses {_model(bundle)}: {_quote(answered)}",
            remedy="vLLM needs --enable-lora, a --max-lora-rank that fits and VLLM_ALLOW_RUNTIME_LORA_UPDATING=true, and has to see the same files; or set gateway.upstream_lora to false",
        )

    async def _find_model(self, bundle: Bundle) -> None:
        answered = await self._call("GET", "/models", None)
        try:
            names = [str(model["id"]) for model in answered.json()["data"]]
        except (ValueError, KeyError, TypeError):
            raise ServiceError(f"the upstream's list of models is none: {_quote(answered)}", remedy="correct gateway.upstream in params.yaml") from None
        if _model(bundle) not in names:
            raise BaseModelError(
                f"the upstream serves {', '.join(names) or 'no model'}; wanted {_model(bundle)}", remedy="serve it under that name, or set gateway.upstream_lora to true"
            )

    async def _call(self, method: str, path: str, body: dict[str, str] | None) -> httpx.Response:
        try:
            return await self._client.request(method, path, json=body, timeout=httpx.Timeout(LOAD_SECONDS, connect=CONNECT_SECONDS))
        except httpx.HTTPError as error:
            raise ServiceError(f"the upstream {self._client.base_url} does not answer: {_describe(error)}", remedy="start it, or correct gateway.upstream in params.yaml") from None


def _model(bundle: Bundle) -> str:
    return f"{bundle.name}@v{bundle.version}"


def _body(ask: Ask, bundle: Bundle, *, stream: bool) -> dict[str, Any]:
    own = bundle.generation
    max_tokens, temperature = ask.max_tokens or own.max_new_tokens, own.temperature if ask.temperature is None else ask.temperature
    asked = {"top_p": ask.top_p, "seed": ask.seed, "stop": ask.stop or None}
    body = {"model": _model(bundle), "messages": ask.messages, "max_tokens": max_tokens, "temperature": temperature}
    body |= {name: value for name, value in asked.items() if value is not None}
    return {**body, "stream": True, "stream_options": {"include_usage": True}} if stream else body


async def _read_whole(response: httpx.Response) -> AsyncIterator[Piece | Ended]:
    raw = await response.aread()
    completion = _parse(raw)
    choice = completion.choices[0] if completion.choices else None
    if choice is None or choice.message is None:
        raise ServiceError(f"the upstream sent no choice: {raw[:SEEN]!r}", remedy="see the upstream's log")
    if choice.message.content:
        yield Piece(choice.message.content)
    yield _end(choice.finish_reason, completion.usage)


async def _read_stream(response: httpx.Response) -> AsyncIterator[Piece | Ended]:
    finish, usage = None, None
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue  # the empty line between events, or a comment that keeps the connection open
        data = line[5:].strip()
        if data == "[DONE]":
            break
        chunk = _parse(data)
        usage = chunk.usage or usage
        for choice in chunk.choices[:1]:
            finish = choice.finish_reason or finish
            if choice.delta and choice.delta.content:
                yield Piece(choice.delta.content)
    if finish is None:
        raise ServiceError("the upstream's stream ended before its answer did", remedy="see the upstream's log")
    yield _end(finish, usage)


def _parse(raw: bytes | str) -> Completion:
    try:
        return _decode.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ServiceError(f"the upstream sent no completion ({error}): {raw[:SEEN]!r}", remedy="correct gateway.upstream in params.yaml, or see the upstream's log") from None


def _end(finish: str | None, usage: Usage | None) -> Ended:
    usage = usage or Usage()
    return Ended("length" if finish == "length" else "stop", usage.prompt_tokens, usage.completion_tokens)


async def _refuse(response: httpx.Response) -> None:
    """Raises what a status other than 2xx means."""
    await response.aread()
    await response.aclose()
    if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
        raise BusyError("the upstream takes no more requests now", remedy="come again in a second")
    if response.status_code in THEIRS:
        raise UserError(f"the upstream refuses the request: {_quote(response)}")
    raise ServiceError(f"the upstream failed: {_quote(response)}", remedy="see the upstream's log")


def _quote(response: httpx.Response) -> str:
    """Status and message, without the page around it."""
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text
    return f"{response.status_code} {' '.join(str(message).split())[:SEEN]}"


def _describe(error: httpx.HTTPError) -> str:
    return f"{type(error).__name__} {error}".strip()
