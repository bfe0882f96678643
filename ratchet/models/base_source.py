"""Bring the files of a base model to this machine."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from ratchet.config.training import BaseConfig
from ratchet.errors import BaseModelError
from ratchet.models.base_files import find_weights


def find_snapshot(config: BaseConfig) -> Path:
    """Return the hub's folder of that revision, from the cache when it is whole there, else downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    settings: dict[str, Any] = {
        "repo_id": config.model,
        "revision": config.revision,
        "allow_patterns": wanted,
    }
    cached = None
    with contextlib.suppress(LocalEntryNotFoundError):
        cached = Path(snapshot_download(**settings, local_files_only=True))
        weights, missing = find_weights(cached)
        if weights and not missing:
            return cached
    try:
        return Path(snapshot_download(**settings))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        if cached:
            return cached
        cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or "~/.cache/huggingface"
        raise BaseModelError(
            f"{config.model}@{config.revision} is not in the hub's cache ({cache})"
            f" and cannot be fetched: {str(error).splitlines()[0]}",
            remedy=f"{fetch_command(config)}; a gated model needs HF_TOKEN in the environment;"
            " or set `base.model: demo`",
        ) from None


def fetch_command(config: BaseConfig) -> str:
    return f"with network: hf download {config.model} --revision {config.revision}"
