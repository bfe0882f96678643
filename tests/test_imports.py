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
