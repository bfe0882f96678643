"""A version made ready to serve: adapter, template, tokenizer, base and generation settings of one commit, in one folder.

Fetched from the commit that made it (git and DVC), so that serving and rollback work with MLflow down. Kept in
`.ratchet/serving`, whole or not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Generation(NamedTuple):
    """How a version answers when the client does not say: the settings under which it was evaluated."""

    max_new_tokens: int
    temperature: float = 0.0


class Bundle(NamedTuple):
    name: str
    version: int
    adapter: Path  # a PEFT folder with the tokenizer, its template and manifest.json
    base: Path
    method: str  # "lora" or "qlora"
    max_length: int  # tokens of a prompt and its answer together, at most
    generation: Generation
