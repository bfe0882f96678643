"""Machines on one: network namespaces on a bridge, without any way out, and what passes on the bridge."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from live import wait_until
from patience import scaled

CAPTURE = """
import socket, sys
port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
port.setsockopt(socket.SOL_SOCKET, 33, 2**26)  # SO_RCVBUFFORCE: nothing is dropped while the disk is slow
with open(sys.argv[1], "wb", 0) as out:
    out.write(b"began ")
    while True:
        out.write(port.recv(2**16))
"""
SCAN = """
import socket, sys
for port in range(1, 2**16):
    with socket.socket() as probe:
        probe.settimeout(2)
        if probe.connect_ex((sys.argv[1], port)) == 0:
            print(port)
"""
SAY = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as port:
    port.sendto(sys.argv[2].encode(), (sys.argv[1], 9))
"""


class Network:
    """Namespaces with an address each; their names are those of the machines."""

    def __init__(self, names: Sequence[str]) -> None:
        self.address = {name: f"10.219.7.{place}" for place, name in enumerate(names, start=1)}
        self._bridge = self._name("bridge")
        self._capture: subprocess.Popen[bytes] | None = None

    def _name(self, name: str) -> str:
        return f"ratchet-{os.getpid()}-{name}"

    def make(self) -> None:
        """Raises CalledProcessError, with what `ip` said: this machine makes none."""
        _ip("netns", "add", self._bridge)
        _ip("-n", self._bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._bridge, "link", "set", "br0", "up")
        for name, address in self.address.items():
            here, port = self._name(name), f"to-{address.rpartition('.')[2]}"
            _ip("netns", "add", here)
            ends = ("add", port, "netns", self._bridge, "type", "veth")
            _ip("link", *ends, "peer", "name", "eth0", "netns", here)
            _ip("-n", self._bridge, "link", "set", port, "master", "br0", "up")
            _ip("-n", here, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", here, "link", "set", device, "up")

    def inside(self, name: str, *command: str | Path) -> list[str]:
        """Return the command that runs another one on a machine."""
        return ["ip", "netns", "exec", self._name(name), *map(str, command)]

    def python(self, name: str, code: str, *arguments: str) -> str:
        """Run Python code on a machine; return what it prints."""
        command = self.inside(name, sys.executable, "-c", code, *arguments)
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=scaled(120)).stdout

    def open_ports(self, name: str, of: str) -> list[int]:
        """Return the TCP ports of a machine that another one reaches."""
        return [int(line) for line in self.python(name, SCAN, self.address[of]).split()]

    def say(self, name: str, to: str, words: str) -> None:
        """Send words that anybody can read."""
        self.python(name, SAY, self.address[to], words)

    def capture(self, path: Path) -> None:
        """Write all that passes on the bridge to a file from now on."""
        command = ["ip", "netns", "exec", self._bridge, sys.executable, "-c", CAPTURE, str(path)]
        self._capture = subprocess.Popen(command)
        wait_until(lambda: path.exists() and path.stat().st_size, 30, "nothing is captured")

    def remove(self) -> None:
        """End what runs on the machines, and remove them."""
        if self._capture:
            self._capture.kill()
            self._capture.wait()
        for name in (*map(self._name, self.address), self._bridge):
            left = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for number in left.stdout.split():
                os.kill(int(number), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def machines(*names: str) -> Iterator[Network]:
    """Make machines; skip the test, with the reason, where no network namespaces can be made."""
    if not shutil.which("ip"):
        pytest.skip("no network namespaces here: the command `ip` (iproute2) is missing")
    network = Network(names)
    try:
        network.make()
    except subprocess.CalledProcessError as error:
        network.remove()
        pytest.skip(f"no network namespaces here, they need root: {error.stderr.strip()}")
    try:
        yield network
    finally:
        network.remove()
