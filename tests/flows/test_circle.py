"""The whole circle with real servers and no shortcut: traffic, no drift; other traffic, drift; the event
retrains; live feedback promotes; one command returns.

A model of width 64 learns which team handles which thing. Some minutes.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from patience import scaled, within

from ratchet.config.docs import render_params
from ratchet.config.params import Config, load_config
from ratchet.demo.clients import Question, ask_gateway, summarise
from ratchet.demo.follow import follow_retraining
from ratchet.promotion.champion import read_champion
from ratchet.promotion.rollout import read_ended, read_rollout
from ratchet.services.processes import free_port
from tests.flows.test_loop import ROOT, mlflow_client, ratchet, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]
SLOW = 50.0  # accepted rise of the latency: other work on the machine must decide nothing here
TEAMS = ["red", "blue", "green", "white"]
HOUSE = [
    "door",
    "window",
    "roof",
    "floor",
    "stair",
    "lamp",
    "wall",
    "sink",
    "stove",
    "chair",
    "table",
    "shelf",
]
BOAT = [
    "rudder",
    "anchor",
    "mast",
    "keel",
    "hull",
    "sail",
    "winch",
    "cleat",
    "tiller",
    "bilge",
    "jib",
    "boom",
]
VERBS = [
    "broke",
    "creaks",
    "leaks",
    "is loose",
    "is wet",
    "smells",
    "rattles",
    "is gone",
    "is stuck",
    "is dirty",
    "moves",
    "is cold",
]
PLACES = [
    f"{side} {what}"
    for side in ("north", "south", "east", "west", "upper", "lower")
    for what in ("wing", "yard", "court", "hall", "deck", "quarter", "dock", "gate")
]


def questions(things: list[str], count: int, seed: int) -> list[Question]:
    """Distinct ones; the thing alone decides the answer."""
    chance, found = random.Random(seed), {}
    while len(found) < count:
        number = chance.randrange(len(things))
        place, verb, days = chance.choice(PLACES), chance.choice(VERBS), chance.randrange(1, 60)
        text = f"In the {place} a {things[number]} {verb} since {days} days: who?"
        found[text] = Question(text, TEAMS[number % len(TEAMS)], "boats" if things is BOAT else "houses")
    return list(found.values())


def write_rows(path: Path, asked: list[Question]) -> None:
    path.write_text(
        "".join(json.dumps({"question": one.text, "answer": one.answer}) + "\n" for one in asked),
        encoding="utf-8",
    )


def circle_config(boats: Path) -> Config:
    return Config.model_validate(
        {
            "project": {"name": "teams"},
            "base": {
                "demo": {
                    "packages": ["asyncio"],
                    "module_share": 1.0,
                    "hidden_size": 64,
                    "layers": 2,
                    "heads": 2,
                    "vocab_size": 600,
                    "steps": 30,
                }
            },
            "prepare": {"min_rows": 50},
            "tokenize": {"max_length": 96, "window": 192},
            "train": {"epochs": 16, "batch_windows": 4, "learning_rate": 5.0e-3, "patience": 8},
            "adapter": {"rank": 16, "alpha": 32},
            "evaluate": {"max_new_tokens": 6, "simple_baseline": False},
            "gate": {"min_rows": 20, "golden_margin": 1.0, "past_margin": 0.2, "nll_margin": 2.0},
            "services": {"mlflow_port": free_port(), "prefect_port": free_port()},
            "gateway": {"port": free_port()},
            "monitor": {
                "window": 300,
                "resamples": 500,
                "cooldown_hours": 0,
                "latency_margin": SLOW,
                "sources": [{"match": "|".join(BOAT), "source": "jsonl", "path": str(boats)}],
            },
            "rollout": {
                "steps": [0.2, 0.5, 1.0],
                "step_minutes": 0,
                "step_users": 10,
                "min_users": 60,
                "latency_margin": SLOW,
            },
        }
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("circle") / "teams"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(place)], check=True)
    for command in (
        ["remote", "remove", "origin"],
        ["checkout", "-q", "-B", "main"],
        ["config", "user.name", "Ana"],
        ["config", "user.email", "ana@example.org"],
    ):
        run(place, "git", *command)
    write_rows(place.parent / "boats.jsonl", questions(BOAT, 700, seed=2))
    (place / "params.yaml").write_text(
        render_params(circle_config(place.parent / "boats.jsonl")), encoding="utf-8"
    )
    run(place, "git", "commit", "-qam", "Our settings")
    yield place
    ratchet(place, "down", "--force")


def ask(place: Path, asked: list[Question], users: str) -> dict[tuple[int, str], float]:
    """(version, kind) → share that was right. No request may fail."""
    config = load_config(place / "params.yaml")
    replies = ask_gateway(
        f"http://127.0.0.1:{config.gateway.port}",
        "teams",
        asked,
        users=[f"{users}-{number}" for number in range(len(asked))],
        parallel=8,
    )
    assert [reply.fault for reply in replies if reply.fault] == []
    return {(score.version, score.kind): score.right / score.asked for score in summarise(replies)}


def test_the_circle_closes(home: Path) -> None:
    write_rows(home.parent / "houses.jsonl", questions(HOUSE, 700, seed=1))
    ratchet(home, "up")
    ratchet(home, "ingest", "--path", str(home.parent / "houses.jsonl"))
    assert json.loads(ratchet(home, "retrain", "--json", "--reason", "first"))["champion"] == 1, (
        "nobody to roll out against: v1 takes charge at once"
    )
    wait_for_version(home, 1)

    quiet = ask(home, questions(HOUSE, 300, seed=3), "quiet")
    calm = json.loads(ratchet(home, "monitor", "--json"))

    assert quiet[1, "houses"] > 0.6
    assert calm["verdict"] == "no drift" and calm["rows"] == 300 and not calm["decision"]["retrain"], calm

    ask(home, [*questions(HOUSE, 150, seed=4), *questions(BOAT, 150, seed=5)], "mixed")
    began = time.monotonic()
    drifted = json.loads(ratchet(home, "monitor", "--json"))

    assert drifted["verdict"] == "drift" and drifted["decision"]["retrain"], drifted
    assert any(
        set(BOAT) & set(" ".join([topic["name"], *topic["examples"]]).replace(":", " ").split())
        for topic in drifted["topics"]
    ), drifted["topics"]
    lines: list[str] = []
    surroundings = dict(os.environ)
    try:
        follow_retraining(home, say=lines.append)
    finally:  # it points this process at the checkout's services; later tests have their own
        os.environ.clear()
        os.environ.update(surroundings)
    print(
        f"from the verdict's start to the end of the retraining {time.monotonic() - began:.0f} s\n"
        + "\n".join(lines)
    )
    gate = json.loads((home / "reports/gate.json").read_text())
    assert gate["verdict"] == "promote", gate["reasons"]
    assert any(
        region["name"].startswith("region:") and region["result"] == "pass" for region in gate["regions"]
    ), gate["regions"]
    champion = read_champion(home)
    assert champion is not None and champion.version == 1, "v2 has to prove itself before users"

    served = roll_out(home)

    champion = read_champion(home)
    assert champion is not None and champion.version == 2 and champion.by.startswith("rollout"), champion
    assert read_ended(home)[-1].state == "promoted" and read_rollout(home) is None
    assert {version for version, _ in served} >= {1, 2}, "both arms answered"
    assert served[2, "boats"] > served[1, "boats"] + 0.2
    assert mlflow_client(home).get_model_version_by_alias("teams", "champion").version == "2"
    wait_for_version(home, 2)
    assert ask(home, questions(BOAT, 100, seed=8), "after")[2, "boats"] > 0.5
    assert "v2" in httpx.get(f"http://127.0.0.1:{load_config(home / 'params.yaml').gateway.port}/").text


def test_rollback_reaches_the_users_in_seconds_with_mlflow_and_prefect_down(home: Path) -> None:
    config = load_config(home / "params.yaml")
    for name in ("mlflow", "prefect", "deployments"):
        stop(home, name)
    asked = questions(HOUSE, 40, seed=9)
    began = time.monotonic()

    with within(30):  # 10 s on a quiet machine
        ratchet(home, "rollback", "--reason", "wrong answers")
        wait_for_version(home, 1)

    print(f"rollback, until the gateway answered with v1: {time.monotonic() - began:.1f} s")
    answered = ask(home, asked, "back")
    assert set(answered) == {(1, "houses")}
    assert httpx.get(f"http://127.0.0.1:{config.gateway.port}/readyz").status_code == 200


def roll_out(home: Path) -> dict[tuple[int, str], float]:
    """Looks and traffic in turn until the rollout ends; who answered how well."""
    right: dict[tuple[int, str], list[float]] = {}
    for look in range(20):
        state: Any = json.loads(ratchet(home, "rollout", "look", "--json"))
        if read_rollout(home) is None and read_ended(home):
            break
        print(look, state.get("state"), state.get("why"))
        time.sleep(1.0)  # the gateway looks at the file three times a second
        for key, share in ask(
            home,
            [*questions(BOAT, 90, seed=100 + look), *questions(HOUSE, 30, seed=200 + look)],
            f"look-{look}",
        ).items():
            right.setdefault(key, []).append(share)
    return {key: sum(shares) / len(shares) for key, shares in right.items()}


def wait_for_version(home: Path, version: int) -> None:
    config = load_config(home / "params.yaml")
    body = {
        "model": "teams",
        "messages": [{"role": "user", "content": "In the north wing a door leaks since 3 days: who?"}],
        "user": "probe",
    }
    seen = None
    for _ in range(int(scaled(1800))):
        answered = httpx.post(
            f"http://127.0.0.1:{config.gateway.port}/v1/chat/completions", json=body, timeout=scaled(60)
        )
        seen = answered.headers.get("x-ratchet-version")
        if seen == str(version):
            return
        time.sleep(0.1)
    pytest.fail(
        f"the gateway answers with {seen} ({answered.text[:300]}), wanted v{version}\n"
        + (home / ".ratchet/logs/gateway.log").read_text()[-3000:]
    )


def stop(home: Path, name: str) -> None:
    """One service, as `ratchet down` would."""
    code = (
        "from pathlib import Path; from ratchet.services.supervisor import stop_service; "
        f"assert stop_service(Path({str(home)!r}), {name!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
