"""Which modules of ours a stage's result depends on: the stage's own and all that it imports, found by parsing.

    python -m ratchet.dag          # prints the deps that dvc.yaml should hold; tests/test_dag.py compares

Imports inside functions count, relative ones are not seen.
"""

from __future__ import annotations

import ast
from pathlib import Path

STAGES = ("base", "prepare", "tokenize", "train", "evaluate", "parity", "gate")
PACKAGES = ("ratchet", "tasks", "flows")


def modules_of(stage: str, root: Path) -> list[str]:
    """Paths relative to `root`, sorted, the stage's own among them."""
    waiting, found = [f"tasks/{stage}.py"], set[str]()
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += imported(root / path, root)
    return sorted(found)


def imported(path: Path, root: Path) -> list[str]:
    """Our modules that `path` imports, wherever in the file; imports for type checkers alone do not count."""
    names: set[str] = set()
    for node in _walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = [f"{name.replace('.', '/')}.py" for name in sorted(names) if name.split(".")[0] in PACKAGES]
    return [name for name in files if (root / name).exists()]


def _walk(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return []
    return [node, *(found for child in ast.iter_child_nodes(node) for found in _walk(child))]


if __name__ == "__main__":
    for stage in STAGES:
        print(stage, *modules_of(stage, Path.cwd()), sep="\n  - ")  # noqa: T201
