"""Run llama.cpp itself on a free port of 127.0.0.1: the package `xllamacpp` holds its server ready built."""

from __future__ import annotations

import gc
import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from patience import scaled


class Said(NamedTuple):
    ids: list[int]  # the end of the turn included
    logprobs: Any  # (tokens said, vocabulary)


class LlamaServer:
    def __init__(self, address: str) -> None:
        self._address = address

    def ids(self, text: str, *, control: bool, start: bool = False) -> list[int]:
        """Tokenize `text`; `control` reads control tokens in it, `start` adds what the file puts first."""
        return list(self._ask("/tokenize", content=text, parse_special=control, add_special=start)["tokens"])

    def render(self, messages: list[dict[str, str]]) -> str:
        return str(self._ask("/apply-template", messages=messages)["prompt"])

    def say(self, prompt: Sequence[int], most: int, vocabulary: int) -> Said:
        """Greedy."""
        answer = self._ask(
            "/completion",
            prompt=list(prompt),
            n_predict=most,
            temperature=0,
            n_probs=vocabulary,
            return_tokens=True,
            cache_prompt=False,
        )
        rows = np.full((len(answer["completion_probabilities"]), vocabulary), -np.inf)
        for row, said in zip(rows, answer["completion_probabilities"], strict=True):
            for one in said["top_logprobs"]:
                row[one["id"]] = one["logprob"]
        return Said(list(answer["tokens"]), rows)

    def chat(self, messages: list[dict[str, str]], most: int) -> str:
        answer = self._ask("/v1/chat/completions", messages=messages, max_tokens=most, temperature=0)
        return str(answer["choices"][0]["message"]["content"])

    def facts(self) -> dict[str, Any]:
        return self._ask("/props")

    def _ask(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            self._address + path,
            json.dumps(body).encode() if body else None,
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=scaled(60)) as answer:
            return json.load(answer)


@contextmanager
def serving_gguf(path: Path) -> Iterator[LlamaServer]:
    """Keys and values in float32, so that a difference is the file's."""
    package = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (uv pip install xllamacpp)")
    wanted = package.CommonParams()
    wanted.model.path, wanted.n_ctx, wanted.n_parallel, wanted.n_gpu_layers = str(path), 512, 1, 0
    wanted.hostnames, wanted.port, wanted.verbosity, wanted.warmup, wanted.fit_params = (
        ["127.0.0.1"],
        0,
        0,
        False,
        False,
    )
    wanted.cache_type_k = wanted.cache_type_v = package.ggml_type.GGML_TYPE_F32
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = 1
    server = package.Server(wanted)
    try:
        yield LlamaServer(server.listening_address)
    finally:
        del server
        gc.collect()
