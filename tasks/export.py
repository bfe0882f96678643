"""A version in the form that other programs read: merged, or as GGUF in float16, 8 or 4 bits; checked against the adapter before it is there.

A flow's task, not a stage. What is written is loaded again, from its files and by transformers' own reader, and asked the rows that
the adapter is asked. `merged` and `gguf` must answer as it does, within the tolerance of the section `parity`; `int8` and `int4` lose
something by design: their weights must be the adapter's up to rounding, and the scores tell what that costs.
"""

from __future__ import annotations

import gc
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ratchet.config.evaluation import ParityConfig
from ratchet.config.params import Config
from ratchet.data.examples import Example
from ratchet.errors import BaseModelError, DataError, UserError
from ratchet.evaluation.metrics import exact_match
from ratchet.evaluation.statistics import Values, bootstrap_mean, wilson
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
from ratchet.models.chat_template import ChatFormat, Encoded
from ratchet.models.generation import answer_likelihoods
from ratchet.models.gguf import FILE, KINDS, load_gguf, require_gguf, write_gguf
from ratchet.models.loading import MANIFEST, load_full, load_tokenizer, quiet
from ratchet.models.merging import load_merged
from ratchet.parity.check import Asked, Reference, make_reference
from ratchet.parity.compare import Part, compare_answers
from ratchet.parity.paths import Answer, differences, model_answers, model_forward
from ratchet.reporting.model_card import hub_card, score_table
from ratchet.serving.version_source import Source

CARD, RECORD = "README.md", "export.json"
LOSS = {
    "int8": 0.02,
    "int4": 0.2,
}  # of a layer's weights, root mean square, relative: rounding of normal weights is 0.006 and 0.09
PACKAGES = ("torch", "transformers", "peft", "gguf")


class Scores(NamedTuple):
    """A value a row."""

    exact_match: Values
    answer_nll: Values


def export(source: Source, to: str, out: Path, config: Config) -> dict[str, Any]:
    """Returns what `export.json` says. Raises UserError: this cannot be made of it; BaseModelError: what came out is not the adapter. Then nothing is left."""
    if to in KINDS:
        require_gguf()
    if out.exists():
        raise UserError(f"{out} exists already", remedy="name a folder that does not, or remove it")
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
            lost = _write(to, merged, folder, source, asked.theirs)
            dtype = merged.dtype
            merged = None
            gc.collect()
            part, theirs = _exported_side(
                to, folder, asked, reference, config.parity, half=dtype != torch.float32
            )
            if part.mismatches and to not in LOSS:
                raise BaseModelError(
                    f"what came out is not the adapter: {part.reason}",
                    remedy="nothing was written; serve the adapter, or raise the tolerance of `parity` if you know why",
                )
            record = _record(source, to, part, _compare(ours, theirs), lost) | {"prompts": _prompts(asked)}
            _describe(folder, source, to, record)
            for path in folder.iterdir():
                path.chmod(0o644)  # some libraries write for their own user alone
    return record


def _ask(source: Source, config: Config) -> Asked:
    chat = ChatFormat(load_tokenizer(source.bundle.adapter))
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
    """Returns the relative loss by layer of `int8` and `int4`."""
    if to == "merged":
        merged.config.name_or_path = read_json(source.bundle.base / MANIFEST)["model"]
        merged.save_pretrained(folder, safe_serialization=True)
        chat.tokenizer.save_pretrained(folder)
        return {}
    write_gguf(
        merged,
        chat.tokenizer,
        folder / FILE,
        name=f"{source.bundle.name} {source.label}",
        stop_id=chat.stop_id,
        kind=to,
    )
    return _loss(merged, load_gguf(folder), LOSS[to]) if to in LOSS else {}


def _loss(merged: Any, loaded: Any, most: float) -> dict[str, float]:
    """Raises BaseModelError: a layer came back as something else."""
    theirs, found = loaded.state_dict(), {}
    for name, weights in merged.state_dict().items():
        apart = (
            theirs[name].float() - weights.float().to(theirs[name].device)
        ).norm() / weights.float().norm().clamp(min=1e-12)
        found[name] = float(apart)
    if odd := [name for name, share in found.items() if not share <= most]:
        raise BaseModelError(
            f"what came out is not the adapter: {len(odd)} layers differ by more than rounding, the first {odd[0]} by {found[odd[0]]:.2g}",
            remedy="nothing was written",
        )
    return found


