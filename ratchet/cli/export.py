"""`ratchet export`: write a version for other programs."""

from __future__ import annotations

import logging
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from ratchet.cli.context import Json, note, read_config, ready_root, say, show


class Kind(StrEnum):
    merged = "merged"
    gguf = "gguf"
    int8 = "int8"
    int4 = "int4"


def export(
    version: Annotated[
        str, typer.Argument(metavar="VERSION", help="`champion`, `candidate`, or a number such as v3.")
    ],
    to: Annotated[
        Kind,
        typer.Option(
            "--to",
            help="merged: safetensors; gguf, int8, int4: one file for llama.cpp, in float16, 8 or 4 bits.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="A folder that does not exist yet.")],
    as_json: Json = False,
) -> None:
    """Write a version in the form that other programs read, checked and scored against its adapter.

    Example: ratchet export champion --to gguf --out exports/claims
    """
    os.environ |= {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
    }  # no progress bars; libraries read these at import
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs optional kernels at every import
    from ratchet.pipeline.imports import compile_at_first_use

    compile_at_first_use()
    root, out = ready_root(clean=False), out.resolve()
    from ratchet.serving.version_source import find_source
    from tasks.export import export as run
    from tasks.export import require_exportable, require_new, tell

    config = read_config(root)
    require_new(out, to.value)  # before a version's files are fetched
    source = find_source(root, config.project.name, version)
    require_exportable(source, to.value, out)
    note(
        f"{source.label} of {config.project.name}: merged, written, loaded again and asked "
        f"{config.parity.rows} rows at most …"
    )
    record = run(source, to.value, out, config)
    show(msgspec.to_builtins(record), as_json, lambda: say("\n".join(tell(record, out))))
