"""The gateway with the engine `local` on the tiny base: what HTTP says is what the model says."""

from __future__ import annotations

import shutil
from pathlib import Path

import openai
import pytest
from served import digest, put_in_charge, wait_for
from servers import serving

from ratchet.config.params import Config
from ratchet.gateway.app import create_app
from ratchet.gateway.routing import Fleet
from ratchet.gateway.server import make_engine
from ratchet.monitoring.request_log import open_log
from ratchet.serving.bundle import SERVING


def test_a_trained_adapter_answers_whole_as_in_a_stream(tmp_path: Path, tiny_base: Path, candidate: Path):
    put_in_charge(tmp_path, 1)
    shutil.copytree(tiny_base, tmp_path / SERVING / "bases/base", dirs_exist_ok=True)
    shutil.copytree(candidate, tmp_path / SERVING / f"v1-{digest(1)[:12]}/adapter", dirs_exist_ok=True)
    config = Config.model_validate({"project": {"name": "pydoc"}})
    engine, log = make_engine(config), open_log(tmp_path, config)
    app = create_app(tmp_path, config, engine, fleet := Fleet(tmp_path, config, engine), log)
    asked = {
        "model": "pydoc",
        "messages": [{"role": "user", "content": "Which module documents this?"}],
        "max_tokens": 6,
    }

    with serving(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        wait_for(lambda: fleet.table.champion == 1, seconds=30)
        whole = client.chat.completions.create(**asked)
        streamed = list(client.chat.completions.create(**asked, stream=True))
        with pytest.raises(openai.BadRequestError, match="token"):
            client.chat.completions.create(
                **asked | {"messages": [{"role": "user", "content": "word " * 2000}]}
            )
        assert log.flush()
        logged = log.window(limit=10)

    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert (
        whole.choices[0].message.content == text
        and whole.usage is not None
        and 0 < whole.usage.completion_tokens <= 6
    )
    assert [entry.status for entry in logged] == [200, 200, 400]
    assert logged[0].answer == text and logged[0].prompt_nll is not None and logged[0].prompt_nll > 0
