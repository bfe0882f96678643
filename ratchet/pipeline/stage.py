"""Run the module of a stage, by hand or by DVC: `python -m tasks.NAME --flag PATH …`.

Paths come from `cmd` in dvc.yaml, settings from params.yaml. An error of ours ends the process with one
message and the error's exit code.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ratchet.config.params import Config, load_config
from ratchet.errors import RatchetError
from ratchet.exhaustion import explain
from ratchet.pipeline.imports import compile_at_first_use
from ratchet.pipeline.integrity import check_inputs, check_manifest
from ratchet.pipeline.processes import end_with_starter

OUTPUTS = ("out", "reports", "proof")  # paths that a stage writes


def run_stage(
    doc: str | None, paths: Sequence[str], work: Callable[[Config, argparse.Namespace], object]
) -> None:
    """Parse one required `--NAME PATH` for each of `paths`, and call `work(config, arguments)`.

    First the bytes of the inputs are checked. On a RatchetError print it and exit with its code.
    """
    # Importing transformers and PEFT makes a million objects that live as long as the process. Searching them
    # for garbage after every 700 new ones, as is the default, took 1.5 s of 14 s.
    gc.set_threshold(10_000)
    compile_at_first_use()
    end_with_starter()
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    for path in paths:
        parser.add_argument(f"--{path}", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' progress bars would fill the flow's log
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports optional kernels at each import
    try:
        _check_inputs([getattr(arguments, path) for path in paths if path not in OUTPUTS])
        work(load_config(arguments.params), arguments)
    except RatchetError as error:
        say(f"{type(error).__name__}: {error}", error=True)
        sys.exit(error.exit_code)
    except Exception as error:
        if (known := explain(error)) is None:
            raise
        say(f"{type(known).__name__}: {known}", error=True)
        sys.exit(known.exit_code)


def _check_inputs(paths: list[Path]) -> None:
    """Check the inputs of a stage that DVC or a flow runs, and by hand those with a manifest.

    By hand an input may differ from dvc.lock on purpose. torchrun's processes come after this check.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    if "DVC_STAGE" in os.environ or "RATCHET_ROOT" in os.environ:
        check_inputs(Path.cwd(), [str(path) for path in paths])
        return
    for path in paths:
        check_manifest(path, "make it again with its stage")


def project_root(root: str | Path | None = None) -> Path:
    """Return the checkout: `root`, else RATCHET_ROOT (set in a workspace), else the working directory."""
    return Path(root or os.environ.get("RATCHET_ROOT") or Path.cwd()).resolve()


def say(line: str, *, error: bool = False) -> None:
    """Print one line of progress, which the flow streams into Prefect's log.

    If the reader is gone, further output goes to the null device: a training must still write its checkpoint.
    """
    out = sys.stderr if error else sys.stdout
    try:
        print(line, file=out, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
