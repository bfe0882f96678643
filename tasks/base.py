"""Get the base model: a hub id at a pinned revision, or `demo`, a small Llama pre-trained here on
documentation.

    python -m tasks.base --out models/base

Writes the tokenizer, the chat template and manifest.json; for `demo` the weights too (a hub's stay in its
cache). The demo's base reads part of the modules only, and of these only rows that preparation would put into
training.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import xxhash

from ratchet.config.data import PrepareConfig, PydocSource
from ratchet.config.params import Config
from ratchet.config.training import BaseConfig, DemoBase
from ratchet.data.dedup import Clusters, split_by_hash
from ratchet.data.examples import Example, Message, make_example
from ratchet.errors import BaseModelError, DataError
from ratchet.files import read_json, require_space, sha256_file, whole_folder, write_json, write_text
from ratchet.models.chat_template import ChatFormat
from ratchet.models.loading import MANIFEST, load_tokenizer
from ratchet.models.probe import prove_base
from ratchet.pipeline.stage import run_stage, say
from ratchet.sources.pydoc import harvest

# Ids of the rows that the base was trained on, so that evaluation can prove that it tests on none of them.
SEEN = "seen.txt"


class NewToken(TypedDict):
    """A word that became one token, and the pieces that it was."""

    token: str
    id: int
    pieces: list[int]


class Details(TypedDict, total=False):
    """What a base's manifest says by its kind: `weights` are a hub's, `rows` and `modules` the demo's."""

    context: int  # positions, in tokens
    vocab_size: int
    weights: dict[str, str]  # sha256 of each file
    rows: int
    modules: list[str]
    new_tokens: list[NewToken]


class BaseManifest(Details):
    model: str
    revision: str | None
    files: dict[str, str]  # sha256 of each


def make_base(out: Path, config: Config) -> BaseManifest:
    """Write the base and return its manifest. Raises BaseModelError, DataError, DivergenceError."""
    require_space(out.parent, 200 * 2**20, "the base model")
    with whole_folder(out) as folder:
        details = (
            _make_demo(folder, config.base, config.prepare)
            if config.base.model == "demo"
            else _take_from_hub(folder, config.base)
        )
        if config.base.new_tokens:
            details |= add_tokens(folder, config.base.new_tokens)
        manifest: BaseManifest = {
            "model": config.base.model,
            "revision": config.base.revision,
            **details,
            "files": {
                str(path.relative_to(folder)): sha256_file(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            },
        }
        write_json(folder / MANIFEST, manifest)
        prove_base(folder, config)
        manifest = read_json(folder / MANIFEST)
    return manifest


def add_tokens(folder: Path, words: list[str]) -> Details:
    """Add tokens to the tokenizer; the weights grow when they are loaded.

    Raises BaseModelError: a word is one token already.
    """
    from transformers import AddedToken

    tokenizer = load_tokenizer(folder)
    pieces = [list(map(int, tokenizer.encode(word, add_special_tokens=False))) for word in words]
    # Within a sentence a blank precedes it, and many tokenizers have a token for both together.
    if known := [
        word
        for word, ids in zip(words, pieces, strict=True)
        if min(len(ids), len(tokenizer.encode(f" {word}", add_special_tokens=False))) < 2
    ]:
        raise BaseModelError(
            f"`base.new_tokens` names {known[0]!r}, which is one token of this base already",
            remedy="take it out of the list",
        )
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in words])
    ids = [int(tokenizer.convert_tokens_to_ids(word)) for word in words]
    tokenizer.save_pretrained(folder)
    say(f"base: {len(words)} new tokens, which were {sum(map(len, pieces))} pieces")
    return {
        "vocab_size": len(tokenizer),
        "new_tokens": [
            {"token": word, "id": id, "pieces": of} for word, id, of in zip(words, ids, pieces, strict=True)
        ],
    }


# --- a hub's model ---


def _take_from_hub(folder: Path, config: BaseConfig) -> Details:
    snapshot = _snapshot(config)
    name = f"{config.model}@{config.revision}"
    weights, missing = _weights(snapshot)
    if not weights:
        pickled = sorted(
            path.name
            for path in snapshot.iterdir()
            if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")
        )
        raise BaseModelError(
            f"{name} holds no safetensors (found {pickled or 'no weights'})",
            remedy="take a model, or a revision, with safetensors: pickles are never loaded",
        )
    if missing:
        raise BaseModelError(
            f"{name} is in the hub's cache in part: {len(missing)} of its weight files are missing,"
            f" the first {missing[0]}",
            remedy=_fetch_command(config),
        )
    settings = _read_settings(snapshot, name)
    tokenizer = load_tokenizer(snapshot)
    if config.chat_template:
        tokenizer.chat_template = _read_template(Path(config.chat_template))
    ChatFormat(tokenizer)
    tokenizer.save_pretrained(folder)
    return {
        "context": int(getattr(settings, "max_position_embeddings", 2048)),
        "vocab_size": int(settings.vocab_size),
        "weights": {path.name: sha256_file(path) for path in weights},
    }


