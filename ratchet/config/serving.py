"""Sections of params.yaml: the gateway, its log and the services."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ratchet.config.base import Count, Port, Section


class GatewayConfig(Section):
    """What answers: OpenAI's protocol in front of the champion and, in a rollout, the challenger."""

    engine: Literal["local", "openai"] = Field(
        default="local",
        description="`local`: transformers and PEFT in this process; `openai`: a server that speaks the "
        "protocol",
    )
    host: str = Field(
        default="127.0.0.1",
        description="address to listen on; any but loopback needs API keys (`ratchet keys add`)",
    )
    port: Port = Field(default=8400, description="port of the gateway")
    upstream: str = Field(
        default="",
        description="base URL of the engine `openai`, such as `http://127.0.0.1:8000/v1`; its key comes from "
        "RATCHET_UPSTREAM_KEY",
    )
    upstream_lora: bool = Field(
        default=True,
        description="load adapters into the upstream at run time (vLLM's `/v1/load_lora_adapter`), a new "
        "name for every version; otherwise the model `NAME@vN` is expected to be there",
    )
    max_batch: int = Field(
        default=16, ge=1, le=512, description="requests that are decoded together by the engine `local`"
    )
    max_queue: Count = Field(default=64, description="requests that wait; one more gets 429 with Retry-After")
    max_body_bytes: int = Field(default=1_048_576, ge=1024, description="largest request body, in bytes")
    max_messages: Count = Field(default=256, description="messages in a request, at most")
    max_tokens: Count = Field(default=4096, description="answer tokens that a client may ask for, at most")
    requests_per_minute: int = Field(
        default=0, ge=0, description="requests of one API key in a minute; 0 is no limit"
    )
    timeout: float = Field(
        default=120.0, gt=0, description="seconds that an answer may take, its wait in the queue included"
    )
    drain_seconds: float = Field(
        default=30.0, ge=0, description="seconds that running answers get to end after SIGTERM"
    )
    prompt_nll: bool = Field(
        default=True,
        description="measure how much each prompt surprises the model (engine `local`); one more pass of its "
        "output layer over the prompt",
    )


class RequestLogConfig(Section):
    """What the gateway remembers of requests and feedback."""

    renamed: ClassVar = {"request_log.retention_days": "request_log.keep_days"}

    url: str = Field(
        default="",
        description="SQLAlchemy URL; empty: SQLite in `.ratchet/requests.db`. A password belongs into "
        "RATCHET_REQUEST_LOG_URL, which wins over this",
    )
    queue: Count = Field(
        default=10_000,
        description="records that wait to be written; what comes on top is dropped, counted and shown",
    )
    keep_days: float = Field(
        default=30.0, gt=0, description="days after which requests and their feedback are deleted"
    )
    texts: bool = Field(
        default=True,
        description="keep prompts and answers (redacted); without them the monitor sees figures only and "
        "feedback gives no rows",
    )
    redact: list[str] = Field(
        default=[r"\b(?:sk|hf|ghp|xox[bp])[-_][A-Za-z0-9_-]{10,}"],
        description="regular expressions of what else is written as `[redacted]`, beside the secrets and "
        "personal data that preparation looks for",
    )


class ServicesConfig(Section):
    """What `ratchet up` starts, on loopback."""

    mlflow_port: Port = Field(default=5000, description="port of MLflow on 127.0.0.1")
    prefect_port: Port = Field(default=4200, description="port of Prefect on 127.0.0.1")
    # A wait ends with the answer; on two cores with a load of ten MLflow took more than 120 s.
    start_timeout: Count = Field(default=300, description="seconds to wait for a service's first answer")
