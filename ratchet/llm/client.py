"""Ask one model over HTTP: pace requests, keep to the budget, retry, and never show the key.

ConfigError, ServiceError   no request can succeed: the key is refused, the model is unknown
AskError                    this request failed after all its tries
SpentError                  the run's limit is reached (ratchet/llm/budget.py)

The package openai is not used; docs/lab-notes.md gives the reasons with figures.
"""

from __future__ import annotations

import asyncio
import base64
import os
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec

from ratchet.config.synthesis import EndpointConfig
from ratchet.errors import ConfigError, ServiceError
from ratchet.llm.budget import Budget, Prices, Usage
from ratchet.llm.prompts import Prompt
from ratchet.llm.protocols import Answer, Dialect, Turn, Unreadable
from ratchet.llm.replies import Malformed, Reply, read_reply, schema_of
from ratchet.llm.servers import Server, Servers, urls_of

LONGEST_WAIT = 60.0  # seconds; a longer Retry-After is cut to this
LONGEST_BACKOFF = 30.0  # seconds
SEEN = 200  # characters of an endpoint's error message that our message quotes
MOST_BYTES = 8 * 2**20  # the largest answer that is parsed
MOST_PICTURE_TOKENS = 40_000  # of a picture of 1,024 pixels; the dearest known endpoint counts 25,500
OVERHEAD = 512  # tokens that a chat template and a schema may add to a prompt
MOST_ADAPTED = 5  # changes of one body: three options left out, one renamed, one to spare
REPAIR = (
    "That was not the JSON that was asked for: {fault}. "
    "Answer again with the one JSON object and nothing else."
)


