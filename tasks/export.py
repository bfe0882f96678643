"""Export a version for other programs, merged or as GGUF in float16, 8 or 4 bits, and check the result.

This is no stage. The written files are loaded again by transformers' own reader and asked the same rows as
the adapter. `merged` and `gguf` must answer as the adapter does, within the tolerance of the section
`parity`. `int8` and `int4` are lossy: their weights must equal the merged model's up to rounding, and the
scores show what the rounding costs.
"""

from __future__ import annotations

import gc
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from msgspec import UNSET, UnsetType

from ratchet.config.evaluation import ParityConfig
from ratchet.config.params import Config
from ratchet.errors import BaseModelError, DataError, UserError
from ratchet.evaluation.metrics import exact_match
from ratchet.evaluation.report import decode_metrics
from ratchet.evaluation.statistics import Interval, Values, bootstrap_mean, wilson
from ratchet.files import (
    read_json,
    require_space,
    sha256_file,
    sha256_json,
    whole_folder,
    write_json,
    write_text,
)
from ratchet.models.adapters import load_trained
from ratchet.models.chat_template import ChatFormat, encode_last_answer
from ratchet.models.generation import answer_likelihoods
from ratchet.models.gguf import FILE, KINDS, load_gguf, require_gguf, require_writable, write_gguf
from ratchet.models.loading import load_chat, load_full, load_tokenizer, quiet, read_model_config
from ratchet.models.manifests import (
    MANIFEST,
    BaseName,
    read_base_manifest,
    read_trained_manifest,
    write_generation,
)
from ratchet.models.merging import load_merged, require_mergeable
from ratchet.models.processors import copy_processor, kinds_read, reads_media
from ratchet.parity.check import Asked, Reference, make_reference
from ratchet.parity.compare import compare_answers
from ratchet.parity.paths import Answer, differences, model_answers, model_forward
from ratchet.parity.report import Part
from ratchet.reporting.model_card import ExportScores, hub_card, score_table
from ratchet.serving.version_source import Source

CARD, RECORD = "README.md", "export.json"
# Largest relative change of a layer's weights (root mean square). Rounding normally distributed weights
# changes them by 0.006 in 8 bits and by 0.09 in 4.
LOSS = {"int8": 0.02, "int4": 0.2}
PACKAGES = ("torch", "transformers", "peft", "gguf")


class Scores(NamedTuple):
    """One value per row of each score; `answer_nll` is in nats per token of the wanted answer."""

    exact_match: Values
    answer_nll: Values


class Prompts(msgspec.Struct, frozen=True):
    """Numbers of all prompts, and of those that are `alike` when a program tokenizes them in one piece."""

    rows: int
    alike: int


class Check(Part, frozen=True):
    """The comparison with the adapter, and a layer's largest relative loss by rounding."""

    largest_loss: float | UnsetType = UNSET


class Base(BaseName, frozen=True):
    """The name of the base, with the sha256 of its manifest."""

    sha256: str = ""


class Record(msgspec.Struct, frozen=True):
    """The content of export.json; `files` maps names to sha256."""

    name: str
    version: str
    to: str
    commit: str
    method: str
    adapter_sha256: str
    base: Base
    check: Check
    scores: ExportScores
    environment: dict[str, str]  # versions of packages
    prompts: Prompts
    files: dict[str, str] = {}


def export(source: Source, to: str, out: Path, config: Config) -> Record:
    """Write the folder `out` and return the content of its export.json.

    Raises as `require_exportable`, DataError without a test row, and BaseModelError when the result does not
    compute what the adapter does. No file is left in these cases.
    """
    require_exportable(source, to, out)
    asked, bundle = _ask(source, config), source.bundle
    with quiet():
        merged = load_merged(bundle.base, bundle.adapter)
        require_space(
            out.parent,
            sum(weights.numel() * weights.element_size() for weights in merged.parameters()),
            f"the export {to}",
        )
        reference, ours = _adapter_side(source, asked)
        with whole_folder(out) as folder:
            losses = _write(to, merged, folder, source, asked.theirs)
            dtype = merged.dtype
            merged = None  # its memory is needed to load the written files
            gc.collect()
            part, theirs = _exported_side(
                to, folder, asked, reference, config.parity, half=dtype != torch.float32
            )
            if part.mismatches and to not in LOSS:
                raise BaseModelError(
                    f"what came out is not the adapter: {part.reason}",
                    remedy="nothing was written; serve the adapter, "
                    "or raise the tolerance of `parity` if you know why",
                )
            record = _record(source, to, part, _compare(ours, theirs), losses, _count_prompts(asked))
            record = _describe(folder, source, record)
            for path in filter(Path.is_file, folder.rglob("*")):
                path.chmod(0o644)  # some libraries write files that only their owner may read
    return record


