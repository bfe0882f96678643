"""Measure the seconds to score test rows for three models, with an empty and with a full cache of answers.

    python -m benchmarks.evaluate [--rows 1000] [--json]

The base has the demo's shape (`base.demo`) and random weights; candidate and champion are LoRA adapters of
`adapter.rank` on it; the rows are documentation of the standard library. Random weights seldom end an answer,
so most rows cost all of `evaluate.max_new_tokens`; a trained model is faster. Each evaluation is a process of
its own, so its imports are included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ratchet.config.data import PydocSource
from ratchet.config.params import Config, load_config
from ratchet.config.training import AdapterConfig
from ratchet.data.examples import Example, Message, encode_line, make_example
from ratchet.files import write_bytes, write_json
from ratchet.pipeline.checkout import STAGE_ENVIRONMENT


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    arguments = parser.parse_args()
    config = load_config(arguments.params)
    with tempfile.TemporaryDirectory() as folder:
        rows = prepare(Path(folder), arguments.rows, config)
        found = {name: seconds(Path(folder), arguments.params, name) for name in ("cold", "cached")}
        same = len({(Path(folder) / name / "scores.parquet").read_bytes() for name in found}) == 1
    if arguments.json:
        print(
            json.dumps(
                {
                    "rows": rows,
                    "models": 3,
                    **{f"{name}_seconds": value for name, value in found.items()},
                    "same_bytes": same,
                }
            )
        )
    else:
        print(
            f"{rows} rows, 3 models: {found['cold']:.1f} s; all answers cached: {found['cached']:.1f} s,"
            f" {'the same bytes' if same else 'OTHER BYTES'}"
        )


def prepare(folder: Path, count: int, config: Config) -> int:
    """Prepare the inputs and return the number of rows."""
    from ratchet.demo.base_model import make_tokenizer
    from ratchet.models.chat_template import ChatFormat
    from ratchet.sources.pydoc import harvest

    examples = [
        make_example([Message(**message) for message in row["messages"]], {**row["meta"], "batch": "one"})
        for row in harvest(PydocSource())
    ]
    chat = ChatFormat(make_tokenizer(examples[::4], config.base.demo))
    fitting = (row for row in examples if len(chat.encode(row).ids) <= config.base.demo.context)
    rows: list[Example] = list(fitting)
    make_models(folder, chat, config)
    write_bytes(folder / "prepared/test.jsonl", map(encode_line, rows[:count]))
    write_bytes(folder / "prepared/golden.jsonl", [])
    write_bytes(folder / "prepared/train.jsonl", map(encode_line, rows[count : count + 4000]))
    write_json(folder / "region.json", {"topics": []})
    return len(rows[:count])


def make_models(folder: Path, chat: Any, config: Config) -> None:
    import torch
    from transformers import LlamaForCausalLM

    from ratchet.demo.base_model import llama
    from ratchet.models.adapters import add_adapter, save_trained
    from ratchet.models.loading import MANIFEST, load_base

    demo = config.base.demo
    torch.manual_seed(1)
    LlamaForCausalLM(llama(demo, chat)).save_pretrained(folder / "base", safe_serialization=True)
    chat.tokenizer.save_pretrained(folder / "base")
    write_json(folder / "base" / MANIFEST, {"model": "demo", "revision": None, "context": demo.context})
    for seed, name in enumerate(("candidate", "incumbent")):
        adapter = AdapterConfig(rank=config.adapter.rank, alpha=config.adapter.alpha)
        model = add_adapter(load_base(folder / "base"), adapter, seed=seed)
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.02)
        save_trained(model, folder / "base", folder / name)
        write_json(
            folder / name / MANIFEST,
            {"version": seed, "batches": [], "adapter": adapter.model_dump(mode="json")},
        )


def seconds(folder: Path, params: Path, name: str) -> float:
    paths = {
        key: folder / place
        for key, place in {
            "prepared": "prepared",
            "base": "base",
            "incumbent": "incumbent",
            "candidate": "candidate",
            "region": "region.json",
        }.items()
    }
    flags = [
        str(part)
        for key, path in {**paths, "own": Path("metrics"), "out": folder / name, "params": params}.items()
        for part in (f"--{key}", path)
    ]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "tasks.evaluate", *flags],
        env={**STAGE_ENVIRONMENT, **os.environ, "RATCHET_ROOT": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"the evaluation failed:\n{done.stderr[-3000:]}")
    print(done.stdout, file=sys.stderr, end="")
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