class AskError(Exception):
    """A request failed for good; `reason` is the short code under which it is counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Said(msgspec.Struct, frozen=True):
    """An answer: `raw` is the model's text.

    `failure` is a short code if the answer is of no use, else ""; `fault` describes what is wrong with it.
    """

    raw: str
    usage: Usage
    failure: str = ""
    fault: str = ""


class Teacher:
    """A client of one model, for use in one event loop; call `close` at the end.

    `section` is the section of params.yaml that errors name; `backoff` is the first wait, in seconds.
    """

    def __init__(
        self,
        config: EndpointConfig,
        budget: Budget,
        *,
        section: str = "synthesize.teacher",
        backoff: float = 1.0,
    ) -> None:
        """Check address, model and key, without sending a request. Raises ConfigError."""
        _check_address(config, section)
        self._config, self._budget, self._section, self._backoff = config, budget, section, backoff
        self._key = read_key(config, section)
        self._prices = Prices(config.input_price, config.output_price)
        self._dialect = Dialect(config)
        self._servers = Servers(config, self._dialect.headers(self._key))
        self.requests = 0

    @property
    def model(self) -> str:
        return self._config.model

    async def close(self) -> None:
        await self._servers.close()

    async def ask(self, prompt: Prompt, shape: type[Reply], *, seed: int) -> Said:
        """Return an answer of the given shape; ask a second time if the first answer is malformed.

        Raises AskError (there was no answer), SpentError, ConfigError, ServiceError.
        """
        turns: list[Turn] = [("user", prompt.user)]
        schema = schema_of(shape)
        answer = await self._complete(prompt, turns, schema, seed)
        used = answer.usage or Usage()
        fault = _fault(answer, shape)
        if fault and not answer.cut and not answer.refused:
            turns += [
                ("assistant", answer.text[:20_000] or "(nothing)"),
                ("user", REPAIR.format(fault=fault)),
            ]
            answer = await self._complete(prompt, turns, schema, seed)
            used += answer.usage or Usage()
            fault = _fault(answer, shape)
        if answer.refused:
            return Said(answer.text, used, "teacher_refused", fault)
        if fault:
            return Said(answer.text, used, "cut_off" if answer.cut else "malformed", fault)
        return Said(answer.text, used)

    async def say(self, prompt: Prompt, *, seed: int) -> Said:
        """Return an answer as free text. Raises what `ask` raises."""
        answer = await self._complete(prompt, [("user", prompt.user)], None, seed)
        return Said(answer.text, answer.usage or Usage(), "teacher_refused" if answer.refused else "")

    def redact(self, text: str) -> str:
        return text.replace(self._key, "[redacted]") if self._key else text

    async def _complete(
        self, prompt: Prompt, turns: Sequence[Turn], schema: dict[str, Any] | None, seed: int
    ) -> Answer:
        """Return the answer; retry temporary failures, at another server where there is one."""
        tries = 0
        pictures = [base64.b64encode(picture).decode() for picture in prompt.pictures]
        tried: list[Server] = []  # since the last wait

        def make_body() -> dict[str, Any]:
            return self._dialect.body(prompt.system, turns, schema=schema, seed=seed, pictures=pictures)

        while True:
            try:
                return await self._servers.send(partial(self._fitted, make_body, pictures), tried)
            except _Passing as error:
                tried.append(error.server)
                if self._servers.others(tried):
                    continue  # at once, at another server
                tries, tried = tries + 1, []
                if tries >= self._config.tries:
                    raise AskError(error.reason, str(error)) from None
                wait = self.choose_wait(tries, error.retry_after)
                if error.retry_after is not None:
                    error.server.hold_back(wait)  # all other requests too
                await asyncio.sleep(wait)

    async def _fitted(
        self, make_body: Callable[[], dict[str, Any]], pictures: Sequence[str], server: Server
    ) -> Answer:
        """Return the server's answer; leave out the options that it refuses."""
        adapted = 0
        while True:
            body = make_body()
            try:
                return await self._paid(body, pictures, server)
            except _Refused as error:
                adapted += 1
                if adapted > MOST_ADAPTED or not self._dialect.adapt(error.status, error.said, body):
                    raise self._final(error, shown=bool(pictures)) from None

    async def _paid(self, body: dict[str, Any], pictures: Sequence[str], server: Server) -> Answer:
        """Send one request: reserve its highest cost before, settle its real cost after.

        If the endpoint reports no usage, the highest possible usage counts. The answer is redacted.
        """
        raw = msgspec.json.encode(body)
        shown = len(pictures) * MOST_PICTURE_TOKENS - sum(map(len, pictures))
        most = Usage(len(raw) + shown + OVERHEAD, self._config.max_tokens)  # a token has at least one byte
        ticket = await self._budget.hold(most, self._prices)
        used = Usage()
        try:
            answer = await self._send(raw, server)
            server.worked()
            used = answer.usage or Usage(most.input, min(most.output, len(answer.text.encode())))
            return answer._replace(text=self.redact(answer.text), usage=used)
        except _Passing as error:
            server.failed(error.retry_after and min(LONGEST_WAIT, error.retry_after))
            used = most if error.maybe_paid else used  # a lost answer may still be billed
            raise
        except asyncio.CancelledError:
            used = most
            raise
        finally:
            await asyncio.shield(self._budget.settle(ticket, used, self._prices))

    def _name(self, server: Server) -> str:
        """Return the key of params.yaml that names the server."""
        place = self._servers.all.index(server)
        return f"{self._section}.more_urls[{place - 1}]" if place else f"{self._section}.url"

    async def _send(self, raw: bytes, server: Server) -> Answer:
        await server.pace()
        self.requests += 1
        try:
            response = await server.http.post(server.url + self._dialect.path, content=raw)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise _Passing(
                server, "unreachable", f"{self._name(server)} does not answer: {type(error).__name__}"
            ) from None
        except httpx.TimeoutException:
            raise _Passing(
                server,
                "timeout",
                f"no answer within {self._config.timeout:g} s ({self._section}.timeout)",
                maybe_paid=True,
            ) from None
        except httpx.TransportError as error:
            raise _Passing(
                server, "broken_off", f"the connection broke: {type(error).__name__}", maybe_paid=True
            ) from None
        if response.status_code == 429 or response.status_code >= 500 or response.status_code == 408:
            reason = "rate_limited" if response.status_code == 429 else "endpoint_error"
            raise _Passing(
                server,
                reason,
                self._quote(response),
                retry_after=read_retry_after(response.headers.get("retry-after", "")),
            )
        if response.status_code != 200:
            raise _Refused(server, response.status_code, self._quote(response), self.redact(response.text))
        if len(response.content) > MOST_BYTES:
            raise AskError(
                "unreadable", f"an answer of {len(response.content)} bytes; at most {MOST_BYTES} are read"
            )
        try:
            return self._dialect.read(response.content)
        except Unreadable as error:
            raise AskError(
                "unreadable", f"{error}; {self._section}.url and .protocol name what answers there"
            ) from None

    def choose_wait(self, tries: int, retry_after: float | None) -> float:
        """Return the seconds to wait before the next try."""
        if retry_after is None:
            longest = min(LONGEST_BACKOFF, self._backoff * 2.0 ** (tries - 1))
            return longest * random.uniform(0.5, 1.0)  # noqa: S311 (no secret)
        return min(LONGEST_WAIT, retry_after)

    def _quote(self, response: httpx.Response) -> str:
        """Return status and message of an error response, without surrounding JSON and without the key."""
        text = response.text
        try:
            found = msgspec.json.decode(text)
            text = str(found["error"]["message"])
        except (msgspec.DecodeError, RecursionError, KeyError, TypeError):
            pass
        return f"{response.status_code} {' '.join(self.redact(text).split())[:SEEN]}".strip()

    def _final(self, error: _Refused, *, shown: bool) -> Exception:
        """Return the error to raise for a refusal; its remedy names the key or the setting to change."""
        if error.status in (401, 403):
            return ConfigError(
                f"the teacher refuses the key: {error}",
                remedy=f"{'correct' if self._key else 'set'} the environment variable "
                f"{self._config.key_env} ({self._section}.key_env)",
            )
        if error.status == 402:
            return ServiceError(
                f"the teacher asks for payment: {error}",
                remedy="see the account there, then go on with --resume",
            )
        if error.status in (404, 405) or 300 <= error.status < 400:
            return ConfigError(
                f"the teacher at {error.server.url} answers {error}",
                remedy=f"{self._name(error.server)} is the base before {self._dialect.path}, "
                f"mostly ending with /v1; {self._section}.model is {self._config.model!r}",
            )
        hint = "; the request showed a picture, so the model may be one that sees none" if shown else ""
        return AskError("endpoint_refused", f"{error}{hint}")