def require_new(out: Path, to: str) -> None:
    """Raise UserError when `out` exists, or the package that writes this form is missing."""
    if to in KINDS:
        require_gguf()
    if out.exists():
        raise UserError(f"{out} exists already", remedy="name a folder that does not, or remove it")


def require_exportable(source: Source, to: str, out: Path) -> None:
    """Raise UserError as `require_new`, and for a version that has no such form; no weights are loaded."""
    require_new(out, to)
    bundle = source.bundle
    require_mergeable(bundle.adapter)
    if to not in KINDS:
        return
    if reads_media(bundle.base):
        raise UserError(
            "a GGUF file holds the language model alone, and this version reads pictures or sound",
            remedy="`--to merged` writes the whole model with its processor",
        )
    require_writable(read_model_config(bundle.base), load_tokenizer(bundle.adapter))


def _ask(source: Source, config: Config) -> Asked:
    chat = load_chat(source.bundle.adapter, source.media)
    rows = [row for row in source.rows if len(chat.encode(row).ids) <= source.bundle.max_length]
    if not rows:
        raise DataError(
            "there is no test row to check an export on",
            remedy="raise `prepare.test_share`, or ingest more rows",
        )
    rows = sorted(rows, key=lambda row: row.id)[: config.parity.rows]
    return Asked(rows, chat, chat, source.bundle.generation.max_new_tokens, config.evaluate.batch_size)


def _adapter_side(source: Source, asked: Asked) -> tuple[Reference, Scores]:
    model = load_trained(source.bundle.base, source.bundle.adapter).eval()
    reference = make_reference(model, asked)
    return reference, _score(model, asked, reference.answers)


def _write(to: str, merged: Any, folder: Path, source: Source, chat: ChatFormat) -> dict[str, float]:
    """Write the weights and the files beside them; return each layer's loss for `int8` and `int4`."""
    if to == "merged":
        base = read_base_manifest(source.bundle.base)
        merged.config.name_or_path = base.model if base.revision else base.name or base.model
        merged.save_pretrained(folder, safe_serialization=True)
        chat.tokenizer.save_pretrained(folder)
        copy_processor(source.bundle.adapter, folder)
        write_generation(folder, chat.stop_ids, chat.pad_id)
        return {}
    write_gguf(
        merged,
        chat.tokenizer,
        folder / FILE,
        name=f"{source.bundle.name} {source.label}",
        stop_id=chat.stop_id,
        kind=to,
    )
    return _measure_losses(merged, load_gguf(folder), LOSS[to]) if to in LOSS else {}


def _measure_losses(merged: Any, loaded: Any, most: float) -> dict[str, float]:
    """Return each layer's relative loss. Raises BaseModelError when one is over `most` or NaN."""
    theirs, found = loaded.state_dict(), {}
    for name, weights in merged.state_dict().items():
        ours = weights.float()
        apart = (theirs[name].float() - ours.to(theirs[name].device)).norm()
        found[name] = float(apart / ours.norm().clamp(min=1e-12))
    if odd := [name for name, share in found.items() if not share <= most]:
        raise BaseModelError(
            f"what came out is not the adapter: {len(odd)} layers differ by more than rounding, "
            f"the first {odd[0]} by {found[odd[0]]:.2g}",
            remedy="nothing was written",
        )
    return found


def _exported_side(
    to: str, folder: Path, asked: Asked, reference: Reference, config: ParityConfig, *, half: bool
) -> tuple[Part, Scores]:
    loaded: Any = (load_gguf(folder) if to in KINDS else load_full(folder)).eval()
    answers = model_answers(
        loaded, asked.ours, asked.prompts, tools=asked.tools, media=asked.media, **asked.greedy
    )
    apart = differences(
        model_forward(loaded), loaded.device, reference.answers, reference.tops, **asked.batches
    )
    rounded = half or reference.half or to in KINDS  # a GGUF's weights are float16 at most
    tolerance = config.half_tolerance if rounded else config.tolerance
    part = compare_answers(
        f"the file ({to})", asked.ids, *reference[:2], answers, apart, tolerance, asked.ours, asked.ours
    )
    return part, _score(loaded, asked, answers)