def _exported_side(
    to: str, folder: Path, asked: Asked, reference: Reference, config: ParityConfig, *, half: bool
) -> tuple[Part, Scores]:
    loaded: Any = load_gguf(folder) if to in KINDS else load_full(folder)
    loaded = loaded.eval()
    answers = model_answers(loaded, asked.ours, asked.prompts, **asked.greedy)
    apart = differences(
        model_forward(loaded), loaded.device, reference.answers, reference.tops, **asked.batches
    )
    tolerance = (
        config.half_tolerance if half or reference.half or to in KINDS else config.tolerance
    )  # a GGUF's weights are float16 at most
    part = compare_answers(
        f"the file ({to})", asked.ids, *reference[:2], answers, apart, tolerance, asked.ours, asked.ours
    )
    return part, _score(loaded, asked, answers)


def _score(model: Any, asked: Asked, answers: list[Answer]) -> Scores:
    """Exact match, and the NLL in nats a token of the wanted answer."""
    found = answer_likelihoods(model, [_with_answer(asked.ours, row) for row in asked.rows], **asked.batches)
    return Scores(
        np.array(
            [exact_match(answer.text, row.answer) for answer, row in zip(answers, asked.rows, strict=True)]
        ),
        np.array([one.nll / one.tokens for one in found]),
    )


def _with_answer(chat: ChatFormat, row: Example) -> Encoded:
    ids, prompt = chat.encode(row).ids, len(chat.encode_prompt(row.prompt))
    return Encoded(ids, [position >= prompt for position in range(len(ids))])


def _compare(ours: Scores, theirs: Scores) -> dict[str, Any]:
    """Each with its 95 % interval, and the paired difference, export minus adapter."""
    sides = {"adapter": ours, "export": theirs}
    scores: dict[str, Any] = {
        name: {
            "exact_match": wilson(side.exact_match, alpha=0.025)._asdict(),
            "answer_nll": _mean(side.answer_nll),
        }
        for name, side in sides.items()
    }
    difference = {name: _mean(getattr(theirs, name) - getattr(ours, name)) for name in Scores._fields}
    return {"rows": len(ours.answer_nll), **scores, "difference": difference}


def _mean(values: Values) -> dict[str, float]:
    return bootstrap_mean(values, alpha=0.025, resamples=1000, seed=0)._asdict()


def _prompts(asked: Asked) -> dict[str, int]:
    """In how many a program that tokenises a rendered prompt in one piece sees what was trained."""
    alike = sum(
        asked.ours.encode_whole(row.prompt) == asked.ours.encode_prompt(row.prompt) for row in asked.rows
    )
    return {"rows": len(asked.rows), "alike": alike}


def _record(
    source: Source, to: str, part: Part, scores: dict[str, Any], lost: dict[str, float]
) -> dict[str, Any]:
    manifest = read_json(source.bundle.adapter / MANIFEST)
    return {
        "name": source.bundle.name,
        "version": source.label,
        "to": to,
        "commit": source.commit,
        "method": manifest["adapter"]["method"],
        "adapter_sha256": manifest["adapter_sha256"],
        "base": {**manifest["base"], "sha256": sha256_json(read_json(source.bundle.base / MANIFEST))},
        "check": {**part.as_dict(), **({"largest_loss": max(lost.values())} if lost else {})},
        "scores": scores,
        "environment": {
            package: version(package) for package in PACKAGES if package != "gguf" or to in KINDS
        },
    }


def _describe(folder: Path, source: Source, to: str, record: dict[str, Any]) -> None:
    """The card, and last the record: its existence says that the folder is whole."""
    manifest = read_json(source.bundle.adapter / MANIFEST)
    facts = {
        "version": f"{source.bundle.name} {source.label}",
        "git commit": source.commit,
        "adapter": f"sha256 {record['adapter_sha256']}",
    }
    write_text(
        folder / CARD,
        hub_card(
            source.bundle.name,
            source.label,
            to,
            manifest,
            source.metrics,
            source.decision,
            facts,
            scores=record["scores"],
        ),
    )
    record["files"] = {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_json(folder / RECORD, record)


def tell(record: dict[str, Any], out: Path) -> list[str]:
    """For people."""
    check = record["check"]
    lines = [
        f"{record['name']} {record['version']} as {record['to']} in {out}: {sum(1 for _ in record['files'])} files",
        f"  {check['reason']}",
    ]
    if "largest_loss" in check:
        lines.append(f"  a layer's weights moved by {check['largest_loss']:.2%} at most, by rounding")
    if (prompts := record["prompts"])["alike"] < prompts["rows"]:
        other = prompts["rows"] - prompts["alike"]
        lines.append(
            f"  {other} of {prompts['rows']} prompts are other tokens where template and words are tokenised in one piece, as other programs do: see docs/export.md"
        )
    return [*lines, *(f"  {line}" for line in score_table(record["to"], record["scores"]) if line)]
