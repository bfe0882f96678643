"""Load rules, and let one judge a table: a verdict or a fault."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

HERE = Path(__file__).parent / "rules"
# In the order of the tables.
BUILT_IN = (
    "better_mean",
    "ties_pass",
    "threshold",
    "stored_scores",
    "separate_intervals",
    "paired_t",
    "judge_30_rows",
    "gate_5_percent",
    "gate",
)


class Rule(NamedTuple):
    """`title` is the beginning of the file's docstring, up to the first colon, or the file's name."""

    name: str
    title: str
    judge: Callable[[pd.DataFrame], object]


class Judged(NamedTuple):
    """`fault` tells why there is no verdict; then nothing is promoted."""

    promoted: bool
    fault: str = ""


def built_in(names: str) -> list[Path]:
    """Return the files of the named rules (with commas). Raises SystemExit for an unknown name."""
    wanted = [name for name in names.split(",") if name]
    if unknown := sorted(set(wanted) - set(BUILT_IN)):
        raise SystemExit(f"no rule named {', '.join(unknown)}; wanted some of {', '.join(BUILT_IN)}")
    return [HERE / f"{name}.py" for name in wanted]


def load_rule(path: Path) -> Rule:
    """Load a rule from its file. Raises SystemExit when it does not load or has no `judge`."""
    spec = importlib.util.spec_from_file_location(f"gatebench_rule_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"{path} is no Python file; wanted one with `def judge(table) -> bool`")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SystemExit(f"{path} does not load: {type(error).__name__}: {error}; mend the file") from error
    judge = getattr(module, "judge", None)
    if not callable(judge):
        raise SystemExit(f"{path} has no function `judge`; wanted `def judge(table) -> bool`")
    title = (module.__doc__ or "").strip().partition("\n")[0].partition(":")[0].rstrip(".")
    return Rule(path.stem, title or path.stem, judge)


def ask(rule: Rule, table: pd.DataFrame) -> Judged:
    """Ask a rule about its own copy of a table; whatever it raises is a fault that is counted and told."""
    try:
        verdict = rule.judge(table.copy())
    except (Exception, SystemExit) as error:  # noqa: BLE001 - somebody's code; its fault is counted and shown
        return Judged(False, f"{type(error).__name__}: {error}")
    if not isinstance(verdict, bool | np.bool_):
        return Judged(False, f"it returned {verdict!r}; wanted True or False")
    return Judged(bool(verdict))
