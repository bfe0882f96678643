"""Load the user's own metrics: Python functions in the folder `metrics/`, named in `evaluate.custom` as
`module:function`.

A function gets (prediction, reference, example_meta) and returns a number from 0 to 1; higher is better.
`metrics/my_metrics.py` is an example.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from ratchet.data.examples import Example, Meta
from ratchet.errors import ConfigError, DataError

Custom = Callable[[str, str, Meta], float]


def load_custom(names: Sequence[str], folder: Path) -> dict[str, Custom]:
    """Load the functions, by name.

    Raises ConfigError for a file that cannot be loaded and for a missing function.
    """
    found: dict[str, Custom] = {}
    for name in names:
        module, _, function = name.partition(":")
        path = folder / f"{module}.py"
        if not path.is_file():
            raise ConfigError(
                f"evaluate.custom names {name}, and {path} does not exist",
                remedy=f"put the function into {path}, or take it out of `evaluate.custom`",
            )
        metric = getattr(_load(path), function, None)
        if not callable(metric):
            raise ConfigError(
                f"evaluate.custom names {name}, and {path} has no function {function}",
                remedy="def NAME(prediction, reference, example_meta): return a number from 0 to 1",
            )
        found[function] = metric
    return found


def custom_score(name: str, metric: Custom, answer: str, row: Example) -> float:
    """Score an answer.

    Raises DataError, naming the row, when the function raises or does not return a number from 0 to 1.
    """
    remedy = f"mend the function {name} in metrics/, or take it out of `evaluate.custom`"
    try:
        value = metric(answer, row.answer, dict(row.meta))
    except Exception as error:
        raise DataError(
            f"the metric {name} failed on row {row.id}: {type(error).__name__}: {error}", remedy=remedy
        ) from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0.0 <= number <= 1.0:  # NaN is refused too
        raise DataError(
            f"the metric {name} gave {value!r} for row {row.id}; wanted a number from 0 to 1", remedy=remedy
        )
    return number


def _load(path: Path) -> ModuleType:
    """Import the file by its path, so that an installed module of the same name is not taken instead.

    The file may import its neighbours in the folder.
    """
    spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with _neighbours(path.parent):
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ConfigError(
                f"{path} does not load: {type(error).__name__}: {error}",
                remedy="mend the file, or take it out of `evaluate.custom`",
            ) from error
    return module


@contextmanager
def _neighbours(folder: Path) -> Iterator[None]:
    """Let a module import its neighbours in `folder`, and write no compiled files there.

    The folder is an input of a stage, and compiled files would change it.
    """
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))
        sys.dont_write_bytecode = before
