"""Answer through a server that speaks OpenAI's protocol, such as vLLM: the engine `openai`.

Every version is a model `name@vN` of its own. vLLM loads adapters at run time, each under a new name: under
an old name it could answer from the prefix cache of the adapter before.
The client is aiohttp: a request costs it 0.3 ms of CPU; httpx takes 2.1 ms, 4.2 ms with 32 under way, too
much at 200 requests a second. The package openai adds still more (docs/lab-notes.md).
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import msgspec

from ratchet.config.params import Config
from ratchet.data.examples import RowError, ToolCall, texts_of, to_openai
from ratchet.data.forms import read_calls
from ratchet.errors import BaseModelError, BusyError, ConfigError, ServiceError, UserError
from ratchet.files import read_json
from ratchet.models.adapters import read_kind
from ratchet.models.chat_template import CONTROL
from ratchet.models.loading import is_full
from ratchet.models.reasoning import LEARN
from ratchet.serving.bundle import Bundle
from ratchet.serving.engine import Ask, Ended, JsonForm, Piece, Scored, require_same
from ratchet.serving.protocol import WholeAsk

KEY = "RATCHET_UPSTREAM_KEY"
CONNECT_SECONDS = 5.0
IDLE_SECONDS = 3.0  # uvicorn closes a quiet connection after 5 s; ours must go first, never while in use
SEEN = 200  # characters of what came that a message quotes
THEIRS = {400, 413, 422}  # the request itself is wrong, such as a prompt that does not fit
MOST_LINE_BYTES = 2**20
# aiohttp raises ValueError for a line of a stream that is longer than MOST_LINE_BYTES.
FAILED = (aiohttp.ClientError, OSError, TimeoutError, ValueError)

log = logging.getLogger("ratchet.gateway")


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Token(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[Token] = []

    def scored(self) -> Scored:
        raw = bytes(self.bytes) if self.bytes is not None else self.token.encode()
        return Scored(raw, self.logprob, tuple(other.scored() for other in self.top_logprobs))


class Logprobs(msgspec.Struct):
    content: list[Token] | None = None


class CalledFunction(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class Called(msgspec.Struct):
    """Hold a call, or a part of one in a stream."""

    function: CalledFunction
    index: int = 0


class Text(msgspec.Struct):
    """Hold an answer or a part of one; reasoning is apart where the server has a parser for it."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: Any = None  # its name in newer servers; in others it may be an object
    tool_calls: list[Called] | None = None


class Choice(msgspec.Struct):
    message: Text | None = None
    delta: Text | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None

    def piece(self, said: Text) -> Piece | None:
        tokens = (self.logprobs.content if self.logprobs else None) or []
        other = said.reasoning if isinstance(said.reasoning, str) else ""
        text, reasoning = said.content or "", said.reasoning_content or other
        if not (text or tokens or reasoning):
            return None
        return Piece(text, tuple(one.scored() for one in tokens), (), reasoning)


class Model(msgspec.Struct):
    id: str


class Models(msgspec.Struct):
    data: list[Model]


class Said(msgspec.Struct):
    message: str


class Refusal(msgspec.Struct):
    error: Said


class Completion(msgspec.Struct):
    """Hold a whole answer or a chunk of one."""

    choices: list[Choice]
    usage: Usage | None = None


_decode = msgspec.json.Decoder(Completion)