class _Passing(Exception):
    """A temporary failure: a later try may succeed; `maybe_paid`: the endpoint may bill the lost answer."""

    def __init__(
        self,
        server: Server,
        reason: str,
        message: str,
        *,
        retry_after: float | None = None,
        maybe_paid: bool = False,
    ) -> None:
        super().__init__(message)
        self.server = server
        self.reason, self.retry_after, self.maybe_paid = reason, retry_after, maybe_paid


class _Refused(Exception):
    """The endpoint refused a body; `said` is its whole response, in which `adapt` looks for options."""

    def __init__(self, server: Server, status: int, message: str, said: str) -> None:
        super().__init__(message)
        self.server, self.status, self.said = server, status, said


def _fault(answer: Answer, shape: type[Reply]) -> str:
    """Return why the answer does not have the given shape, or ""."""
    try:
        read_reply(answer.text, shape)
    except Malformed as error:
        return str(error)
    return ""


def _check_address(config: EndpointConfig, section: str) -> None:
    example = (
        "such as http://127.0.0.1:8000/v1 (vLLM), http://127.0.0.1:11434/v1 (Ollama) or, "
        "with protocol: anthropic, https://api.anthropic.com/v1"
    )
    if not config.url:
        raise ConfigError(
            f"{section}.url is empty: no model is named that writes rows",
            remedy=f"set {section}.url to the base URL of an endpoint, {example}, and {section}.model",
        )
    for number, url in enumerate(urls_of(config)):
        _check_url(url, f"{section}.more_urls" if number else f"{section}.url", example, config.key_env)
    if not config.model:
        raise ConfigError(f"{section}.model is empty", remedy="name a model that the endpoint serves")


def _check_url(url: str, key: str, example: str, key_env: str) -> None:
    try:
        parts = urlsplit(url)
        whole = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
        )
    except ValueError:
        whole = False
    if not whole:
        raise ConfigError(
            f"{key} is {url[:80]!r}, which is no http(s) address", remedy=f"set it to a base URL, {example}"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            f"{key} holds more than an address",
            remedy=f"a key belongs into the environment variable {key_env}, never into params.yaml",
        )


def read_key(config: EndpointConfig, section: str) -> str:
    """Return the API key from the environment, or "". Raises ConfigError, without quoting the key."""
    key = os.environ.get(config.key_env, "").strip()
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(
            f"the environment variable {config.key_env} holds no key: "
            "blanks or characters beyond ASCII stand in it",
            remedy=f"see {section}.key_env",
        )
    return key


def read_retry_after(header: str) -> float | None:
    """Return the seconds that a Retry-After (seconds or a date; RFC 9110, 10.2.3) asks for, or None."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(header)
    except (ValueError, TypeError):
        return None
    return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
