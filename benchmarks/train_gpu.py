"""Measure training on a GPU: tokens per second, share of the measured matmul peak, and peak memory, for the
usual recipe, TRL's packing and our own path in turn.

    python -m benchmarks.train_gpu [--shape llama-3-8b] [--method qlora] [--length 2048] [--seconds 60] \
        [--json]

Random weights of the named shape, made from its config, so nothing is downloaded (the 8B one needs 16 GB of
disk). Activations are checkpointed in every arm. `of_peak` is the rate of operations, at 6 for each weight
and computed position (two forward passes, since activations are computed again, and a backward pass for the
activations alone, since weights are frozen), relative to that of a large bfloat16 product on the same
machine. `--shape tiny` runs everywhere, for the test; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.train import SMALL, Setup, measure, prepare, run_arm

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "tiny": {
        **SMALL,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}
ARMS = ("usual", "trl_packed", "ratchet")


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--method", choices=("lora", "qlora"), default="qlora")
    parser.add_argument("--length", type=int, default=2048, help="longest row and window, in tokens")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and arguments.shape != "tiny":
        raise SystemExit("no GPU with CUDA here; `--shape tiny` shows that the script runs")
    setup = Setup(
        length=arguments.length,
        batch=1,
        accumulate=1,
        packed=arguments.length,
        method=arguments.method,
        cuda=cuda,
    )
    if arguments.one:
        run_arm(arguments.one[0], Path(arguments.one[1]), arguments.seconds, setup)
        return
    peak = matmul_peak(4096 if cuda else 256)
    if not arguments.json:
        print(
            f"bfloat16 matmul peak: {peak / 1e12:.3f} TFLOP/s\n\n| arm | learned tokens a second |"
            " utilisation | of peak | peak MiB |\n|---|---|---|---|---|"
        )
    with tempfile.TemporaryDirectory() as folder:
        prepare(
            Path(folder),
            arguments.rows,
            SHAPES[arguments.shape],
            arguments.length,
            "bfloat16" if cuda else "float32",
        )
        weights = num_weights(Path(folder) / "base")
        kept = [
            "--shape",
            arguments.shape,
            "--method",
            arguments.method,
            "--length",
            str(arguments.length),
            "--seconds",
            str(arguments.seconds),
        ]
        for arm in arguments.arms.split(","):
            found = measure(arm, ["-m", "benchmarks.train_gpu", "--one", arm, folder, *kept])
            found["of_peak"] = found["positions_per_second"] * 6 * weights / peak
            if arguments.json:
                print(json.dumps({"arm": arm, **found, "matmul_peak": peak}), flush=True)
            else:
                print(
                    f"| {arm} | {found['tokens_per_second']:,.0f} | {found['utilisation']:.0%} |"
                    f" {found['of_peak']:.1%} | {found['peak_mib']:,.0f} |",
                    flush=True,
                )


def matmul_peak(size: int) -> float:
    """Return the operations per second of a square bfloat16 product, the best of ten tries."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(4):
            left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - began))
    return best


def num_weights(base: Path) -> int:
    """Count the weights of layers and output; embeddings do not count, since a look-up is no product."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    total: int = sum(weight.numel() for weight in model.parameters())
    return total - (0 if config.tie_word_embeddings else int(config.vocab_size * config.hidden_size))


if __name__ == "__main__":
    main()
