"""Take nodes in and put them out, at the coordinator; accept an invitation, at a node.

An invitation is one JSON file: the node's name, the coordinator's address and certificate authority, and a
key for the node. The coordinator keeps the public half alone. A node that made its key itself gets an
invitation without one.
"""

from __future__ import annotations

import datetime as dt
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import msgspec

from ratchet.config.params import Config
from ratchet.errors import UserError
from ratchet.federation import records
from ratchet.federation.link import flower
from ratchet.federation.link.certificates import AUTHORITY, check_public_key, node_key
from ratchet.federation.link.flower import Control, read_names
from ratchet.federation.link.party import NODE_AUTHORITY, NODE_KEY, READY
from ratchet.files import write_json, write_private, write_text

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HOURS = re.compile(r"([01]?\d|2[0-4])-([01]?\d|2[0-4])")


class Invitation(msgspec.Struct, frozen=True):
    name: str
    url: str  # host:port
    authority: str  # PEM
    key: str  # OpenSSH, or "" where the node has its own


def invite(root: Path, config: Config, name: str, out: Path, public_key: Path | None = None) -> Path:
    """Register a node, and write its invitation, mode 0600.

    Raises UserError: the name is taken or no name, the file holds no public key, or the link does not run.
    """
    folder = root / flower.FOLDER
    _require_link(folder)
    if not NAME.fullmatch(name):
        raise UserError(f"a node's name is {name!r}", remedy="use letters, digits, dots and dashes, up to 64")
    names = read_names(folder)
    if name in names.values():
        raise UserError(
            f"a node is called {name} already", remedy=f"ratchet federate remove {name}, or another name"
        )
    if any(node.name == name for node in records.read_forgotten_nodes(folder)):
        raise UserError(f"{name} was forgotten, and stays so", remedy="choose another name")
    if out.exists():
        raise UserError(f"{out} exists", remedy="remove it, or name another file with --out")
    with tempfile.TemporaryDirectory(prefix="ratchet-invite-") as scratch:
        private = Path(scratch) / "key"
        public = public_key or Path(scratch) / "key.pub"
        if public_key is None:
            write_text(public, node_key(private))
        else:
            check_public_key(public)
        number = Control(folder, config.federate.superlink_port).register(name, public)
        key = "" if public_key else private.read_text()
    write_json(folder / "nodes.json", {**names, number: name})
    url = f"{config.federate.names[0]}:{config.federate.port}"
    invitation = Invitation(name, url, (folder / "tls" / AUTHORITY).read_text(), key)
    write_private(out, msgspec.json.format(msgspec.json.encode(invitation)))
    return out


def remove(root: Path, config: Config, name: str) -> None:
    """Put a node out. Raises UserError: there is none of that name, or the link does not run."""
    folder = root / flower.FOLDER
    names = read_names(folder)
    numbers = [number for number, known in names.items() if known == name]
    if not numbers:
        raise UserError(
            f"no node is called {name}; there are {', '.join(sorted(names.values())) or 'none'}",
            remedy="ratchet federate status",
        )
    _require_link(folder)
    Control(folder, config.federate.superlink_port).unregister(numbers[0])
    write_json(folder / "nodes.json", {number: known for number, known in names.items() if known != name})


def forget_node(root: Path, config: Config, name: str, reason: str) -> None:
    """Put a node out where it is in, and let no training go on from what it taught.

    Raises UserError: it was forgotten before, or the link does not run.
    """
    folder = root / flower.FOLDER
    known = records.read_forgotten_nodes(folder)
    if any(node.name == name for node in known):
        raise UserError(f"{name} is forgotten already", remedy="ratchet federate run trains without it")
    if name in read_names(folder).values():
        remove(root, config, name)
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    forgotten = [*known, records.ForgottenNode(name, now, reason)]
    write_json(folder / records.FORGOTTEN, msgspec.to_builtins(forgotten))


def _require_link(folder: Path) -> None:
    if not (folder / READY).exists():
        raise UserError("the coordinator's link does not run", remedy="ratchet federate up")


class Limits(NamedTuple):
    """What a node is ready to do; None, or no hours, leaves what was said before."""

    rounds_a_day: int | None = None  # 0: any number
    hours: str = ""
    epsilon: float | None = None


def accept(root: Path, path: Path | None, limits: Limits) -> records.Node:
    """Take the coordinator's address and this node's key from an invitation, where there is one; set limits.

    Raises UserError: the invitation cannot be read, is another node's, or holds no key and this node has
    none; there is none and this checkout has not joined; or the hours are no range.
    """
    if limits.hours and not HOURS.fullmatch(limits.hours):
        raise UserError(f"--hours is {limits.hours!r}", remedy="give two full hours, such as 20-6")
    joined = (root / records.NODE / records.SETTINGS).exists()
    before = records.read_node(root) if joined or path is None else records.Node("", "")
    name, url = _take_key(root, path, before.name) if path else (before.name, before.url)
    settings = records.Node(
        name,
        url,
        before.rounds_a_day if limits.rounds_a_day is None else limits.rounds_a_day or None,
        limits.hours or before.hours,
        before.epsilon if limits.epsilon is None else limits.epsilon,
    )
    write_json(root / records.NODE / records.SETTINGS, msgspec.to_builtins(settings))
    return settings


def _take_key(root: Path, path: Path, known_as: str) -> tuple[str, str]:
    """Keep what an invitation holds, and return the node's name and the coordinator's address."""
    if not path.exists():
        raise UserError(
            f"there is no file {path}",
            remedy="name the invitation that the coordinator made with `ratchet federate invite NAME`",
        )
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Invitation)
    except (OSError, msgspec.DecodeError) as error:
        raise UserError(
            f"{path} is no invitation: {error}", remedy="ask the coordinator: ratchet federate invite NAME"
        ) from None
    if known_as not in ("", found.name):
        raise UserError(
            f"{path} is for {found.name}, and this checkout is the node {known_as}",
            remedy="`ratchet federate leave` first; or take another clone for another node",
        )
    folder = root / records.NODE
    key = folder / NODE_KEY
    if found.key:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(key, found.key.encode())
    elif not key.exists():
        raise UserError(
            f"{path} holds no key, and this checkout has none",
            remedy="`ratchet federate key` makes one; give it to the coordinator for the invitation",
        )
    node_key(key)
    write_text(folder / NODE_AUTHORITY, found.authority)
    return found.name, found.url


def leave(root: Path) -> None:
    """Remove a node's key and settings, and all that rounds left but their records."""
    folder = root / records.NODE
    for name in (NODE_KEY, NODE_AUTHORITY, records.SETTINGS):
        (folder / name).unlink(missing_ok=True)
    for name in ("work", "replies", "supernode"):
        shutil.rmtree(folder / name, ignore_errors=True)
