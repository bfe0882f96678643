"""The real model of `make demo-real` through every stage on few rows: trained, gated, served, exported.

Ten minutes on two cores, so it runs where RATCHET_REAL_MODEL is set; skipped where the package index cannot
be reached.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from stages import run_stages

from ratchet.config.data import PydocSource
from ratchet.config.params import Config
from ratchet.data.batches import write_batch
from ratchet.data.examples import Example, RawRow, read_examples
from ratchet.demo.checkout import make_values
from ratchet.demo.smollm2 import SHA256, fetch_smollm2
from ratchet.demo.story import REAL
from ratchet.engines.llama_cpp_engine import LlamaCppEngine
from ratchet.engines.local_engine import LocalEngine
from ratchet.errors import ServiceError
from ratchet.evaluation.metrics import exact_match
from ratchet.files import read_json, write_json
from ratchet.serving.bundle import Bundle, bundle_candidate
from ratchet.serving.engine import Ask, Engine, JsonForm, Piece
from ratchet.serving.version_source import Source
from ratchet.sources.pydoc import harvest
from tasks.base import make_base
from tasks.export import export

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(1800),
]
ROOT = Path(__file__).parents[2]
MODULES, EACH = ("imaplib", "mailbox", "statistics", "tarfile"), 34


@pytest.fixture(scope="module")
def model() -> Path:
    try:
        return fetch_smollm2(ROOT)
    except ServiceError as error:
        pytest.skip(f"the model cannot be fetched: {error}")


def rows() -> list[RawRow]:
    """As many rows of each module."""
    taken, found = Counter[str](), []
    for row in harvest(PydocSource(summaries=0.0)):
        module = row["messages"][1]["content"]
        if module in MODULES and taken[module] < EACH:
            taken[module] += 1
            found.append(row)
    return found


def test_a_real_model_is_trained_gated_served_and_exported(model: Path, tmp_path: Path) -> None:
    values = make_values(str(model), REAL.settings)
    values["prepare"] |= {"min_rows": 40, "test_share": 0.25, "validation_share": 0.05}
    values["train"] |= {"epochs": 3.0, "evaluations": 1}
    values["gate"] |= {"min_rows": 20}
    values["parity"] |= {"rows": 8}
    values["gateway"] |= {"engine": "llama_cpp"}
    config = Config.model_validate(values)
    base, nobody, prepared = tmp_path / "base", tmp_path / "nobody", tmp_path / "prepared"
    nobody.mkdir()
    write_json(nobody / "manifest.json", {"version": None, "batches": []})
    write_batch(
        tmp_path / "raw",
        [msgspec.json.encode(row) for row in rows()],
        source="pydoc",
        label="first",
        time="2026-01-01T00:00:00Z",
        licence="PSF-2.0",
        who="tests",
        form="messages",
    )

    manifest = make_base(base, config, tmp_path / "base.json")
    ran = run_stages(tmp_path, base, nobody, config)
    scores, verdict, candidate = ran.scores, ran.verdict, ran.candidate

    assert (manifest["model"], manifest["dequantised"], manifest["licence"]) == (
        f"sha256:{SHA256}",
        "Q4_1",
        "apache-2.0",
    )
    assert scores["candidate"]["exact_match"].mean > 0.35 > 0.2 > scores["base"]["exact_match"].mean
    assert scores["candidate"]["answer_nll"].mean < scores["base"]["answer_nll"].mean
    assert ran.compared.passed, ran.compared.parts
    assert "llama.cpp" in {part.name for part in ran.compared.parts}
    assert verdict.verdict == "promote", [check.reason for check in verdict.checks]
    bundle, test = bundle_candidate(candidate, base, config), list(read_examples(prepared / "test.jsonl"))
    answers = asyncio.run(asked(LocalEngine(config), bundle, test))
    assert share_right(answers, test) == scores["candidate"]["exact_match"].mean
    assert_llama_cpp_says_the_same(config, bundle._replace(max_length=256), test, answers, tmp_path)
    source = Source(
        "candidate", "c" * 40, bundle, test, read_json(tmp_path / "evaluation/metrics.json"), verdict
    )
    record = export(source, "int8", tmp_path / "out", config)
    assert record.check.result == "pass"
    assert (tmp_path / "out/model.gguf").stat().st_size > 100e6


async def asked(
    engine: Engine, bundle: Bundle, test: list[Example], form: JsonForm | None = None
) -> list[str]:
    """Ask an engine all rows at once."""
    try:
        await engine.load(bundle)

        async def one(row: Example) -> str:
            ask = Ask(row.id, 1, row.prompt, temperature=0.0, form=form, max_tokens=64 if form else None)
            return "".join([piece.text async for piece in engine.answer(ask) if isinstance(piece, Piece)])

        return await asyncio.gather(*map(one, test))
    finally:
        await engine.close()


def assert_llama_cpp_says_the_same(
    config: Config, bundle: Bundle, test: list[Example], answers: list[str], folder: Path
) -> None:
    """But for a tie here and there: its weights are float16."""
    theirs = asyncio.run(asked(LlamaCppEngine(config, folder), bundle, test))
    assert sum(one != other for one, other in zip(answers, theirs, strict=True)) <= 1
    schema = {"type": "object", "properties": {"kind": {"enum": ["bug", "wish"]}}, "required": ["kind"]}
    form = JsonForm(json.dumps(schema | {"additionalProperties": False}))
    for text in asyncio.run(asked(LlamaCppEngine(config, folder), bundle, test[:4], form)):
        assert json.loads(text)["kind"] in ("bug", "wish")


def share_right(answers: list[str], test: list[Example]) -> float:
    return sum(exact_match(one, row.answer) for one, row in zip(answers, test, strict=True)) / len(test)