def _score(model: Any, asked: Asked, answers: list[Answer]) -> Scores:
    rows = zip(asked.rows, asked.prompts, strict=True)
    wholes = [encode_last_answer(asked.ours, row, prompt) for row, prompt in rows]
    found = answer_likelihoods(
        model, wholes, pad_id=asked.ours.pad_id, batch_size=asked.batch_size, inputs=asked.ours.inputs
    )
    matches = [exact_match(answer.text, row.answer) for answer, row in zip(answers, asked.rows, strict=True)]
    return Scores(np.array(matches), np.array([one.nll / one.tokens for one in found]))


def _compare(ours: Scores, theirs: Scores) -> ExportScores:
    adapter, export = (
        {"exact_match": wilson(side.exact_match, alpha=0.025), "answer_nll": _mean(side.answer_nll)}
        for side in (ours, theirs)
    )
    pairs = zip(Scores._fields, ours, theirs, strict=True)
    apart = {name: _mean(after - before) for name, before, after in pairs}
    return ExportScores(len(ours.answer_nll), adapter, export, apart)


def _mean(values: Values) -> Interval:
    return bootstrap_mean(values, alpha=0.025, resamples=1000, seed=0)


def _count_prompts(asked: Asked) -> Prompts:
    """Count the prompts that keep their trained token ids in a program that tokenizes them in one piece."""
    chat = asked.ours
    alike = [
        chat.encode_whole(row.prompt, row.tools) == chat.encode_prompt(row.prompt, row.tools)
        for row in asked.rows
    ]
    return Prompts(len(asked.rows), sum(alike))


def _record(
    source: Source, to: str, part: Part, scores: ExportScores, losses: dict[str, float], prompts: Prompts
) -> Record:
    manifest, base = read_trained_manifest(source.bundle.adapter), source.bundle.base
    return Record(
        name=source.bundle.name,
        version=source.label,
        to=to,
        commit=source.commit,
        method=manifest.adapter.method,
        adapter_sha256=manifest.adapter_sha256,
        base=Base(**msgspec.structs.asdict(manifest.base), sha256=sha256_json(read_json(base / MANIFEST))),
        check=Check(**msgspec.structs.asdict(part), largest_loss=max(losses.values(), default=UNSET)),
        scores=scores,
        environment={package: version(package) for package in PACKAGES if package != "gguf" or to in KINDS},
        prompts=prompts,
    )


def _describe(folder: Path, source: Source, record: Record) -> Record:
    """Write the card, then the record, whose existence means that the folder is complete."""
    name, label = source.bundle.name, source.label
    manifest, metrics = read_trained_manifest(source.bundle.adapter), decode_metrics(source.metrics)
    facts = {
        "version": f"{name} {label}",
        "git commit": source.commit,
        "adapter": f"sha256 {record.adapter_sha256}",
    }
    card = hub_card(
        name,
        label,
        record.to,
        manifest,
        metrics,
        source.decision,
        facts,
        scores=record.scores,
        reads=kinds_read(source.bundle.base),
    )
    write_text(folder / CARD, card)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}
    record = msgspec.structs.replace(record, files=files)
    write_json(folder / RECORD, msgspec.to_builtins(record))
    return record


def tell(record: Record, out: Path) -> list[str]:
    """Return the result in lines for people."""
    check, prompts = record.check, record.prompts
    lines = [
        f"{record.name} {record.version} as {record.to} in {out}: {len(record.files)} files",
        f"  {check.reason}",
    ]
    if check.largest_loss is not UNSET:
        lines.append(f"  a layer's weights moved by {check.largest_loss:.2%} at most, by rounding")
    if prompts.alike < prompts.rows:
        lines.append(
            f"  {prompts.rows - prompts.alike} of {prompts.rows} prompts are other tokens where template and "
            "words are tokenised in one piece, as other programs do: see docs/export.md"
        )
    table = score_table(record.to, record.scores)
    return [*lines, *(f"  {line}" for line in table if line)]
