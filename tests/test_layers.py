"""Three layers, one direction: ratchet ← tasks ← flows; and what starts fast stays free of what loads slowly."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("ratchet", "tasks", "flows")
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


def sources(layer: str) -> list[Path]:
    found = sorted((ROOT / layer).rglob("*.py"))
    assert len(found) > 0, f"no file in {layer}/"
    return found


def imports(path: Path, root: Path = ROOT) -> set[str]:
    """Dotted names of every module that a file imports, at its head or inside a function; `from a import b` counts as `a.b` too."""
    package = path.relative_to(root).parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (start, node.module)))
            found.update({module, *(f"{module}.{alias.name}" for alias in node.names)})
    return found


def upward(layer: str, forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(layer)
        for name in sorted(imports(path))
        if name.split(".")[0] in forbidden
    ]


def test_ratchet_imports_neither_tasks_nor_flows():
    assert len(sources("ratchet")) > 5
    # The commands are what people call: they stand above all layers, and start flows. Nothing else may.
    assert [
        fault for fault in upward("ratchet", ("tasks", "flows")) if not fault.startswith("ratchet/cli/")
    ] == []


def test_tasks_import_no_flow():
    assert upward("tasks", ("flows",)) == []


def test_a_task_imports_no_other_task():
    sideways = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("tasks")
        for name in sorted(imports(path))
        if name.split(".")[0] == "tasks"
    ]
    assert sideways == []


def test_tasks_know_no_prefect():
    assert upward("tasks", ("prefect",)) == []


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_is_a_package_of_its_own(layer):
    """Without its `__init__.py` an installed package of the same name would win."""
    assert ROOT / layer / "__init__.py" in sources(layer)


def test_every_import_of_a_file_is_seen(tmp_path):
    """The walk itself: at the head, inside a function, relative, by name."""
    path = tmp_path / "tasks" / "one.py"
    path.parent.mkdir()
    path.write_text(
        "import flows.retrain as r\nfrom tasks import two\ndef f():\n    from . import three\n    from .four import x\n    from ..ratchet import y\n"
    )
    assert {"flows.retrain", "tasks.two", "tasks.three", "tasks.four", "ratchet.y"} <= imports(path, tmp_path)


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
    if not (ROOT / f"{module.replace('.', '/')}.py").exists():
        pytest.skip(f"{module} is not written yet")
    program = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}} & {set(SLOW)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
