"""Measure what the gateway adds to an answer's latency, at 200 requests a second to a stub upstream that is
asked directly, through the gateway and through LiteLLM's proxy.

    python -m benchmarks.gateway [--rate 200] [--seconds 20] [--no-litellm]

Each is a process of its own on 127.0.0.1; they take turns in rounds, so that a slow minute of the machine
affects all. The load is open loop: a slow answer delays no later request. Own cost = a quantile through the
proxy minus the same quantile of direct requests. LiteLLM's proxy is installed once into
`.ratchet/bench-litellm` (about 130 packages, minutes). All is repeated at a tenth of the rate. Not covered:
the engine `local`, streams, TLS, several processes of a proxy.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from ratchet.config.docs import render_params
from ratchet.config.params import Config
from ratchet.errors import ServiceError
from ratchet.files import write_bytes, write_json
from ratchet.gateway.auth import add_key
from ratchet.models.loading import WEIGHTS
from ratchet.promotion.champion import Champion, Data, GateLine, write_champion
from ratchet.services.processes import free_port
from ratchet.serving.bundle import SERVING

NAME, DELAY = "pydoc", 0.02  # seconds that the stub takes for an answer
ROUNDS, WARM_SECONDS, LATE_SECONDS, START_SECONDS = 4, 1.0, 10.0, 120.0
LITELLM = Path(".ratchet/bench-litellm")
STUB = Path(__file__).parents[1] / "tests/stub_upstream.py"


class Target(NamedTuple):
    """An endpoint to ask.

    `model` is the stub's name for itself, or the name that a proxy maps to it; both proxies check a key.
    """

    name: str
    url: str
    model: str
    key: str = "none"


class Asked(NamedTuple):
    milliseconds: list[float]  # of requests that were answered
    faults: list[str]  # why each of the others was not


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="seconds of load for each target, at most 60"
    )
    parser.add_argument("--no-litellm", action="store_true", help="leave LiteLLM's proxy out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as scratch, contextlib.ExitStack() as stack:
        targets = start(Path(scratch), stack)
        try:
            if not options.no_litellm:
                targets.append(start_litellm(Path(scratch), targets[0].url, stack))
        except ServiceError as error:
            print(f"LiteLLM's proxy is left out: {error}")
        for rate in (options.rate, options.rate / 10):
            print_table(rate, asyncio.run(measure(targets, rate, min(options.seconds, 60.0))))


# --- who is asked -------------------------------------------------------------------------------------------


def start(scratch: Path, stack: contextlib.ExitStack) -> list[Target]:
    stub, gateway = free_port(), free_port()
    upstream = f"http://127.0.0.1:{stub}/v1"
    stack.enter_context(
        running(
            [sys.executable, str(STUB), str(stub), str(DELAY)], f"{upstream}/models", scratch / "stub.log"
        )
    )
    put_champion(
        scratch,
        Config.model_validate(
            {
                "project": {"name": NAME},
                "gateway": {"engine": "openai", "upstream": upstream, "port": gateway, "max_queue": 1000},
            }
        ),
    )
    command = [sys.executable, "-m", "ratchet.gateway.server"]
    stack.enter_context(
        running(
            command, f"http://127.0.0.1:{gateway}/readyz", scratch / "gateway.log", RATCHET_ROOT=str(scratch)
        )
    )
    return [
        Target("direct", upstream, f"{NAME}@v1"),
        Target("gateway", f"http://127.0.0.1:{gateway}/v1", NAME, add_key(scratch, "benchmark", ["infer"])),
    ]


def start_litellm(scratch: Path, upstream: str, stack: contextlib.ExitStack) -> Target:
    """Start it as its documentation advises for production: no debugging, no telemetry; without retries.

    Raises ServiceError.
    """
    program, port, key = install_litellm(), free_port(), f"sk-{secrets.token_hex(32)}"
    model = {"model": f"openai/{NAME}@v1", "api_base": upstream, "api_key": "none"}
    settings = {
        "model_list": [{"model_name": NAME, "litellm_params": model}],
        "litellm_settings": {"telemetry": False, "set_verbose": False, "num_retries": 0},
    }
    (scratch / "litellm.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    command = [
        str(program),
        "--config",
        str(scratch / "litellm.yaml"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--num_workers",
        "1",
    ]
    environment = {"LITELLM_MASTER_KEY": key, "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    stack.enter_context(
        running(command, f"http://127.0.0.1:{port}/health/liveliness", scratch / "litellm.log", **environment)
    )
    return Target("litellm", f"http://127.0.0.1:{port}/v1", NAME, key)


def put_champion(root: Path, config: Config) -> None:
    """Put a version in charge, as after `ratchet retrain`, but without weights: the stub needs none."""
    digest = hashlib.sha256(b"").hexdigest()
    (root / "params.yaml").write_text(render_params(config), encoding="utf-8")
    folder = root / SERVING / f"v1-{digest[:12]}"
    write_bytes(folder / "adapter" / WEIGHTS, [])
    write_json(
        folder / "serving.json", {"commit": "0" * 40, "base": "base", "max_new_tokens": 8, "max_length": 96}
    )
    write_json(root / SERVING / "bases/base/manifest.json", {})
    rest: dict[str, Any] = {
        "previous": None,
        "commit": "0" * 40,
        "run_key": "",
        "run_id": "",
        "batches": [],
        "data": Data(),
        "gate": GateLine("promote", None),
        "at": "",
        "by": "",
        "why": "",
        "move": "promote",
        "replaced": None,
    }
    write_champion(root, Champion(name=NAME, version=1, adapter_sha256=digest, **rest))


def install_litellm() -> Path:
    """Install LiteLLM once and return the program that starts it. Raises ServiceError."""
    program = LITELLM.resolve() / "bin/litellm"
    if program.exists():
        return program
    print(f"installing litellm[proxy] into {LITELLM} (minutes, once)", flush=True)
    for command in (
        [sys.executable, "-m", "venv", str(LITELLM)],
        [str(LITELLM / "bin/python"), "-m", "pip", "install", "--quiet", "litellm[proxy]"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode:
            raise ServiceError(
                f"`{' '.join(command)}` failed:"
                f" {(done.stderr.strip() or 'no reason given').splitlines()[-1][:200]}"
            )
    return program


@contextlib.contextmanager
def running(command: list[str], url: str, log: Path, **environment: str) -> Iterator[None]:
    """Run a program until the block ends; the block begins after the first answer at `url`."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            asyncio.run(wait_for_answer(process, url, log))
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def wait_for_answer(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until the program answers. Raises ServiceError with the end of its log."""
    until = time.monotonic() + START_SECONDS
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < until and process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(url, timeout=aiohttp.ClientTimeout(2)) as answered:
                    if answered.status == 200:
                        return
            await asyncio.sleep(0.1)
    raise ServiceError(f"{url} does not answer\n{log.read_text(errors='replace')[-1000:]}")


# --- the load -----------------------------------------------------------------------------------------------


async def measure(targets: list[Target], rate: float, seconds: float) -> dict[str, Asked]:
    found: dict[str, Asked] = {target.name: Asked([], []) for target in targets}
    for _ in range(ROUNDS):
        for target in targets:
            asked = await load(target, rate, seconds / ROUNDS)
            found[target.name] = Asked(
                found[target.name].milliseconds + asked.milliseconds, found[target.name].faults + asked.faults
            )
    return found


async def load(target: Target, rate: float, seconds: float) -> Asked:
    """Ask at `rate` for `seconds`; the first second warms connections up and is not counted."""
    timeout = aiohttp.ClientTimeout(LATE_SECONDS)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        began, tasks = time.perf_counter(), []
        for number in range(int(rate * (WARM_SECONDS + seconds))):
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(session, target, number)))
        took = (await asyncio.gather(*tasks))[int(rate * WARM_SECONDS) :]
    return Asked(
        [one for one in took if isinstance(one, float)], [one for one in took if isinstance(one, str)]
    )


async def ask(session: aiohttp.ClientSession, target: Target, number: int) -> float | str:
    """Return the milliseconds, or why there was no answer within 10 s."""
    body = {
        "model": target.model,
        "user": f"u{number}",
        "max_tokens": 8,
        "messages": [{"role": "user", "content": "Which module documents this? Return the number of items."}],
    }
    began = time.perf_counter()
    try:
        async with session.post(
            f"{target.url}/chat/completions", json=body, headers={"authorization": f"Bearer {target.key}"}
        ) as answered:
            text = await answered.text()
            return (
                (time.perf_counter() - began) * 1000
                if answered.status == 200
                else f"{answered.status} {text[:200]}"
            )
    except (aiohttp.ClientError, TimeoutError) as error:
        return f"{type(error).__name__} {error}"


def print_table(rate: float, found: dict[str, Asked]) -> None:
    direct = quantiles(found["direct"].milliseconds)
    print(f"\n{rate:g} requests a second, milliseconds    p50     p95     p99   failed     n")
    for name, asked in found.items():
        seen = quantiles(asked.milliseconds)
        print(
            f"{name:34}"
            + "".join(f"{value:8.2f}" for value in seen)
            + f"{len(asked.faults):9}{len(asked.milliseconds):6}"
        )
        if name != "direct":
            print(
                f"{'  own cost':34}"
                + "".join(f"{value - base:8.2f}" for value, base in zip(seen, direct, strict=True))
            )
        if asked.faults:
            print(f"  the first fault: {asked.faults[0]}")


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Return p50, p95 and p99; NaN if there are no values."""
    ordered = sorted(values) or [float("nan")]
    p50, p95, p99 = (ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.5, 0.95, 0.99))
    return p50, p95, p99


if __name__ == "__main__":
    main()
