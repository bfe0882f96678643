"""Run llama.cpp's server on one version as a process of its own, for the engine `llama_cpp`.

    python -m ratchet.engines.llama_cpp_server --base BASE --adapter ADAPTER --gguf FILE
    python -m ratchet.engines.llama_cpp_server --gguf FILE --slots 16 --context 512

The first form merges the adapter into its base and writes the GGUF file; it needs torch, and its memory is
free again when it ends. The second form serves the file on a free port of 127.0.0.1 and prints the address
as one line of JSON. It ends when its standard input does, so that it never outlives the gateway.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from ratchet.errors import BaseModelError, UserError

KIND = "gguf"  # 16-bit weights: rounded ones would not give the adapter's answers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--slots", type=int, default=1, help="answers that are computed together")
    parser.add_argument("--context", type=int, default=512, help="tokens of a prompt and its answer together")
    arguments = parser.parse_args()
    if arguments.base and arguments.adapter:
        try:
            write(arguments.base, arguments.adapter, arguments.gguf)
        except (BaseModelError, UserError) as error:
            sys.exit(str(error).splitlines()[0])
    else:
        serve(arguments.gguf, arguments.slots, arguments.context)


def write(base: Path, adapter: Path, out: Path) -> None:
    """Write the merged model. Raises BaseModelError, UserError: it has no form that llama.cpp reads alike."""
    from ratchet.models.gguf import write_gguf
    from ratchet.models.loading import load_chat, quiet
    from ratchet.models.merging import load_merged

    chat = load_chat(adapter)
    with quiet():
        merged = load_merged(base, adapter)
        write_gguf(merged, chat.tokenizer, out, name=out.stem, stop_id=chat.stop_id, kind=KIND)


def serve(path: Path, slots: int, context: int) -> None:
    import xllamacpp

    wanted = xllamacpp.CommonParams()
    wanted.model.path, wanted.verbosity, wanted.fit_params = str(path), 0, False
    wanted.n_parallel, wanted.n_ctx = slots, slots * context
    wanted.hostnames, wanted.port = ["127.0.0.1"], 0
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = os.cpu_count() or 1
    server = xllamacpp.Server(wanted)
    sys.stdout.write(json.dumps({"address": server.listening_address}) + "\n")
    sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the gateway reads no further
    sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
