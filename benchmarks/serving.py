"""Tokens a second of the engines `local` and `llama_cpp`, of transformers' continuous batching and of
llama.cpp's own server, on SmolLM2-135M-Instruct with a LoRA adapter.

    pip install xllamacpp
    python -m benchmarks.serving [--tokens 48] [--asks 16] [--passes 3]

The engine `local` answers with the adapter on its base; the others have it merged, llama.cpp as 16-bit and as
8-bit GGUF. All arms answer the same questions greedily, with 1 and with 8 clients, in turn and in one
process, and each figure is the median of the passes: read the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CLIENTS = (1, 8)
QUESTION = "Tell me in a few sentences what the Python module {} is for, and when one would not take it."
MODULES = "json csv re os sys io ast dis abc cmd code copy dbm enum heapq html http imaplib".split()  # noqa: SIM905
Ask = Callable[[str], int]  # asks a question and returns the number of tokens of the answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each answer, at most")
    parser.add_argument("--asks", type=int, default=16, help="questions at each number of clients")
    parser.add_argument("--arms", help="names with commas; all by default")
    parser.add_argument("--passes", type=int, default=3, help="times that everything is measured")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the gateway's own service has it
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as scratch:
        arms = make_arms(Path(scratch), options.tokens)
        chosen = options.arms.split(",") if options.arms else arms
        measure({name: arms[name] for name in chosen}, options.asks, options.passes)


def measure(arms: dict[str, Ask], asks: int, passes: int) -> None:
    seen: dict[tuple[str, int], list[float]] = {}
    for ask in arms.values():
        ask(QUESTION.format("warm-up"))
    for _ in range(passes):
        for clients in CLIENTS:
            for name, ask in arms.items():
                seen.setdefault((name, clients), []).append(run(ask, clients, asks))
    print("| engine | " + " | ".join(f"{clients} client(s)" for clients in CLIENTS) + " |\n|---|---|---|")
    for name in arms:
        told = []
        for clients in CLIENTS:
            speed, first = (statistics.median(seen[arm, clients]) for arm in (name, next(iter(arms))))
            told.append(f"{speed:.0f} tokens a second, {speed / first:.2f} of the first")
        print(f"| {name} | {' | '.join(told)} |")


def run(ask: Ask, clients: int, asks: int) -> float:
    count = asks if clients > 1 else max(2, asks // 4)
    questions = [QUESTION.format(MODULES[place % len(MODULES)]) for place in range(count)]
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        made = sum(pool.map(ask, questions))
    return made / (time.perf_counter() - started)


def make_arms(scratch: Path, tokens: int) -> dict[str, Ask]:
    from ratchet.config.params import Config
    from ratchet.config.training import AdapterConfig
    from ratchet.demo.checkout import make_values
    from ratchet.demo.smollm2 import fetch_smollm2
    from ratchet.demo.story import REAL
    from ratchet.engines.llama_cpp_engine import LlamaCppEngine
    from ratchet.engines.local_engine import LocalEngine
    from ratchet.files import read_json, write_json
    from ratchet.models.adapters import add_adapter
    from ratchet.models.gguf import write_gguf
    from ratchet.models.loading import MANIFEST, load_base, load_chat
    from ratchet.models.merging import load_merged
    from ratchet.serving.bundle import Bundle, Generation
    from tasks.base import make_base

    config = Config.model_validate(make_values(str(fetch_smollm2(Path())), REAL.settings))
    base, adapter = scratch / "base", scratch / "adapter"
    make_base(base, config)
    chat = load_chat(base)
    add_adapter(load_base(base), AdapterConfig(), seed=1).save_pretrained(
        adapter, safe_serialization=True, save_embedding_layers=False
    )
    chat.tokenizer.save_pretrained(adapter)
    about = {key: read_json(base / MANIFEST)[key] for key in ("model", "revision")}
    write_json(adapter / MANIFEST, {"base": about})
    merged = load_merged(base, adapter)
    bundle = Bundle("bench", 1, adapter, base, 512, Generation(tokens))
    arms = {
        "local": engine_arm(LocalEngine(config), bundle, tokens),
        "llama_cpp": engine_arm(LlamaCppEngine(config, scratch), bundle, tokens),
        "transformers' continuous batching": transformers_arm(merged, chat, tokens),
    }
    for kind in ("gguf", "int8"):
        path = scratch / f"{kind}.gguf"
        write_gguf(merged, chat.tokenizer, path, name="bench", stop_id=chat.stop_id, kind=kind)
        arms[f"llama.cpp, {kind}"] = llama_cpp_arm(path, tokens)
    return arms


def engine_arm(engine: Any, bundle: Any, tokens: int) -> Ask:
    """Run one of the gateway's engines in an event loop of its own, as the gateway does."""
    import threading

    from ratchet.data.examples import Message
    from ratchet.serving import engine as engines

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    asyncio.run_coroutine_threadsafe(engine.load(bundle), loop).result()

    async def answer(question: str) -> int:
        count, wanted = 0, engines.Ask("bench", 1, (Message("user", question),), max_tokens=tokens)
        async for piece in engine.answer(wanted):
            count = piece.answer_tokens if isinstance(piece, engines.Ended) else 0
        return count

    return lambda question: asyncio.run_coroutine_threadsafe(answer(question), loop).result()


def transformers_arm(model: Any, chat: Any, tokens: int) -> Ask:
    from transformers import GenerationConfig

    from ratchet.data.examples import Message

    settings = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=sorted(chat.stop_ids), pad_token_id=chat.pad_id
    )
    manager = model.init_continuous_batching(generation_config=settings)
    manager.start()

    def ask(question: str) -> int:
        request = manager.add_request(chat.encode_prompt([Message("user", question)]), max_new_tokens=tokens)
        while (found := manager.get_result(request, timeout=0.1)) is None or not found.is_finished():
            if not manager.is_running():
                raise SystemExit("transformers' continuous batching stopped; see its message above")
        return len(found.generated_tokens)

    return ask


def llama_cpp_arm(path: Path, tokens: int) -> Ask:
    import xllamacpp

    wanted = xllamacpp.CommonParams()
    wanted.model.path, wanted.n_gpu_layers, wanted.verbosity = str(path), 0, 0
    wanted.n_parallel, wanted.n_ctx = max(CLIENTS), 512 * max(CLIENTS)
    wanted.hostnames, wanted.port, wanted.fit_params = ["127.0.0.1"], 0, False
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = os.cpu_count() or 1
    server = xllamacpp.Server(wanted)

    def ask(question: str) -> int:
        body = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": tokens,
            "temperature": 0,
            "cache_prompt": False,
        }
        request = urllib.request.Request(
            server.listening_address + "/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return int(json.load(answer)["usage"]["completion_tokens"])

    return ask


if __name__ == "__main__":
    main()
