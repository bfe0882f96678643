"""Engines, which compute the gateway's answers: in this process, by llama.cpp, or by another server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ratchet.config.params import Config
    from ratchet.serving.engine import Engine


def make_engine(config: Config, folder: Path | None = None) -> Engine:
    """Return the engine of `gateway.engine`; llama.cpp's files lie in `folder`, or beside their adapters.

    Raises ConfigError: what the engine needs is not there.
    """
    if config.gateway.engine == "openai":
        from ratchet.engines.upstream_engine import UpstreamEngine

        return UpstreamEngine(config)
    if config.gateway.engine == "llama_cpp":
        from ratchet.engines.llama_cpp_engine import LlamaCppEngine

        return LlamaCppEngine(config, folder)
    from ratchet.engines.local_engine import LocalEngine

    return LocalEngine(config)