def _read_settings(snapshot: Path, name: str) -> Any:
    """Read the text model's config.

    Raises BaseModelError: the model brings code of its own, which is never run, or transformers does not know
    it.
    """
    from transformers import AutoConfig

    for path in (snapshot / "config.json", snapshot / "tokenizer_config.json"):
        if path.exists() and "auto_map" in read_json(path):
            raise BaseModelError(
                f"{name} wants to run its own code (auto_map in {path.name})",
                remedy="take a model whose architecture transformers knows; remote code is never run",
            )
    try:
        return AutoConfig.from_pretrained(
            snapshot, trust_remote_code=False, local_files_only=True
        ).get_text_config()
    except (ValueError, OSError, KeyError) as error:
        raise BaseModelError(
            f"{name} has a config.json that transformers {version('transformers')} cannot read:"
            f" {str(error).splitlines()[0]}",
            remedy="take another model",
        ) from None


def _weights(snapshot: Path) -> tuple[list[Path], list[str]]:
    """Return the safetensors that are there, and the names of those that the index lists and are not."""
    there = sorted(snapshot.glob("*.safetensors"))
    index = snapshot / "model.safetensors.index.json"
    listed = set(read_json(index)["weight_map"].values()) if index.exists() else set()
    return there, sorted(listed - {path.name for path in there})


def _snapshot(config: BaseConfig) -> Path:
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
        weights, missing = _weights(cached)
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
            remedy=f"{_fetch_command(config)}; a gated model needs HF_TOKEN in the environment;"
            " or set `base.model: demo`",
        ) from None


def _fetch_command(config: BaseConfig) -> str:
    return f"with network: hf download {config.model} --revision {config.revision}"


def _read_template(path: Path) -> str:
    if not path.exists():
        raise BaseModelError(
            f"`base.chat_template` names {path}, which does not exist",
            remedy="a path counts from the repository's root; commit the file",
        )
    return path.read_text(encoding="utf-8")


# --- the demo's own ---


def _make_demo(folder: Path, config: BaseConfig, splits: PrepareConfig) -> Details:
    from ratchet.demo.base_model import make_tokenizer, pretrain

    rows = reading(config.demo, splits)
    tokenizer = make_tokenizer(rows, config.demo)
    tokenizer.save_pretrained(folder)
    write_text(folder / SEEN, "".join(f"{row.id}\n" for row in rows))
    model = pretrain(rows, ChatFormat(tokenizer), config)
    model.save_pretrained(folder, safe_serialization=True)
    return {
        "context": config.demo.context,
        "vocab_size": len(tokenizer),
        "rows": len(rows),
        "modules": sorted({str(row.meta["module"]) for row in rows}),
    }


def reading(demo: DemoBase, splits: PrepareConfig) -> list[Example]:
    """Select the base's rows: training rows of its share of the modules. Raises DataError: none are left.

    A row that follows a neighbour into training against its own hash stays out: the golden set is chosen by
    that hash.
    """
    clusters = Clusters(splits)
    rows = []
    for row in harvest(PydocSource(packages=demo.packages)):
        example = make_example([Message(**message) for message in row["messages"]], row["meta"])
        if clusters.place(example).side == "train" == split_by_hash(example.id, splits) and _is_read(
            str(row["meta"]["module"]), demo.module_share
        ):
            rows.append(example)
    if not rows:
        raise DataError(
            f"`base.demo.packages` {demo.packages} gives no rows to pre-train on",
            remedy="name packages with documented modules there",
        )
    return rows


def _is_read(module: str, share: float) -> bool:
    return xxhash.xxh3_64_intdigest(module.encode()) % 10_000 < share * 10_000


def _main(config: Config, arguments: argparse.Namespace) -> None:
    manifest = make_base(arguments.out, config)
    say(f"base: {manifest['model']}, {manifest['vocab_size']} tokens, context {manifest['context']}")


if __name__ == "__main__":
    run_stage(__doc__, ["out"], _main)
