"""Fetch the base model that `base.model` names, or pre-train `demo`, a small Llama, on documentation.

    python -m tasks.base --out models/base --proof reports/base.json

Writes the tokenizer, the chat template, manifest.json and the weights; the weights of a hub id stay in the
hub's cache. The proof lists what was checked of the base; it is a separate file, because training settings
change it but no file of the base. The demo's base reads only a share of the modules, and of these only rows
that preparation would put into training.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypedDict

import msgspec
import xxhash

from ratchet.bases.dequantise import dequantise
from ratchet.bases.files import BaseFiles, Source, copy_files, read_base_files, read_tokenizer
from ratchet.bases.probe import Facts, prove_base
from ratchet.bases.source import find_base
from ratchet.config.data import PrepareConfig, PydocSource
from ratchet.config.params import Config
from ratchet.config.training import VERSION, BaseConfig, DemoBase, kind_of_base
from ratchet.data.dedup import Clusters, split_by_hash
from ratchet.data.examples import Example, Message, make_example
from ratchet.errors import BaseModelError, DataError
from ratchet.files import require_space, sha256_file, whole_folder, write_json, write_text
from ratchet.models.chat_template import ChatFormat
from ratchet.models.gguf import FILE as GGUF_FILE
from ratchet.models.loading import MANIFEST, adapter_sha256, load_tokenizer, quiet
from ratchet.models.manifests import BaseName, describe_base, read_base_manifest, sha256_of_weights
from ratchet.models.merging import load_merged
from ratchet.models.processors import copy_processor, load_processor
from ratchet.pipeline.stage import project_root, run_stage, say
from ratchet.pipeline.workspace import require_output
from ratchet.promotion.champion import last_entry
from ratchet.sources.pydoc import harvest

# File with the ids of the rows that the base was trained on, so that evaluation can leave them out.
SEEN = "seen.txt"


class NewToken(TypedDict):
    """A word of `base.new_tokens`: its token, and the ids of the tokens that it was split into before."""

    token: str
    id: int
    pieces: list[int]


class Details(TypedDict, total=False):
    """The keys of a base's manifest that depend on its kind; only the demo has `rows` and `modules`."""

    model: str  # a hub id, `demo`, or `sha256:` with the hash of the weights; never a path
    revision: str | None  # the hub's commit
    name: str  # what a GGUF file or a version calls itself
    licence: str
    dequantised: str  # the GGUF file's type of quantisation
    context: int  # positions, in tokens
    vocab_size: int
    weights: dict[str, str]  # sha256 of each file
    rows: int
    modules: list[str]
    new_tokens: list[NewToken]


class BaseManifest(Details, Facts):
    files: dict[str, str]  # sha256 of each


def make_base(out: Path, config: Config, proof: Path | None = None) -> BaseManifest:
    """Write the base and return its manifest. Raises BaseModelError, DataError, DivergenceError."""
    require_space(out.parent, 200 * 2**20, "the base model")
    with whole_folder(out) as folder:
        kind = kind_of_base(config.base.model)
        if kind == "demo":
            details = _make_demo(folder, config.base, config.prepare)
        elif kind == "version":
            details = _merge_version(folder, config.base)
        else:
            details = _take(folder, config.base)
        if config.base.new_tokens:
            details |= add_tokens(folder, config.base.new_tokens)
        write_json(folder / MANIFEST, details)  # the proof loads the base, which needs a manifest
        proven, facts = prove_base(folder, config)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
        known = details.get("weights", {})  # not hashed again: for a model of 8B it takes half a minute
        files = {
            name: known.get(name) or sha256_file(path)
            for path in paths
            if (name := path.relative_to(folder).as_posix())
        }
        manifest: BaseManifest = {**details, **facts, "files": files}
        write_json(folder / MANIFEST, manifest)
    if proof:
        write_json(proof, msgspec.to_builtins(proven))
    return manifest


def add_tokens(folder: Path, words: list[str]) -> Details:
    """Add each word to the tokenizer as one token; the embeddings grow whenever the weights are loaded.

    Raises BaseModelError for a word that is one token already.
    """
    from transformers import AddedToken

    tokenizer = load_tokenizer(folder)
    pieces = [list(map(int, tokenizer.encode(word, add_special_tokens=False))) for word in words]
    # Within a sentence a blank precedes the word, and many tokenizers have one token for both together.
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
    ids: list[int] = tokenizer.convert_tokens_to_ids(words)  # type: ignore[assignment]  # a list gives a list
    tokenizer.save_pretrained(folder)
    say(f"base: {len(words)} new tokens, which were {sum(map(len, pieces))} pieces")
    return {
        "vocab_size": len(tokenizer),
        "new_tokens": [
            {"token": word, "id": id, "pieces": of} for word, id, of in zip(words, ids, pieces, strict=True)
        ],
    }


# --- a model that others made ---


def _take(folder: Path, config: BaseConfig) -> Details:
    source = find_base(config, Path.cwd(), project_root())
    say(f"base: taken from {source.told}")
    if source.path.is_file():
        return _take_gguf(folder, source, config)
    files, details = _describe(source, folder, config)
    if kind_of_base(config.model) == "hub":
        weights = {path.name: sha256_file(path) for path in files.weights}
        return {**details, "model": config.model, "revision": config.revision, "weights": weights}
    require_space(folder, sum(path.stat().st_size for path in files.weights), "the base's weights")
    return {**details, **_identify(copy_files(files, folder), config)}


