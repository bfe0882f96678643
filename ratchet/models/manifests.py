"""Read manifest.json and generation_config.json, in which a base or a trained version describes itself.

The manifest is written last, so a folder with a manifest is complete. Unknown keys are ignored, and keys that
an older manifest lacks have defaults.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from ratchet.errors import BaseModelError
from ratchet.files import read_json, write_json
from ratchet.privacy.ledger import Promise

MANIFEST = "manifest.json"
PROOF = Path("reports/base.json")
GENERATION = "generation_config.json"  # transformers, vLLM and others read a file of this name too


class NewToken(msgspec.Struct, frozen=True):
    """A word of `base.new_tokens`: its token id, and the ids into which the tokenizer split it before."""

    id: int
    pieces: list[int]


class BaseName(msgspec.Struct, frozen=True):
    """The identity of a base: `model` and `revision`, which do not depend on where its files were.

    `context` is in tokens; None if the base has no limit.
    """

    model: str | None = None  # a hub id, "demo", or "sha256:" with the hash of the weights
    revision: str | None = None  # only for a hub id
    context: int | None = None
    name: str = ""  # the name that a GGUF file or a version gives itself
    licence: str = "unknown"
    dequantised: str = ""  # the GGUF file's type of quantisation, such as Q4_K_M; "" for other bases


class BaseManifest(BaseName, frozen=True):
    """The manifest of a base.

    The checks of the base determine `attention`, the implementation that every loading uses, and `packs`,
    whether rows that share a window do not affect each other (ratchet/bases/probe.py).
    """

    new_tokens: list[NewToken] = []
    attention: str = "sdpa"
    packs: bool = True

    @property
    def told(self) -> str:
        """The name of the base in messages."""
        return f"{self.model}@{self.revision}" if self.revision else str(self.model)


class AdapterRecord(msgspec.Struct, frozen=True):
    """The section `adapter` of params.yaml as a training used it; defaults as in AdapterConfig."""

    method: str = "lora"
    quantisation: str = "nf4"
    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    bias: str = "none"
    modules_to_save: list[str] = []
    projector: str = "frozen"
    tower: str = "frozen"
    virtual_tokens: int = 16


class Inputs(msgspec.Struct, frozen=True):
    """What a training started from: "base", or the sha256 of the champion's adapter."""

    start: str = "base"


class Together(msgspec.Struct, frozen=True):
    """How a version was trained by the nodes of a federation, who kept their rows."""

    run: str
    nodes: list[str]
    rounds: int
    rows: int  # of all nodes that took part in the last round
    aggregation: str = "exact"
    strategy: str = "fedavg"
    secure: bool = False
    missing: float = 0.0  # share of a layer's update that the adapter's rank had no room for, at most
    epsilon: float | None = None  # spent of the privacy of a node's rows, at most, with earlier trainings
    delta: float = 0.0
    own_share: float | None = None  # of the adapter that a node trained on its own rows and mixed into it
    own_origin: str = ""  # what that adapter was trained from

    @property
    def told(self) -> str:
        seen = "the sum of updates alone was seen" if self.secure else "each node's update was seen"
        return (
            f"{len(self.nodes)} nodes ({', '.join(self.nodes)}) in {self.rounds} rounds on {self.rows} rows "
            f"that stayed there; {self.strategy}, {self.aggregation}; {seen}; "
            + (f"ε = {self.epsilon:.3g}, δ = {self.delta:g}" if self.epsilon is not None else "no ε")
            + (f", {self.told_share}" if self.own_share is not None else "")
        )

    @property
    def told_share(self) -> str:
        """Tell which share a node's own adapter has in a personal version, and where that came from."""
        of = f" of an adapter trained from {self.own_origin}" if self.own_origin else ""
        return f"own share {self.own_share:g}{of}" if self.own_share is not None else ""


class TrainedManifest(msgspec.Struct, frozen=True):
    """The manifest of a trained version; `files` maps file names to sha256."""

    adapter: AdapterRecord = AdapterRecord()
    base: BaseName = BaseName()
    adapter_sha256: str = ""
    files: dict[str, str] = {}
    run_key: str = ""
    batches: list[str] = []
    inputs: Inputs = Inputs()
    max_length: int | None = None  # longest row of the training, in tokens
    federation: Together | None = None
    taught_by: list[str] = []  # nodes whose share is in the weights, those of the start included
    privacy: Promise | None = None
    audit_canaries: int = 0


def describe_base(base: BaseName) -> str:
    """Describe a base for people: its hub id, or its name and the sha256 of its weights; and its licence."""
    if base.model == "demo" or base.model is None:
        return str(base.model)
    if base.revision:
        parts = [f"{base.model}@{base.revision}"]
    else:
        parts = [base.name, base.model] if base.name else [base.model]
    parts += [f"dequantised from {base.dequantised}"] if base.dequantised else []
    return ", ".join([*parts, f"licence {base.licence}"])


def sha256_of_weights(weights: dict[str, str]) -> str:
    """Return one sha256 for several weight files (name → sha256), as `sha256sum *.safetensors | sha256sum`.

    For a single file it is the file's own.
    """
    if len(weights) == 1:
        return next(iter(weights.values()))
    lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(weights.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


Manifest = TypeVar("Manifest", BaseManifest, TrainedManifest)


class Finding(msgspec.Struct, frozen=True):
    """The result of one check of a base: `what` was found and, for a refusal, what to do."""

    name: str
    result: Literal["ok", "adapted", "refused"]
    what: str
    remedy: str = ""


class Proof(msgspec.Struct, frozen=True):
    """The results of all checks of a base, made before anything is trained on it."""

    model: str
    findings: list[Finding]

    @property
    def refused(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.result == "refused"]

    def page(self) -> list[str]:
        """Return the findings as lines of text, for people."""
        width = max(len(finding.name) for finding in self.findings)
        lines = [f"{self.model}:"]
        for finding in self.findings:
            lines.append(f"  {finding.name:{width}}  {finding.result:7}  {finding.what}")
            lines += [f"  {'':{width}}           → {finding.remedy}"] if finding.remedy else []
        return lines


class GenerationRecord(msgspec.Struct, frozen=True):
    """How a version generates answers, in every program: greedily, until one of the end tokens.

    The file has transformers' own format, so that other programs decode as the evaluation did.
    """

    eos_token_id: list[int] = []
    pad_token_id: int | None = None
    do_sample: bool = False


def write_generation(folder: Path, ends: Iterable[int], pad: int) -> None:
    """Write the generation settings of the base or version in `folder`, replacing any others."""
    record = GenerationRecord(sorted(ends), pad)
    write_json(folder / GENERATION, msgspec.to_builtins(record))


def read_ends(folder: Path) -> list[int]:
    """Return the end tokens of the base or version in `folder`; none if an older version records none."""
    if not (folder / GENERATION).exists():
        return []
    ends = read_json(folder / GENERATION).get("eos_token_id")
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def read_base_manifest(folder: Path) -> BaseManifest:
    """Return the manifest of the base in `folder`. Raises RatchetError."""
    return _read(folder, BaseManifest)


def read_trained_manifest(folder: Path) -> TrainedManifest:
    """Return the manifest of the trained version in `folder`. Raises RatchetError."""
    return _read(folder, TrainedManifest)


def _read(folder: Path, kind: type[Manifest]) -> Manifest:
    try:
        return msgspec.convert(read_json(folder / MANIFEST), kind)
    except msgspec.ValidationError as error:
        raise BaseModelError(
            f"{folder / MANIFEST} is no manifest: {error}",
            remedy="dvc pull, or `ratchet retrain` makes it anew",
        ) from None
