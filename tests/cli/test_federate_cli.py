"""`ratchet federate` before anything runs: what is missing is said, nothing is half done."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from command import ratchet

from flows.federate import forget
from flows.retrain import require_nodes
from ratchet.config.docs import render_params
from ratchet.config.federation import FederateConfig
from ratchet.config.params import Config
from ratchet.errors import CheckoutError, UserError
from ratchet.federation import records
from ratchet.federation.link import flower
from ratchet.federation.link.certificates import check_public_key, node_key
from ratchet.federation.link.invitations import Limits, accept, forget_node
from ratchet.federation.records import NODE
from ratchet.files import write_json
from ratchet.pipeline.checkout import locked
from ratchet.promotion.lineage import taught_by
from ratchet.tracking.registry import Version


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text(render_params(Config()))
    return tmp_path


def invitation(folder: Path, **changes: str) -> Path:
    key = folder / "made"
    node_key(key)
    told = {"name": "north", "url": "here.example:8092", "authority": "PEM", "key": key.read_text()} | changes
    path = folder / "north.invitation"
    path.write_text(json.dumps(told))
    return path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["invite", "north"], "the coordinator's link does not run"),
        (["remove", "north"], "no node is called north; there are none"),
        (["join", "nothing.invitation"], "there is no file nothing.invitation"),
        (["join"], "has joined no federation"),
        (["take"], "was given no version of a federation"),
    ],
)
def test_what_is_missing_is_said(checkout, arguments, told):
    done = ratchet("-C", str(checkout), "federate", *arguments)
    assert done.returncode == 2 and told in done.stderr and "→" in done.stderr


def test_a_name_that_is_none_or_taken_is_refused(checkout):
    folder = checkout / flower.FOLDER
    folder.mkdir(parents=True)
    (folder / "ready.json").write_text("{}")
    write_json(folder / "nodes.json", {"1": "north"})
    for name, told in (("../north", "a node's name is '../north'"), ("north", "is called north already")):
        done = ratchet("-C", str(checkout), "federate", "invite", name)
        assert done.returncode == 2 and told in done.stderr
    assert not list(checkout.glob("*.invitation"))


def test_an_invitation_gives_a_node_its_key_and_limits(checkout, monkeypatch):
    """The services are not started: Flower is looked for first."""
    monkeypatch.setattr(flower.sys, "prefix", str(checkout / "venv"))
    path = invitation(checkout)
    arguments = ["--rounds-a-day", "3", "--hours", "20-6", "--epsilon", "8"]
    done = ratchet("-C", str(checkout), "federate", "join", str(path), *arguments)
    assert done.returncode == 2 and "make federated" in done.stderr
    assert records.read_node(checkout) == records.Node("north", "here.example:8092", 3, "20-6", 8.0)
    key = checkout / records.NODE / "key"
    assert key.read_bytes() == (checkout / "made").read_bytes() and stat.S_IMODE(key.stat().st_mode) == 0o600
    assert (
        "north, of the coordinator at here.example:8092"
        in ratchet("-C", str(checkout), "federate", "status").stdout
    )
    ratchet("-C", str(checkout), "federate", "join", "--rounds-a-day", "0", "--hours", "0-6")
    assert records.read_node(checkout) == records.Node("north", "here.example:8092", None, "0-6", 8.0)
    done = ratchet("-C", str(checkout), "federate", "join", "--hours", "day")
    assert done.returncode == 2 and "give two full hours" in done.stderr
    assert "between 0-6 o'clock, ε = 8 in all" in ratchet("-C", str(checkout), "federate", "status").stdout
    done = ratchet("-C", str(checkout), "federate", "join", str(invitation(checkout, name="south")))
    assert done.returncode == 2 and "is for south, and this checkout is the node north" in done.stderr
    assert records.read_node(checkout).name == "north"
    ratchet("-C", str(checkout), "federate", "leave")
    assert not key.exists() and not (checkout / records.NODE / records.SETTINGS).exists()


def test_an_invitation_without_a_key_needs_the_nodes_own(checkout):
    path = invitation(checkout, key="")
    done = ratchet("-C", str(checkout), "federate", "join", str(path))
    assert done.returncode == 2 and "holds no key, and this checkout has none" in done.stderr
    public = ratchet("-C", str(checkout), "federate", "key").stdout
    assert public.startswith("ecdsa-sha2-nistp384 ")


@pytest.mark.parametrize("hours", ["8", "8-25", "eight-nine", "-1-3"])
def test_hours_that_are_none_are_refused(checkout, hours):
    done = ratchet("-C", str(checkout), "federate", "join", str(invitation(checkout)), f"--hours={hours}")
    assert done.returncode == 2 and "give two full hours" in done.stderr
    assert not (checkout / records.NODE).exists()


def test_a_forgotten_node_stays_so(checkout):
    folder = checkout / flower.FOLDER
    write_json(folder / "nodes.json", {})  # it was removed before
    (folder / "ready.json").write_text("{}")
    forget_node(checkout, Config(), "north", "it left")
    (known,) = records.read_forgotten_nodes(folder)
    assert (known.name, known.reason) == ("north", "it left")
    with pytest.raises(UserError, match="north is forgotten already"):
        forget_node(checkout, Config(), "north", "again")
    done = ratchet("-C", str(checkout), "federate", "invite", "north")
    assert done.returncode == 2 and "north was forgotten, and stays so" in done.stderr


def test_versions_that_a_node_taught_are_found():
    def version(number: int, **tags: str) -> Version:
        return Version("domain-lm", number, "run", tags, "")

    versions = [version(3, taught_by='["north","south"]'), version(2), version(1, taught_by='["north"]')]
    assert taught_by(versions, "north") == [1, 3] and taught_by(versions, "south") == [3]
    assert taught_by(versions, "nor") == []


def test_too_few_invited_nodes_are_told_before_anything_waits():
    with pytest.raises(UserError, match=r"1 nodes are invited \(north\); `federate.min_nodes` asks for 2"):
        flower.check_invited(["north"], FederateConfig(min_nodes=2))
    flower.check_invited(["north", "south"], FederateConfig(min_nodes=2))


def test_a_file_that_is_no_public_key_is_refused(checkout):
    folder = checkout / flower.FOLDER
    folder.mkdir(parents=True)
    (folder / "ready.json").write_text("{}")
    (checkout / "c.pub").write_text("ssh-ed25519 nonsense")
    arguments = ["invite", "north", "--public-key", str(checkout / "c.pub")]
    done = ratchet("-C", str(checkout), "federate", *arguments)
    assert done.returncode == 2 and "holds no public key of a node" in done.stderr
    assert not list(checkout.glob("*.invitation"))
    (checkout / "c.pub").write_text(node_key(checkout / "key"))
    check_public_key(checkout / "c.pub")


def test_why_a_link_ended_is_told(checkout):
    accept(checkout, invitation(checkout), Limits())
    (checkout / records.ENDED).write_text("the coordinator did not let this node in")
    told = ratchet("-C", str(checkout), "federate", "status").stdout
    assert "ended   the coordinator did not let this node in" in told and "limits  none" in told


def test_a_node_is_not_forgotten_while_a_run_may_need_it(checkout):
    write_json(checkout / flower.FOLDER / "nodes.json", {"1": "north"})
    with locked(checkout, "federate"), pytest.raises(CheckoutError, match="another `federate` runs"):
        forget(checkout, Config(), "north", "it left")
    assert flower.read_names(checkout / flower.FOLDER) == {"1": "north"}


def test_a_node_starts_no_run(checkout):
    write_json(checkout / NODE / "node.json", {})
    with pytest.raises(UserError, match="is a node of a federation"):
        require_nodes(checkout, Config.model_validate({"federate": {"min_nodes": 2}}))
