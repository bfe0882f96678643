"""A coordinator and three nodes, each a clone in a namespace of its own: one port is open, no row travels."""

from __future__ import annotations

import os
import random
import string
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from command import Done
from live import Live, wait_until
from namespaces import Network, machines
from parties import make_node
from patience import scaled
from safetensors.torch import load_file

from ratchet.config.federation import FederateConfig
from ratchet.config.params import Config
from ratchet.config.training import BaseConfig
from ratchet.federation.link.party import NODE_AUTHORITY
from ratchet.federation.node import identity
from ratchet.federation.records import NODE, read_rounds
from ratchet.federation.rounds import STATE, Plan
from ratchet.files import read_json
from ratchet.models.adapters import load_trainable, save_trained
from tasks.base import make_base
from tasks.federate import SECTIONS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
NAMES = ("north", "south", "west")
# Drawn, since each clone holds the text of this file.
SECRET = " ".join("".join(random.choices(string.ascii_lowercase, k=12)) for _ in range(2))
TLS = """
import socket, ssl, sys
address, port, authority = sys.argv[1], int(sys.argv[2]), sys.argv[3]
context = ssl.create_default_context(cafile=authority or None)
with socket.create_connection((address, port), timeout=30) as plain:
    try:
        with context.wrap_socket(plain, server_hostname=address) as secured:
            print(secured.version())
    except ssl.SSLCertVerificationError as error:
        print(error.verify_message)
"""


class Apart(Live):
    """A federation whose parties are clones, and whose commands run each on its own machine.

    Each runs the code of its own clone: `python -m` looks into the working directory first.
    """

    def __init__(self, folder: Path, config: Config, network: Network) -> None:
        self.network = network
        clone(folder / "coordinator")
        super().__init__(folder / "coordinator", config)

    def ratchet(self, home: Path, *arguments: str | Path) -> Done:
        command = self.network.inside(home.name, sys.executable, "-m", "ratchet.cli", "-C", home, *arguments)
        done = subprocess.run(
            command,
            cwd=home,
            env=environment(home),
            capture_output=True,
            text=True,
            check=False,
            timeout=scaled(300),
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def start(self, command: list[str], log: IO[str]) -> subprocess.Popen[str]:
        inside = self.network.inside(self.root.name, *command)
        said = {"text": True, "stdout": log, "stderr": subprocess.STDOUT}
        return subprocess.Popen(inside, cwd=self.root, env=environment(self.root), **said)


def clone(home: Path) -> None:
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(home)], check=True)


def environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "RATCHET_ROOT"}
    return kept | {"PYTHONPATH": str(home)}


@pytest.fixture(scope="module")
def apart(tiny_config: Config, tiny_base: Path, raw_rows: list[dict[str, Any]]) -> Iterator[Apart]:
    with (
        machines("coordinator", *NAMES) as network,
        tempfile.TemporaryDirectory(prefix="ratchet-apart-") as scratch,
    ):
        folder = Path(scratch)
        seen = {"host": "0.0.0.0", "names": [network.address["coordinator"]]}
        config = tiny_config.model_copy(
            update={
                "base": BaseConfig(model=str(tiny_base)),
                "prepare": tiny_config.prepare.model_copy(update={"test_share": 0.0}),
                "federate": FederateConfig(rounds=2, min_nodes=3, **seen),
            }
        )
        live = Apart(folder, config, network)
        network.capture(folder / "captured")
        planted = {
            "messages": [
                {"role": "user", "content": f"Where does {SECRET} stand in the list of metals?"},
                {"role": "assistant", "content": f"{SECRET} is a fluid one."},
            ]
        }
        try:
            live.up()
            for place, name in enumerate(NAMES):
                clone(folder / name)
                home = make_node(folder / name, config, [*raw_rows[place::3][:70], planted])
                live.join(home, live.invite(home))
            wait_until(lambda: live.connected() == set(NAMES), 120, "not all nodes are connected")
            yield live
        finally:
            live.stop()


def test_nodes_train_over_a_network_on_which_no_row_is_seen(apart: Apart) -> None:
    folder, config = apart.root.parent, apart.config
    make_base(folder / "base", config)
    model = load_trainable(folder / "base", None, config.adapter, seed=config.train.seed)
    save_trained(model, folder / "base", folder / "start")
    params = {name: getattr(config, name).model_dump(mode="json") for name in SECTIONS}
    described = read_json(folder / "start/adapter_config.json")
    plan = Plan("apart", params, identity(folder / "base"), described, 2.0, config.federate)
    run = apart.start_run(apart.root / "run", folder / "start/adapter_model.safetensors", plan)
    assert run.wait(scaled(600)) == 0, (apart.root / "run.log").read_text()
    records = [read_json(apart.root / f"run/round-{number}/round.json") for number in (1, 2)]
    assert [[part["name"] for part in record["nodes"]] for record in records] == [list(NAMES)] * 2
    start = load_file(folder / "start/adapter_model.safetensors")
    after = load_file(apart.root / f"run/round-2/{STATE}")
    assert any((after[f"global:{name}"] != tensor).any() for name, tensor in start.items())
    assert [len(read_rounds(home)) for home in apart.nodes.values()] == [2, 2, 2]

    apart.network.say("north", "coordinator", "words in the clear")
    captured = folder / "captured"
    wait_until(lambda: b"words in the clear" in captured.read_bytes(), 30, "not all is captured")
    sizes = sum(record["sent_bytes"] + record["received_bytes"] for record in records)
    seen = captured.read_bytes()
    assert len(seen) > sizes
    kept = b"".join(path.read_bytes() for path in apart.root.rglob("*") if path.is_file())
    for word in SECRET.split():
        assert word.encode() not in seen and word.encode() not in kept
        for home in apart.nodes.values():
            assert any(word.encode() in path.read_bytes() for path in (home / "data/raw").rglob("*.jsonl"))


def test_the_coordinator_s_port_is_all_that_others_reach(apart: Apart) -> None:
    network, port = apart.network, apart.config.federate.port
    assert network.open_ports("north", "coordinator") == [port]
    assert network.open_ports("west", "north") == []
    assert network.open_ports("coordinator", "west") == []


def test_the_certificate_is_for_the_address_on_the_network(apart: Apart) -> None:
    network, port = apart.network, str(apart.config.federate.port)
    address, authority = network.address["coordinator"], apart.nodes["south"] / NODE / NODE_AUTHORITY
    assert network.python("south", TLS, address, port, str(authority)).startswith("TLSv1.")
    assert "certificate" in network.python("south", TLS, address, port, "")  # no other authority knows it
