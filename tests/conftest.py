"""Share small real parts between tests: a demo base of width 32, prepared rows, tokens, a trained adapter.

Everything is made by the stages themselves, once a session; a test that changes a folder copies it first.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_timeout
from patience import scaled

from ratchet.config.data import PrepareConfig, PydocSource, TokenizeConfig
from ratchet.config.evaluation import EvaluateConfig
from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig, BaseConfig, DemoBase, TrainConfig
from ratchet.data.batches import write_batch
from ratchet.files import write_json
from ratchet.pipeline.imports import compile_at_first_use
from ratchet.sources.pydoc import harvest
from tasks.base import make_base
from tasks.prepare import prepare
from tasks.tokenize import tokenize
from tasks.train import train

PACKAGES = ["email", "logging", "importlib", "http"]  # 436 rows with Python 3.11
# Files of half a minute of CPU and more; xdist by itself begins with those of many tests.
LONGEST = {
    f"test_{name}.py"
    for name in (
        "families",
        "adapters",
        "trainer",
        "resume",
        "sweep",
        "distributed",
        "estimate",
        "kernels",
        "probe",
    )
}
HUB_CACHE, HOME = tempfile.mkdtemp(prefix="ratchet-hub-"), tempfile.mkdtemp(prefix="ratchet-home-")


def pytest_configure() -> None:
    """Set the environment before any library is imported, since libraries read it once.

    No network, a hub cache of our own, one thread (two gain nothing at width 32), and a home of our own: a
    training that succeeds removes the checkpoints of its home, which must not be a developer's checkout.
    """
    os.environ.update(
        HF_HUB_OFFLINE="1",
        HF_HUB_CACHE=HUB_CACHE,
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TQDM_DISABLE="1",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
    )
    compile_at_first_use()
    os.environ["RATCHET_ROOT"] = HOME
    os.environ["RATCHET_FREE_PORTS"] = "1"
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    # Begun in the background of a script: children would inherit that SIGINT is ignored.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no process is left with one of them at the end."""
    allowed = {item: item.get_closest_marker("timeout") for item in items}
    items.sort(key=lambda item: item.path.name not in LONGEST)
    items.sort(key=lambda item: -marker.args[0] if (marker := allowed[item]) else 0)


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: pytest_timeout.Settings) -> bool | None:
    """Give each test more time on a busy machine."""
    return pytest_timeout.pytest_timeout_set_timer(item, settings._replace(timeout=scaled(settings.timeout)))


def pytest_unconfigure() -> None:
    for folder in (HUB_CACHE, HOME):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def hub_cache() -> Path:
    return Path(HUB_CACHE)


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    return Config(
        base=BaseConfig(
            demo=DemoBase(
                packages=PACKAGES,
                vocab_size=512,
                hidden_size=32,
                layers=2,
                heads=2,
                context=256,
                steps=20,
                batch_tokens=512,
            )
        ),
        prepare=PrepareConfig(min_rows=40),
        tokenize=TokenizeConfig(max_length=96, window=128),
        train=TrainConfig(epochs=0.5, evaluations=2, learning_rate=1e-2),
        adapter=AdapterConfig(rank=4, alpha=8.0),
        evaluate=EvaluateConfig(max_new_tokens=8),
    )


@pytest.fixture(scope="session")
def raw_rows() -> list[dict[str, Any]]:
    """Documentation of the standard library as rows of the form `messages`, in a fixed order."""
    return list(harvest(PydocSource(packages=PACKAGES)))


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory, raw_rows: list[dict[str, Any]]) -> Path:
    """data/raw with two batches: half of the rows, a month later the other half."""
    folder, half = tmp_path_factory.mktemp("data") / "raw", len(raw_rows) // 2
    for month, rows in enumerate((raw_rows[:half], raw_rows[half:]), start=1):
        lines = [msgspec.json.encode(row) for row in rows]
        write_batch(
            folder,
            lines,
            source="pydoc",
            label=f"month-{month}",
            time=f"2026-0{month}-01T00:00:00Z",
            licence="PSF-2.0",
            who="tests",
            form="messages",
        )
    return folder


@pytest.fixture(scope="session")
def prepared(raw: Path, tiny_config: Config) -> Path:
    prepare(raw, raw.parent / "golden.jsonl", raw.parent / "prepared", tiny_config.prepare)
    return raw.parent / "prepared"


@pytest.fixture(scope="session")
def _frozen_heap() -> Iterator[None]:
    """Set imported modules aside: accelerate collects garbage each time, 0.6 s with, 0.02 s without them."""
    import ratchet.training.trainer  # noqa: F401  (what a training imports)

    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_base(_frozen_heap: None, tmp_path_factory: pytest.TempPathFactory, tiny_config: Config) -> Path:
    out = tmp_path_factory.mktemp("models") / "base"
    make_base(out, tiny_config)
    return out


@pytest.fixture(scope="session")
def nobody(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/incumbent before the first promotion."""
    folder = tmp_path_factory.mktemp("nobody")
    write_json(folder / "manifest.json", {"version": None, "batches": []})
    return folder


@pytest.fixture(scope="session")
def tokens(prepared: Path, tiny_base: Path, nobody: Path, tiny_config: Config) -> Path:
    tokenize(prepared, tiny_base, nobody, prepared.parent / "tokenized", tiny_config)
    return prepared.parent / "tokenized"


@pytest.fixture(scope="session")
def candidate(
    tmp_path_factory: pytest.TempPathFactory, tokens: Path, tiny_base: Path, nobody: Path, tiny_config: Config
) -> Path:
    """An adapter of rank 4; its reports lie beside it."""
    out = tmp_path_factory.mktemp("models") / "candidate"
    train(tokens, tiny_base, nobody, out, out.parent / "reports", tiny_config)
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install -e '.[dev]')"
    )
    path = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("there is no chromium or google-chrome in PATH")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()
