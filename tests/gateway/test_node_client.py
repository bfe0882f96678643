"""The official client for Node against a running gateway: chats, streams, choices, responses, refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from patience import scaled
from served import running_gateway

SCRIPT = Path(__file__).parents[1] / "openai_client.mjs"
ANSWER = " ".join(["pydoc@v1"] * 4)

pytestmark = pytest.mark.e2e


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script beside the client's package, which Node looks for there."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("there is no node or npm in PATH")
    command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(tmp_path), "openai@7"]
    try:
        made = subprocess.run(command, capture_output=True, text=True, timeout=scaled(120))
    except subprocess.TimeoutExpired:
        pytest.skip("npm did not answer")
    if made.returncode:
        pytest.skip(f"npm cannot install openai: {made.stderr.strip()[-200:]}")
    return Path(shutil.copy(SCRIPT, tmp_path))


def test_the_client_for_node_is_answered_as_the_one_for_python(script: Path, tmp_path: Path):
    with running_gateway(tmp_path / "root") as gateway:
        run = subprocess.run(
            ["node", str(script), f"{gateway.url}/v1"], capture_output=True, text=True, timeout=scaled(60)
        )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)

    assert found["model"] == "pydoc" and found["version"] == "1" and found["tokens"] == 4
    assert {found["chat"], found["streamed"], found["response"], found["collected"]} == {ANSWER}
    assert found["choices"] == [ANSWER] * 2 and found["refused"] == [400, "previous_response_id"]
    assert "response.output_text.delta" in found["events"] and "response.completed" in found["events"]
