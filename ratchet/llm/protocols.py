"""Write request bodies and read answers in OpenAI's and Anthropic's protocols; the client sends them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from ratchet.config.synthesis import EndpointConfig
from ratchet.llm.budget import Usage

ANTHROPIC_VERSION = "2023-06-01"
Turn = tuple[str, str]  # (role, content)


class Answer(NamedTuple):
    """An answer in either protocol.

    `usage`: None if the endpoint reports none; `cut`: the answer reached its token limit; `refused`: the
    endpoint's filter or the model refused to answer.
    """

    text: str
    usage: Usage | None
    cut: bool = False
    refused: bool = False


class Unreadable(ValueError):
    """A response body is not an answer in the protocol."""


class Dialect:
    """The options that one endpoint accepts; `adapt` learns them from refusals."""

    def __init__(self, config: EndpointConfig) -> None:
        self._config = config
        self._max_tokens_key = "max_tokens"
        self._left_out = set[str]()

    @property
    def path(self) -> str:
        return "/messages" if self._config.protocol == "anthropic" else "/chat/completions"

    def headers(self, key: str) -> dict[str, str]:
        if self._config.protocol == "anthropic":
            return {"anthropic-version": ANTHROPIC_VERSION, **({"x-api-key": key} if key else {})}
        return {"authorization": f"Bearer {key}"} if key else {}

    def body(
        self,
        system: str,
        turns: Sequence[Turn],
        *,
        schema: dict[str, Any] | None,
        seed: int,
        pictures: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Return the body of a request; the first turn shows the `pictures`, JPEGs in base64."""
        config = self._config
        messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]
        if pictures:
            shown = map(_anthropic_picture if config.protocol == "anthropic" else _openai_picture, pictures)
            messages[0]["content"] = [*shown, {"type": "text", "text": turns[0][1]}]
        body: dict[str, Any] = {
            "model": config.model,
            self._max_tokens_key: config.max_tokens,
            "temperature": config.temperature,
        }
        if config.protocol == "anthropic":
            body |= {"messages": messages, **({"system": system} if system else {})}
        else:
            body |= {
                "messages": [*([{"role": "system", "content": system}] if system else []), *messages],
                "seed": seed,
            }
            if schema:
                body["response_format"] = {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "strict": True, "schema": schema},
                }
        return {name: value for name, value in body.items() if name not in self._left_out}

    def adapt(self, status: int, said: str, body: dict[str, Any]) -> bool:
        """Drop or rename the option that a refusal names; return False if it names none of ours."""
        if status not in (400, 422):
            return False
        if (
            "max_completion_tokens" in said
            and self._max_tokens_key in body
            and self._max_tokens_key == "max_tokens"
        ):
            self._max_tokens_key = "max_completion_tokens"
            return True
        for option, names in {
            "response_format": ("response_format", "json_schema", "guided", "structured"),
            "temperature": ("temperature",),
            "seed": ("seed",),
        }.items():
            if option in body and any(name in said.lower() for name in names):
                self._left_out.add(option)
                return True
        return False

    def read(self, raw: bytes) -> Answer:
        """Read a response body; most keys are optional, since endpoints omit some. Raises Unreadable."""
        try:
            if self._config.protocol == "anthropic":
                return _read_anthropic(msgspec.json.decode(raw, type=_Message))
            return _read_openai(msgspec.json.decode(raw, type=_Completion))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Unreadable(
                f"no answer of the protocol `{self._config.protocol}`: {type(error).__name__}"
            ) from None


def _openai_picture(picture: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}}


def _anthropic_picture(picture: str) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": picture}}


class _Tokens(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Content(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct):
    message: _Content
    finish_reason: str | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]
    usage: _Tokens | None = None


class _Block(msgspec.Struct):
    type: str
    text: str = ""


class _AnthropicTokens(msgspec.Struct):
    input_tokens: int = 0
    output_tokens: int = 0
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None


class _Message(msgspec.Struct):
    content: list[_Block]
    stop_reason: str | None = None
    usage: _AnthropicTokens | None = None


def _read_openai(found: _Completion) -> Answer:
    if not found.choices:
        raise Unreadable("an answer without a choice")
    choice = found.choices[0]
    usage = Usage(found.usage.prompt_tokens, found.usage.completion_tokens) if found.usage else None
    refused = bool(choice.message.refusal) or choice.finish_reason == "content_filter"
    return Answer(
        choice.message.content or choice.message.refusal or "",
        usage,
        choice.finish_reason == "length",
        refused,
    )


def _read_anthropic(found: _Message) -> Answer:
    tokens = found.usage
    usage = (
        Usage(
            tokens.input_tokens
            + (tokens.cache_creation_input_tokens or 0)
            + (tokens.cache_read_input_tokens or 0),
            tokens.output_tokens,
        )
        if tokens
        else None
    )
    text = "".join(block.text for block in found.content if block.type == "text")
    return Answer(text, usage, found.stop_reason == "max_tokens", found.stop_reason == "refusal")
