"""`make demo-federated` as people run it: three nodes join over TLS, train together, and the gate judges.

In a clone of its own, in two rounds instead of five, and without the trainings for comparison; then the link
is looked at from outside.
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from ratchet.config.params import load_config
from ratchet.demo.federated import COORDINATOR, EPSILON, NODES, PLACE, PRIVATE
from ratchet.evaluation.report import read_metrics
from ratchet.federation.link.flower import FOLDER
from ratchet.federation.records import DELIVERED, NODE, read_delivery, read_rounds
from ratchet.models.loading import adapter_sha256
from ratchet.models.manifests import read_trained_manifest
from ratchet.pipeline.checkout import git
from ratchet.promotion.champion import Champion, read_champion
from ratchet.promotion.verdict import Rival, Verdict, read_verdict
from ratchet.services.specs import FEDERATION
from ratchet.services.supervisor import stop_service, stop_services

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]
ROUNDS = 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    clone = tmp_path_factory.mktemp("federated") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = os.environ | {"PYTHONPATH": str(clone)}
    environment.pop("RATCHET_ROOT", None)
    ran = subprocess.run(
        [sys.executable, "-m", "ratchet.demo.federated", "--no-comparison", "--rounds", str(ROUNDS)],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        assert ran.returncode == 0, f"{ran.stdout[-6000:]}\n{ran.stderr[-3000:]}"
        yield clone / PLACE
    finally:
        for home in (clone / PLACE).glob("*/params.yaml"):
            stop_service(home.parent, FEDERATION)
        stop_services(clone / PLACE / COORDINATOR, report=lambda _: None)


def promoted(home: Path) -> tuple[Champion, Verdict]:
    """The champion, and the verdict that put it in charge."""
    champion = read_champion(home)
    assert champion is not None
    found = git(home, "show", f"{champion.commit}:reports/gate.json")
    return champion, msgspec.json.decode(found, type=Verdict)


def test_together_the_nodes_learn_what_the_base_does_not_know(place: Path) -> None:
    evaluated = read_metrics(place / COORDINATOR / "reports/evaluation").slices["test"]
    scores = {model: evaluated[model].scores["exact_match"] for model in ("champion", "base")}
    assert scores["champion"].low > scores["base"].mean + 0.03
    (nodes,) = [check for check in promoted(place / COORDINATOR)[1].checks if check.name == "nodes"]
    assert nodes.result == "pass" and nodes.rows > 150 and nodes.gain is not None and nodes.gain[1] > 0


def test_the_version_says_who_trained_it(place: Path) -> None:
    champion, verdict = promoted(place / COORDINATOR)
    assert verdict.candidate.trained_by.startswith("3 nodes (north, south, west) in 2 rounds")
    assert verdict.verdict == "promote"
    assert (champion.version, champion.run_key) == (1, verdict.candidate.run_key)
    for name in NODES:
        rounds = [done.round for done in read_rounds(place / name)]
        assert rounds == [*range(1, ROUNDS + 1), *range(1, PRIVATE["federate"]["rounds"] + 1)]
        delivery = read_delivery(place / name)
        assert delivery is not None and delivery.version == 1
        assert (delivery.federation.nodes, delivery.federation.rounds) == (sorted(NODES), ROUNDS)
        kept = place / name / NODE / DELIVERED
        assert adapter_sha256(kept) == champion.adapter_sha256


def test_the_version_with_privacy_meets_the_same_gate_and_the_champion_stays(place: Path) -> None:
    home = place / COORDINATOR
    together, verdict = (
        read_trained_manifest(home / "models/candidate").federation,
        read_verdict(home / "reports/gate.json"),
    )
    assert together is not None and together.epsilon is not None
    assert 0.9 * EPSILON < together.epsilon <= EPSILON
    assert "ε = 7.9" in verdict.candidate.trained_by or "ε = 8" in verdict.candidate.trained_by
    (privacy,) = [check for check in verdict.checks if check.name == "privacy"]
    assert privacy.result == "pass" and "ε = 8, δ = 1e-05 for each of" in privacy.reason
    assert verdict.rival == Rival("champion", 1) and verdict.verdict != "promote"
    for name in NODES:
        assert read_rounds(place / name)[-1].epsilon == pytest.approx(together.epsilon, rel=0.05)


def test_no_row_of_a_node_is_at_the_coordinator(place: Path) -> None:
    """Its files, logs and databases: nothing of what nodes were asked to learn."""
    known = (place / COORDINATOR / ".ratchet/rows.jsonl").read_text() + (
        place / COORDINATOR / ".ratchet/golden.jsonl"
    ).read_text()
    texts = []
    for name in NODES:
        for line in (place / name / ".ratchet/rows.jsonl").read_text().splitlines()[::40]:
            question = json.loads(line)["messages"][0]["content"]
            if question[-50:] not in known and len(question) > 60:
                texts.append(question[-50:].encode())
    assert len(texts) > 20
    for path in sorted((place / COORDINATOR).rglob("*")):
        if path.is_file() and "site-packages" not in path.parts and not path.is_symlink():
            data = path.read_bytes()
            assert not any(text in data for text in texts), path


def test_other_machines_reach_the_part_for_nodes_alone(place: Path) -> None:
    """Whoever reaches the SuperLink's other interfaces could run code of their choice."""
    home = place / COORDINATOR
    settings = load_config(home / "params.yaml").federate
    context = ssl.create_default_context(cafile=str(home / FOLDER / "tls/authority.pem"))

    def ask(path: str) -> int:
        asked = urllib.request.Request(
            f"https://127.0.0.1:{settings.port}{path}", data=b"", headers={"Content-Length": "0"}
        )
        try:
            with urllib.request.urlopen(asked, context=context) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert ask("/v1/fleet/pull-messages") in (400, 401, 415, 422)  # there, and not without a registered key
    for path in (
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet/../control/start-run",
        "/health",
        "/docs",
    ):
        assert ask(path) == 404, path


def test_nothing_listens_beyond_loopback_and_keys_are_their_owners(place: Path) -> None:
    import stat

    import psutil

    processes = psutil.Process(
        json.loads((place / COORDINATOR / ".ratchet/run/federation.json").read_text())["pid"]
    ).children(recursive=True)
    ports = [
        found.laddr
        for process in processes
        for found in process.net_connections()
        if found.status == "LISTEN"
    ]
    assert ports and {address.ip for address in ports} == {"127.0.0.1"}
    for path in place.rglob("*"):
        if path.name in ("key", "certificate.key", "authority.key"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
