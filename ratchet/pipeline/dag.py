"""Determine the code of a stage, for DVC, for the run key of a training, and for the answer cache.

    python -m ratchet.pipeline.dag --out data/code    # the stage `code` of dvc.yaml: one file a stage

The code of a stage is its module, every module of ours that it imports, and the templates that these render.
Imports in functions count; imports for type checkers and relative imports do not. A module is hashed by its
syntax tree, without the parts that change no result: comments, layout, docstrings, and the texts of `help=`
and `description=`.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ratchet.files import write_text

KEYS = Path("data/code")  # written by the stage `code` of dvc.yaml
STAGES = ("base", "prepare", "tokenize", "train", "evaluate", "parity", "gate")
PACKAGES = ("ratchet", "tasks", "flows")
TEMPLATES = "templates"  # folder of the templates, beside the module that renders them
TOLD = ("description", "help")  # arguments of pydantic, typer and argparse that are only shown to people
# Fields of the syntax tree that differ between Python versions, or that hold a comment.
UNCOUNTED = ("kind", "type_comment")


class Module(NamedTuple):
    sha256: str
    imports: frozenset[str]
    texts: frozenset[str]


def code_key(modules: Iterable[str], root: Path) -> str:
    """Hash the code of `modules` (paths relative to `root`) and of all that they import and render."""
    return hashlib.sha256(_listing(modules, root).encode()).hexdigest()


def stage_key(stage: str, root: Path) -> str:
    return code_key([f"tasks/{stage}.py"], root)


def write_keys(root: Path, out: Path = KEYS) -> None:
    """Write `out`/STAGE for each stage: its files with hashes, so that people can see what changed."""
    for stage in STAGES:
        path, module = root / out / stage, f"tasks/{stage}.py"
        if not (root / module).exists():  # a commit whose DAG lacks this stage
            continue
        listing = _listing([module], root)
        if not path.exists() or path.read_text(encoding="utf-8") != listing:
            write_text(path, listing)


def modules_of(modules: Iterable[str], root: Path) -> list[str]:
    """List `modules` and every module of ours that they import: sorted paths relative to `root`."""
    waiting, found = list(modules), set[str]()
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imported(_read(path, root), root)
    return sorted(found)


def templates_of(path: str, root: Path) -> list[str]:
    """Find the files in `templates/` beside a module that the module names, and those that they name.

    A module names a file by its complete name; an ending (such as `.j2`) names all files with that ending.
    """
    folder = (root / path).parent / TEMPLATES
    files = {file.name: file for file in sorted(folder.glob("*"))}
    texts = _read(path, root).texts
    waiting, found = [name for name in files if {name, Path(name).suffix} & texts], set[str]()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            text = files[name].read_text(encoding="utf-8")
            waiting += [other for other in files if other in text]
    return sorted(files[name].relative_to(root).as_posix() for name in found)


def _listing(modules: Iterable[str], root: Path) -> str:
    paths = modules_of(modules, root)
    sums = {path: _read(path, root).sha256 for path in paths}
    for template in {template for path in paths for template in templates_of(path, root)}:
        sums[template] = hashlib.sha256((root / template).read_bytes()).hexdigest()
    return "".join(f"{sums[path]}  {path}\n" for path in sorted(sums))


def _read(path: str, root: Path) -> Module:
    return _parse((root / path).read_text(encoding="utf-8"))


@cache  # stages share most of their modules
def _parse(source: str) -> Module:
    tree = ast.parse(source)
    imports, texts = set[str](), set[str]()
    for node in _walk(tree):
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imports |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
    return Module(hashlib.sha256(_canonical(tree).encode()).hexdigest(), frozenset(imports), frozenset(texts))


def _imported(module: Module, root: Path) -> list[str]:
    """Find our modules among the imports, and the `__init__.py` of each package above them."""
    files = set[str]()
    for name in module.imports:
        parts = name.split(".")
        if parts[0] in PACKAGES:
            files.add(f"{'/'.join(parts)}.py")
            files |= {f"{'/'.join(parts[:depth])}/__init__.py" for depth in range(1, len(parts) + 1)}
    return [file for file in files if (root / file).exists()]


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if not _is_for_type_checkers(node):
            yield node
            waiting += ast.iter_child_nodes(node)


def _is_for_type_checkers(node: object) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _canonical(node: object) -> str:
    """Write a syntax tree as text, without positions and empty fields: the same on every supported Python."""
    if isinstance(node, ast.Constant):
        return repr(node.value)
    if isinstance(node, ast.JoinedStr):  # Python 3.12 appends an empty text to some
        return f"JoinedStr{_canonical([part for part in node.values if getattr(part, 'value', None) != ''])}"
    if isinstance(node, list):
        return f"[{','.join(_canonical(part) for part in node if not _changes_nothing(part))}]"
    if not isinstance(node, ast.AST):
        return f"<{node!r}>"  # a name or None; the brackets distinguish it from a constant
    counted = [(name, value) for name, value in ast.iter_fields(node) if name not in UNCOUNTED]
    fields = [f"{name}={_canonical(value)}" for name, value in counted if value not in (None, [])]
    return f"{type(node).__name__}({','.join(fields)})"


def _changes_nothing(node: object) -> bool:
    """Tell whether a node has no effect: a lone constant, `pass`, a help text, or code for type checkers."""
    if isinstance(node, ast.keyword):
        is_text = isinstance(node.value, ast.JoinedStr) or isinstance(getattr(node.value, "value", None), str)
        return node.arg in TOLD and is_text
    stands_alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return stands_alone or isinstance(node, ast.Pass) or _is_for_type_checkers(node)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the list of files that are the code of each stage.")
    parser.add_argument("--out", type=Path, required=True)
    write_keys(Path.cwd(), parser.parse_args().out)
