"""Delay a library's expensive imports until they are needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

# bitsandbytes 0.50 decorates four functions of this module with torch.compile, which imports Inductor. That
# takes 2.0 to 2.7 s of the 11 s of CPU time for importing PEFT, whether or not a base is quantised.
MODULE = "bitsandbytes.backends.default.ops"


def compile_at_first_use() -> None:
    """Make bitsandbytes call torch.compile when a function is first called, not at import."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MODULE or (spec := PathFinder.find_spec(fullname, path, target)) is None:
            return None
        if isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        import torch

        compile_now = torch.compile
        torch.compile = _later(compile_now)
        try:
            super().exec_module(module)
        finally:
            torch.compile = compile_now


def _later(compile_now: Callable[..., Any]) -> Callable[..., Any]:
    def compile_later(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
        compiled = cache(lambda: compile_now(function, **settings))

        @wraps(function)
        def run(*arguments: Any, **named: Any) -> Any:
            return compiled()(*arguments, **named)

        return run

    return compile_later