class UpstreamEngine:
    """Load, ask and unload versions at the server of `gateway.upstream`."""

    def __init__(self, config: Config) -> None:
        """Check the address without sending anything. Raises ConfigError."""
        if not config.gateway.upstream.startswith(("http://", "https://")):
            raise ConfigError(
                f"gateway.upstream is {config.gateway.upstream!r}",
                remedy="the engine `openai` needs the base URL of a server, such as http://127.0.0.1:8000/v1",
            )
        self._url, self._timeout = config.gateway.upstream.rstrip("/"), config.gateway.timeout
        self._loads = config.gateway.upstream_lora
        self._bundles: dict[int, Bundle] = {}
        self._control: dict[int, re.Pattern[str]] = {}
        self._reasons: dict[int, bool] = {}
        self._opened: aiohttp.ClientSession | None = None

    async def load(self, bundle: Bundle) -> None:
        """Load an adapter at the upstream, or check that the model is there.

        Raises BaseModelError (the upstream refuses or lacks it, or another adapter has that version's number)
        and ServiceError (the upstream does not answer).
        """
        if known := self._bundles.get(bundle.version):
            require_same(known, bundle)
        self._control[bundle.version] = await asyncio.to_thread(_read_control_tokens, bundle.adapter)
        self._reasons[bundle.version] = await asyncio.to_thread(_learned_to_reason, bundle.adapter)
        if self._loads:
            await asyncio.to_thread(_check_loads, bundle)
            await self._load_adapter(bundle)
        else:
            await self._find_model(bundle)
        self._bundles[bundle.version] = bundle

    async def unload(self, version: int) -> None:
        """Unload an adapter; a failure is only logged: it costs the upstream's memory, nothing else."""
        bundle = self._bundles.pop(version, None)
        if bundle is None or not self._loads:
            return
        try:
            status, text = await self._call("POST", "/unload_lora_adapter", {"lora_name": _model(bundle)})
        except ServiceError as error:
            log.warning("%s stays loaded at the upstream: %s", _model(bundle), error)
            return
        if status not in (200, 404):
            log.warning("%s stays loaded at the upstream: %s", _model(bundle), _quote(status, text))

    async def answer(self, ask: Ask) -> AsyncIterator[Piece | Ended]:
        """Yield one piece for a whole answer, many for a streamed one."""
        bundle = self._bundles[ask.version]
        if not self._reasons[ask.version]:  # its template may write what the training left out
            bare = tuple(msgspec.structs.replace(message, reasoning="") for message in ask.messages)
            ask = replace(ask, messages=bare)
        elif not ask.reasons:
            raise UserError(
                "an upstream cannot be told to answer without reasoning, which this version learned",
                remedy="leave reasoning_effort out",
            )
        # The upstream tokenizes the whole prompt at once, so text of a user could become a control token.
        for text in texts_of(ask.messages, ask.tools):
            if found := self._control[ask.version].search(text):
                raise UserError(
                    f"a message holds {found[0]!r}, a control token of the model", remedy="leave it out"
                )
        response = await self._open(_body(ask, bundle, stream=not isinstance(ask, WholeAsk)), bundle)
        try:
            async for part in (
                _read_stream(response)
                if response.content_type == "text/event-stream"
                else _read_whole(response)
            ):
                if ask.top_logprobs is not None and isinstance(part, Piece) and not part.tokens:
                    raise UserError(
                        "the upstream gives no log probabilities", remedy="send the request without logprobs"
                    )
                yield part
        except FAILED as error:
            raise ServiceError(
                f"the upstream broke off: {_describe(error)}", remedy="see the upstream's log"
            ) from None
        finally:
            response.release()  # closes a connection with more to come, so that the upstream stops its work

    async def close(self) -> None:
        if self._opened:
            await self._opened.close()

    @property
    def _session(self) -> aiohttp.ClientSession:
        """Open the session in the loop that uses it; no proxy from the environment may see the prompts."""
        if self._opened is None:
            key = os.environ.get(KEY)
            self._opened = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
                headers={
                    "content-type": "application/json",
                    **({"authorization": f"Bearer {key}"} if key else {}),
                },
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=CONNECT_SECONDS, sock_read=self._timeout
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                read_bufsize=MOST_LINE_BYTES,
            )
        return self._opened

    async def _open(self, body: bytes, bundle: Bundle) -> aiohttp.ClientResponse:
        """Send a body; load the adapter again where the upstream restarted and lost it.

        Raises what a status other than 200 means (`_refuse`).
        """
        response = await self._send("POST", "/chat/completions", body)
        if response.status == 404 and self._loads:
            response.release()
            await self._load_adapter(bundle)
            response = await self._send("POST", "/chat/completions", body)
        if response.status != 200:
            _refuse(response.status, await _read_text(response))
        return response

    async def _send(
        self, method: str, path: str, body: bytes | None, *, tries: int = 2
    ) -> aiohttp.ClientResponse:
        """Send a request, twice where the upstream closed the connection just then. Raises ServiceError."""
        try:
            return await self._session.request(method, self._url + path, data=body, allow_redirects=False)
        except FAILED as error:
            if tries > 1 and isinstance(error, aiohttp.ServerDisconnectedError | ConnectionError):
                return await self._send(method, path, body, tries=tries - 1)
            log.warning(
                "%s does not answer: %s", self._url, _describe(error)
            )  # the client is not told where it is
            raise ServiceError(
                f"the upstream does not answer: {type(error).__name__}",
                remedy="start it, or correct gateway.upstream in params.yaml",
            ) from None

    async def _load_adapter(self, bundle: Bundle) -> None:
        if (
            bundle.version not in self._bundles
        ):  # an earlier gateway may have left another one there under this name
            await self._call("POST", "/unload_lora_adapter", {"lora_name": _model(bundle)})
        status, text = await self._call(
            "POST", "/load_lora_adapter", {"lora_name": _model(bundle), "lora_path": str(bundle.adapter)}
        )
        if status == 200 or "already" in text:
            return
        if status >= 500:
            raise ServiceError(
                f"the upstream could not load {_model(bundle)}: {_quote(status, text)}",
                remedy="see the upstream's log",
            )
        raise BaseModelError(
            f"the upstream refuses {_model(bundle)}: {_quote(status, text)}",
            remedy="vLLM needs --enable-lora, a --max-lora-rank that fits and "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=true, and has to see the same files; "
            "or set gateway.upstream_lora to false",
        )

    async def _find_model(self, bundle: Bundle) -> None:
        status, text = await self._call("GET", "/models", None)
        try:
            names = [model.id for model in msgspec.json.decode(text, type=Models).data]
        except (msgspec.DecodeError, RecursionError):
            raise ServiceError(
                f"the upstream's list of models is none: {_quote(status, text)}",
                remedy="correct gateway.upstream in params.yaml",
            ) from None
        if _model(bundle) not in names:
            raise BaseModelError(
                f"the upstream serves {', '.join(names) or 'no model'}; wanted {_model(bundle)}",
                remedy="serve it under that name, or set gateway.upstream_lora to true",
            )

    async def _call(self, method: str, path: str, body: dict[str, str] | None) -> tuple[int, str]:
        """Return status and text. Raises ServiceError."""
        response = await self._send(method, path, msgspec.json.encode(body) if body else None)
        return response.status, await _read_text(response)


