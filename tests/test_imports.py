"""What starts fast stays free of what loads slowly. Floors and cycles are import-linter's (`make lint`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SLOW = (
    "torch",
    "mlflow",
    "prefect",
    "transformers",
    "evidently",
    "peft",
    "datasets",
    "pandas",
    "sklearn",
    "matplotlib",
)


@pytest.mark.parametrize("layer", ["ratchet", "tasks", "flows"])
def test_every_layer_is_a_package_of_its_own(layer):
    """Without its `__init__.py` an installed package of the same name would win."""
    assert (ROOT / layer / "__init__.py").exists()


@pytest.mark.parametrize(
    "module",
    [
        "ratchet.config.params",
        "ratchet.errors",
        "ratchet.data.examples",
        "ratchet.config.docs",
        "ratchet.cli.main",
        "ratchet.federation.link.party",
        "ratchet.federation.status",
    ],
)
def test_what_starts_fast_imports_nothing_slow(module):
    program = (
        f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}} & "
        f"{set(SLOW)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


COMPILED = """
import sys
import torch
from ratchet.pipeline.imports import compile_at_first_use
asked = []
torch.compile = lambda function, **settings: asked.append((function.__name__, settings)) or function
for _ in range(2):
    compile_at_first_use()
from bitsandbytes.backends.default.ops import _dequantize_blockwise_compute as dequantise
print(*asked, "torch._inductor.compile_fx" in sys.modules)
packed, largest, code = torch.tensor([0, 1, 2, 3]), torch.tensor([2.0]), torch.tensor([0.0, 0.5, 1.0, -1.0])
for _ in range(2):
    print(*dequantise(packed, largest, code, 4, torch.float32).tolist())
print(*asked)
"""


def test_bitsandbytes_is_compiled_when_it_is_first_called():
    """bitsandbytes would import Inductor with each training, whatever its method."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    before, first, second, after = done.stdout.splitlines()
    assert before == "False"
    assert first == second == "0.0 1.0 2.0 -2.0"
    assert after == "('_dequantize_blockwise_compute', {'dynamic': False})"
