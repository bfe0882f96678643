"""Sections of params.yaml: the gateway, its request log and the services."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from ratchet.config.base import Count, Port, Section


class GatewayConfig(Section):
    """The gateway: it serves the champion and, during a rollout, the challenger, with OpenAI's protocol."""

    engine: Literal["local", "llama_cpp", "openai"] = Field(
        default="local",
        description="what computes answers. `local`: transformers and PEFT in the gateway's process; "
        "`llama_cpp`: llama.cpp on the merged model, faster on a CPU (extra `llama-cpp`); `openai`: a server "
        "with OpenAI's protocol, such as vLLM, for more load",
    )
    host: str = Field(
        default="127.0.0.1",
        description="address to listen on; any address other than loopback needs API keys (`ratchet keys "
        "add`)",
    )
    port: Port = Field(default=8400, description="port of the gateway")
    upstream: str = Field(
        default="",
        description="base URL of the server for the engine `openai`, such as `http://127.0.0.1:8000/v1`; "
        "its key comes from RATCHET_UPSTREAM_KEY",
    )
    upstream_lora: bool = Field(
        default=True,
        description="load adapters into the server at run time (vLLM's `/v1/load_lora_adapter`), under a "
        "new name for every version; if false, the server has to serve the model `NAME@vN` already",
    )
    max_batch: int = Field(
        default=16,
        ge=1,
        le=512,
        description="requests that the engines `local` and `llama_cpp` decode together; lower it if memory "
        "runs out",
    )
    max_queue: Count = Field(
        default=64, description="requests that may wait; a further one gets 429 with Retry-After"
    )
    max_body_bytes: int = Field(default=1_048_576, ge=1024, description="largest request body, in bytes")
    max_messages: Count = Field(default=256, description="messages in one request, at most")
    max_pictures: int = Field(default=8, ge=0, description="pictures in one request, at most")
    max_sounds: int = Field(default=4, ge=0, description="recordings in one request, at most")
    max_sound_seconds: float = Field(
        default=30.0, gt=0, le=3600, description="longest recording in a request, in seconds"
    )
    max_tokens: Count = Field(default=4096, description="answer tokens that a client may ask for, at most")
    requests_per_minute: int = Field(
        default=0, ge=0, description="requests per minute that one API key may send; 0: no limit"
    )
    timeout: float = Field(
        default=120.0, gt=0, description="seconds that an answer may take, including the wait in the queue"
    )
    drain_seconds: float = Field(
        default=30.0, ge=0, description="seconds that running answers get to finish after SIGTERM"
    )
    prompt_nll: bool = Field(
        default=True,
        description="measure each prompt's NLL under the model (engine `local`), which the monitor reads; "
        "costs one pass of the output layer over the prompt",
    )


class StorageConfig(Section):
    """Where the project's shared state is: the rollout, retrainings, review queue, request log and locks."""

    url: str = Field(
        default="",
        description="URL of a PostgreSQL database of the project's own, such as "
        "`postgresql+psycopg://ratchet@host/claims`, which several gateways and workers share; empty: files "
        "in `.ratchet`. `ratchet storage move` fills it. The password comes from PGPASSWORD, PGPASSFILE or "
        "~/.pgpass; RATCHET_STORAGE_URL overrides this key",
    )

    @field_validator("url")
    @classmethod
    def _no_password(cls, url: str) -> str:
        if re.match(r"[^/@]*//[^/@:]*:[^/@]*@", url) or "password=" in url:
            raise ValueError(
                "storage.url holds a password, which git would keep: leave it out, and set PGPASSWORD, "
                "~/.pgpass or RATCHET_STORAGE_URL"
            )
        return url


class RequestLogConfig(Section):
    """What the gateway stores of requests and feedback."""

    renamed: ClassVar = {"request_log.retention_days": "request_log.keep_days"}

    url: str = Field(
        default="",
        description="SQLAlchemy URL; empty: `storage.url`, or SQLite in `.ratchet/requests.db`. Put a "
        "password into "
        "RATCHET_REQUEST_LOG_URL, which overrides this key",
    )
    queue: Count = Field(
        default=10_000,
        description="records that may wait to be written; further ones are dropped, counted and shown",
    )
    keep_days: float = Field(
        default=30.0, gt=0, description="age in days beyond which requests and their feedback are deleted"
    )
    texts: bool = Field(
        default=True,
        description="keep prompts and answers (redacted); without them the monitor cannot compare prompts, "
        "and feedback gives no rows",
    )
    pictures: bool = Field(
        default=False,
        description="keep the pictures and recordings of requests in `.ratchet/pictures`, as long as their "
        "texts, so that feedback on them becomes rows. Nothing in them is redacted",
    )
    picture_features: bool = Field(
        default=True,
        description="keep what the model saw in each picture of a request, as at most 128 numbers, so that "
        "the monitor notices pictures of new things; engine `local` alone tells it, and only with "
        "`request_log.texts`",
    )
    redact: list[str] = Field(
        default=[r"\b(?:sk|hf|ghp|xox[bp])[-_][A-Za-z0-9_-]{10,}"],
        description="regular expressions of further text that is stored as `[redacted]`, in addition to the "
        "secrets and personal data that preparation finds",
    )

    @property
    def keeps_features(self) -> bool:
        return self.texts and self.picture_features


class ServicesConfig(Section):
    """The services that `ratchet up` starts on loopback."""

    mlflow_port: Port = Field(
        default=5000, description="port of MLflow on 127.0.0.1; change it if another program uses it"
    )
    prefect_port: Port = Field(
        default=4200, description="port of Prefect on 127.0.0.1; change it if another program uses it"
    )
    # Generous: on two cores with a load average of ten, MLflow took more than 120 s to answer.
    start_timeout: Count = Field(
        default=300, description="seconds to wait for a service's first answer; raise it on a slow machine"
    )