def _check_loads(bundle: Bundle) -> None:
    """Refuse what vLLM could mistake for LoRA: it takes LoRA and rsLoRA alone. Raises BaseModelError."""
    if is_full(bundle.adapter) or (bundle.adapter / "adapter_config.json").exists():
        kind = read_kind(bundle.adapter)
        if not kind.mixes:
            raise BaseModelError(
                f"{_model(bundle)} is no plain LoRA ({kind.family}): an upstream cannot load it at run time",
                remedy="serve it there under that name and set gateway.upstream_lora to false, "
                "or set gateway.engine to local",
            )


def _read_control_tokens(adapter: Path) -> re.Pattern[str]:
    """Return a pattern of the control tokens of the tokenizer beside the adapter.

    It matches nothing where no tokenizer is there: the upstream brings its own.
    """
    path = adapter / "tokenizer.json"
    added = read_json(path).get("added_tokens", []) if path.exists() else []
    control = [token["content"] for token in added if token["special"] or CONTROL.fullmatch(token["content"])]
    return re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")


def _learned_to_reason(adapter: Path) -> bool:
    path = adapter / "chat_template.jinja"
    return path.exists() and LEARN in path.read_text(encoding="utf-8")


def _model(bundle: Bundle) -> str:
    return f"{bundle.name}@v{bundle.version}"


def _body(ask: Ask, bundle: Bundle, *, stream: bool) -> bytes:
    own = bundle.generation
    max_tokens, temperature = (
        ask.max_tokens or own.max_new_tokens,
        own.temperature if ask.temperature is None else ask.temperature,
    )
    asked: dict[str, Any] = {
        "top_p": ask.top_p,
        "seed": ask.seed,
        "stop": ask.stop or None,
        "logprobs": None if ask.top_logprobs is None else True,
        "top_logprobs": ask.top_logprobs,
        "response_format": _format(ask.form),
        "tools": ask.tools or None,
        "parallel_tool_calls": None if ask.parallel_calls else False,
        "tool_choice": _choice(ask),
    }
    body = {
        "model": _model(bundle),
        "messages": to_openai(ask.messages, ask.media),
        "max_tokens": max_tokens,
        "temperature": temperature,
    }
    body |= {name: value for name, value in asked.items() if value is not None}
    return msgspec.json.encode(
        {**body, "stream": True, "stream_options": {"include_usage": True}} if stream else body
    )


