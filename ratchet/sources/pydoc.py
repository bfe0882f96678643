"""Harvest docstrings by parsing, without importing: the default source, which needs no data.

Each documented object gives one row: first sentence → the module it stands in; a share of them also gives
name → summary. Not covered: extension modules (nothing to parse), docstrings assembled at run time.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from ratchet.config.data import PydocSource
from ratchet.data.examples import Message, Meta, RawRow, make_raw_row
from ratchet.errors import DataError

# Tests and vendored copies repeat the docstrings of other modules.
SKIPPED = frozenset(
    {
        "test",
        "tests",
        "conftest",
        "idlelib",
        "lib2to3",
        "site-packages",
        "turtledemo",
        "distutils",
        "externals",
        "vendored",
        "_vendor",
    }
)
SENTENCE = re.compile(r"(.{20,220}?[.!?])(\s|$)")
MIN_CHARS, MAX_CHARS = 15, 220


class Documented(NamedTuple):
    module: str
    name: str
    sentence: str


def harvest(settings: PydocSource) -> Iterator[RawRow]:
    """Make rows in the form `messages`, in a fixed order.

    Raises DataError for a package that is not installed.
    """
    for package in settings.packages:
        objects = list(_documented(package, settings.module_depth))
        large = {
            module
            for module, count in Counter(found.module for found in objects).items()
            if count >= settings.min_objects
        }
        for found in objects:
            if found.module in large and _is_chosen(found, settings.share):
                yield from _rows(found, package, settings.summaries)


def _is_chosen(found: Documented, share: float) -> bool:
    """Choose by the hash of the sentence, so that all objects with the same sentence are in or out."""
    return xxhash.xxh3_64_intdigest(f"chosen {found.sentence}".encode()) % 10_000 < share * 10_000


def _rows(found: Documented, package: str, summaries: float) -> Iterator[RawRow]:
    meta: Meta = {"package": package, "module": found.module}
    yield _row(f"Which module documents this? {found.sentence}", found.module, {**meta, "kind": "module"})
    if (
        found.name
        and found.name.rpartition(".")[2][0] != "_"
        and xxhash.xxh3_64_intdigest(f"{found.module}.{found.name}".encode()) % 10_000 < summaries * 10_000
    ):
        yield _row(f"What does {found.module}.{found.name} do?", found.sentence, {**meta, "kind": "summary"})


def _row(question: str, answer: str, meta: Meta) -> RawRow:
    return make_raw_row([Message("user", question), Message("assistant", answer)], meta)


def _documented(package: str, depth: int) -> Iterator[Documented]:
    for root, name in import_roots(package):
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            parts = _module_parts(path, root, name)
            # The standard library is one package of many roots: `json` is one level below it.
            label = parts[:depth] if package == "stdlib" else parts[: depth + 1]
            # A module with a leading underscore is no answer to give a user.
            if any(part in SKIPPED for part in parts) or any(part.startswith("_") for part in label):
                continue
            yield from _in_file(path, ".".join(label), parts)


def import_roots(package: str) -> list[tuple[Path, str]]:
    """List (file or folder, dotted name) of each module to walk."""
    if package == "stdlib":
        library = Path(sysconfig.get_paths()["stdlib"])
        names = sorted(name for name in sys.stdlib_module_names if not name.startswith("_"))
        candidates = [(library / name, name) for name in names] + [
            (library / f"{name}.py", name) for name in names
        ]
        return [(path, name) for path, name in candidates if path.exists()]
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise DataError(
            f"package {package!r} is not installed here, or has no Python source",
            remedy="name installed packages in `ingest.pydoc.packages` (import names, such as `sklearn`)",
        )
    origin = Path(spec.origin)
    return [(origin.parent if origin.name == "__init__.py" else origin, package)]


def _module_parts(path: Path, root: Path, name: str) -> list[str]:
    if path == root:
        return [name]
    parts = [name, *path.relative_to(root).with_suffix("").parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def _in_file(path: Path, label: str, parts: list[str]) -> Iterator[Documented]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in other packages' strings
            tree = ast.parse(path.read_bytes())  # bytes, because the file may name its encoding
    except (OSError, SyntaxError, ValueError):
        return  # templates and Python 2 leftovers inside packages, broken links
    prefix = ".".join(parts)[len(label) :].lstrip(".")
    yield from _found(tree, label, prefix)
    yield from _walk(tree, label, prefix)


def _walk(node: ast.AST, label: str, qualified: str) -> Iterator[Documented]:
    for child in getattr(node, "body", []):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{qualified}.{child.name}".lstrip(".")
            yield from _found(child, label, name)
            if isinstance(child, ast.ClassDef):
                yield from _walk(child, label, name)


def _found(node: Any, label: str, name: str) -> Iterator[Documented]:
    sentence = first_sentence(ast.get_docstring(node) or "")
    if len(sentence) >= MIN_CHARS:
        yield Documented(label, name, sentence)


def first_sentence(docstring: str) -> str:
    """Cut out the first sentence of the first paragraph, at most 220 characters."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    match = SENTENCE.match(paragraph)
    return match.group(1) if match else paragraph[:MAX_CHARS]