def _take_gguf(folder: Path, source: Source, config: BaseConfig) -> Details:
    """Dequantise the GGUF file into `folder` and return the details of the base.

    The base is identified by the hash of the file, not of the dequantised weights: another version of
    transformers may round them differently.
    """
    identity = _identify({GGUF_FILE: sha256_file(source.path)}, config)
    found = dequantise(source, folder)
    _, details = _describe(source._replace(path=folder), folder, config)
    details = {**details, **identity, "name": found.name, "licence": found.licence}
    return {**details, "dequantised": found.kind} if found.lossy else details


def _describe(source: Source, folder: Path, config: BaseConfig) -> tuple[BaseFiles, Details]:
    """Check the source's files, write its tokenizer to `folder`, and return the files and their details."""
    files = read_base_files(source)
    template = _read_template(Path(config.chat_template)) if config.chat_template else None
    tokenizer = read_tokenizer(source, template)
    if files.media:
        copy_processor(source.path, folder)
    tokenizer.save_pretrained(folder)
    ChatFormat(tokenizer, processor=load_processor(folder))
    return files, {
        "licence": files.licence,
        "context": int(getattr(files.settings, "max_position_embeddings", 2048)),
        "vocab_size": int(files.settings.vocab_size),
    }


def _identify(weights: dict[str, str], config: BaseConfig) -> Details:
    """Identify a base by the hash of its weights alone, so that the same files in any folder are one base.

    Raises BaseModelError when `base.revision` names another hash.
    """
    sha256 = sha256_of_weights(weights)
    pinned = None if kind_of_base(config.model) == "hub" else config.revision
    if pinned not in (None, sha256):
        raise BaseModelError(
            f"the weights of {config.model} have sha256 {sha256}, `base.revision` wants {pinned}",
            remedy="put the right files there, or set `base.revision` to what is there, or to null",
        )
    return {"model": f"sha256:{sha256}", "revision": None, "weights": weights}


# --- a version of this project ---


def _merge_version(folder: Path, config: BaseConfig) -> Details:
    """Merge a version that is or was the champion; the ledger in git names the commit with its files.

    Raises BaseModelError when the ledger has no such version, or the adapter's hash is not the ledger's.
    """
    named = VERSION.fullmatch(config.model)
    assert named
    number = int(named[2])
    entry = last_entry(Path.cwd(), number)
    if entry is None or named[1] not in (None, entry.name):
        raise BaseModelError(
            f"`base.model: {config.model}`: the ledger of this project (champion.json) has no such version",
            remedy="`ratchet history` lists those that were in charge; any other: `ratchet export vN --to "
            "merged`, then name that folder in `base.model`",
        )
    told = f"{entry.name} v{number}"
    with TemporaryDirectory(prefix=".merge-", dir=folder.parent) as scratch:
        base, adapter = Path(scratch) / "base", Path(scratch) / "adapter"
        require_output(Path.cwd(), entry.commit, "models/base", base)
        require_output(Path.cwd(), entry.commit, "models/candidate", adapter)
        if (seen := adapter_sha256(adapter)) != entry.adapter_sha256:
            raise BaseModelError(
                f"{told} has sha256 {seen}, the ledger says {entry.adapter_sha256}",
                remedy="dvc pull; if it stays so, the cache is damaged",
            )
        licence = read_base_manifest(base).licence
        with quiet():
            load_merged(base, adapter).save_pretrained(folder, safe_serialization=True)
        load_tokenizer(adapter).save_pretrained(folder)
        copy_processor(adapter, folder)
    say(f"base: merged from {told}, commit {entry.commit[:8]}")
    files, details = _describe(Source(folder, told, "dvc pull"), folder, config)
    weights = {path.name: sha256_file(path) for path in files.weights}
    return {**details, **_identify(weights, config), "name": told, "licence": licence}


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
    if config.chat_template:
        tokenizer.chat_template = _read_template(Path(config.chat_template))
    tokenizer.save_pretrained(folder)
    write_text(folder / SEEN, "".join(f"{row.id}\n" for row in rows))
    model = pretrain(rows, ChatFormat(tokenizer), config)
    model.save_pretrained(folder, safe_serialization=True)
    return {
        "model": config.model,
        "revision": None,
        "context": config.demo.context,
        "vocab_size": len(tokenizer),
        "rows": len(rows),
        "modules": sorted({str(row.meta["module"]) for row in rows}),
    }


def reading(demo: DemoBase, splits: PrepareConfig) -> list[Example]:
    """Select the rows that the base reads: training rows of `module_share` of the modules.

    A row that is in training only because it follows a near duplicate is left out: its own hash chooses
    another split, and golden rows are chosen by that hash. Raises DataError when no row is left.
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
    manifest = make_base(arguments.out, config, arguments.proof)
    of = describe_base(msgspec.convert(manifest, BaseName))
    say(f"base: {of}, {manifest['vocab_size']} tokens, context {manifest['context']}")


if __name__ == "__main__":
    run_stage(__doc__, ["out", "proof"], _main)