def _choice(ask: Ask) -> Any:
    if len(ask.must_call) == 1 and not ask.parallel_calls:
        return {"type": "function", "function": {"name": ask.must_call[0]}}
    return "required" if ask.must_call else None


def _format(form: JsonForm | None) -> dict[str, Any] | None:
    if form is None:
        return None
    if not form.schema:
        return {"type": "json_object"}
    schema = {"name": form.name, "schema": msgspec.Raw(form.schema.encode()), "strict": True}
    return {"type": "json_schema", "json_schema": schema}


async def _read_whole(response: aiohttp.ClientResponse) -> AsyncIterator[Piece | Ended]:
    raw = await response.read()
    completion = _parse(raw)
    choice = completion.choices[0] if completion.choices else None
    if choice is None or choice.message is None:
        raise ServiceError(f"the upstream sent no choice: {raw[:SEEN]!r}", remedy="see the upstream's log")
    if piece := choice.piece(choice.message):
        yield piece
    if calls := _join_calls(list(enumerate(choice.message.tool_calls or ()))):
        yield Piece("", (), calls)
    yield _end(choice.finish_reason, completion.usage)


async def _read_stream(response: aiohttp.ClientResponse) -> AsyncIterator[Piece | Ended]:
    finish, usage = None, None
    called: list[tuple[int, Called]] = []
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue  # the empty line between events, or a comment that keeps the connection open
        data = line[5:].strip()
        if data == b"[DONE]":
            break
        chunk = _parse(data)
        usage = chunk.usage or usage
        for choice in chunk.choices[:1]:
            finish = choice.finish_reason or finish
            if choice.delta and (piece := choice.piece(choice.delta)):
                yield piece
            if choice.delta:
                called += [(part.index, part) for part in choice.delta.tool_calls or ()]
    if finish is None:
        raise ServiceError(
            "the upstream's stream ended before its answer did", remedy="see the upstream's log"
        )
    if calls := _join_calls(called):
        yield Piece("", (), calls)
    yield _end(finish, usage)


def _join_calls(parts: list[tuple[int, Called]]) -> tuple[ToolCall, ...]:
    """Join the parts of calls by their numbers. Raises ServiceError: the arguments are no JSON object."""
    joined: dict[int, tuple[str, str]] = {}
    for index, part in parts:
        name, arguments = joined.get(index, ("", ""))
        joined[index] = (
            name + (part.function.name or ""),
            arguments + (part.function.arguments or ""),
        )
    try:
        calls = [{"function": {"name": name, "arguments": said}} for name, said in joined.values()]
        return read_calls({"tool_calls": calls})
    except RowError as error:
        raise ServiceError(f"the upstream sent a broken call: {error}", remedy="ask again") from None


def _parse(raw: bytes) -> Completion:
    try:
        return _decode.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ServiceError(
            f"the upstream sent no completion ({error}): {raw[:SEEN]!r}",
            remedy="correct gateway.upstream in params.yaml, or see the upstream's log",
        ) from None


def _end(finish: str | None, usage: Usage | None) -> Ended:
    usage = usage or Usage()
    kept = finish if finish in ("length", "tool_calls") else "stop"
    return Ended(kept, usage.prompt_tokens, usage.completion_tokens)


async def _read_text(response: aiohttp.ClientResponse) -> str:
    try:
        return await response.text(errors="replace")
    except FAILED as error:
        raise ServiceError(
            f"the upstream broke off: {_describe(error)}", remedy="see the upstream's log"
        ) from None
    finally:
        response.release()


def _refuse(status: int, text: str) -> NoReturn:
    """Raise what a status other than 200 means."""
    if status == 429:
        raise BusyError("the upstream takes no more requests now", remedy="come again in a second")
    if status in THEIRS:
        raise UserError(f"the upstream refuses the request: {_quote(status, text)}")
    raise ServiceError(f"the upstream failed: {_quote(status, text)}", remedy="see the upstream's log")


def _quote(status: int, text: str) -> str:
    """Return status and message of an error, without the page around them."""
    with suppress(msgspec.DecodeError, RecursionError):
        text = msgspec.json.decode(text, type=Refusal).error.message
    return f"{status} {' '.join(text.split())[:SEEN]}"


def _describe(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()
