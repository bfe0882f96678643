"""Requests with pictures: the engine's answers are those of the evaluation, whoever shares the batch."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from media_models import ALL_FAMILIES, BY_FAMILY, hears, make_rows
from PIL import Image, ImageOps

from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig, BaseConfig
from ratchet.data.examples import Example
from ratchet.engines.local_engine import LocalEngine
from ratchet.engines.picture_pooling import measure_pictures
from ratchet.files import read_json, write_json
from ratchet.media.sounds import samples_of, write_flac
from ratchet.models.adapters import add_adapter, load_trained, save_trained
from ratchet.models.chat_template import encode_last_answer
from ratchet.models.generation import answer_likelihoods, greedy_ids, likelihoods_and_answers
from ratchet.models.loading import load_base, load_chat
from ratchet.models.manifests import BaseName
from ratchet.models.processors import copy_processor
from ratchet.monitoring.picture_features import unpack
from ratchet.serving.bundle import Bundle, Generation
from ratchet.serving.engine import Ask, Ended, Piece
from tasks.base import make_base


class Place(NamedTuple):
    base: Path
    versions: dict[int, Path]
    rows: list[Example]
    pictures: dict[str, bytes]

    def bundle(self, version: int) -> Bundle:
        return Bundle("tiny", version, self.versions[version], self.base, 512, Generation(6))

    def expected(self, version: int) -> list[str]:
        """Return the answers of the evaluation, each row asked alone."""
        chat = load_chat(self.base, self.pictures)
        model = load_trained(self.base, self.versions[version]).eval()
        prompts = [chat.encode_prompt(row.prompt) for row in self.rows]
        media = [row.media for row in self.rows]
        ids = greedy_ids(model, prompts, chat, max_new_tokens=6, batch_size=1, media=media)
        return [chat.decode_answer(answer) for answer in ids]


def make_place(folder: Path, family: str, adapter: AdapterConfig) -> Place:
    """Make a base with two versions whose adapters change every answer."""
    make_base(folder / "base", Config(base=BaseConfig(model=str(ALL_FAMILIES[family](folder / "model")))))
    versions = {}
    for version in (1, 2):
        model = add_adapter(load_base(folder / "base"), adapter, seed=version)
        for name, weight in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                torch.nn.init.normal_(weight, std=0.2)
        versions[version] = folder / f"v{version}"
        save_trained(model, folder / "base", versions[version])
        load_chat(folder / "base").tokenizer.save_pretrained(versions[version])
        copy_processor(folder / "base", versions[version])
        base = read_json(folder / "base/manifest.json")
        manifest = {
            "version": version,
            "base": {key: base[key] for key in BaseName.__struct_fields__ if key in base},
            "adapter": adapter.model_dump(mode="json"),
            "batches": [],
        }
        write_json(versions[version] / "manifest.json", manifest)
    rows, pictures = make_rows(16, seed=3, sounds=hears(folder / "base"))
    return Place(folder / "base", versions, rows, pictures)


@pytest.fixture(scope="module", params=BY_FAMILY)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(
        tmp_path_factory.mktemp(request.param), request.param, AdapterConfig(rank=4, alpha=64.0)
    )


def ask_all(place: Place, version_of: Any, **gateway: Any) -> list[str]:
    return [text for text, _ in told(place, version_of, gateway=gateway)]


def told(place: Place, version_of: Any, **settings: Any) -> list[tuple[str, Ended]]:
    async def one(engine: LocalEngine, number: int, row: Example) -> tuple[str, Ended]:
        media = {name: place.pictures[name] for name in row.media}
        ask = Ask(f"r{number}", version_of(number), row.prompt, media=media)
        pieces = [piece async for piece in engine.answer(ask)]
        assert isinstance(pieces[-1], Ended)
        return "".join(piece.text for piece in pieces if isinstance(piece, Piece)), pieces[-1]

    async def everything() -> list[tuple[str, Ended]]:
        engine = LocalEngine(Config.model_validate(settings))
        try:
            for version in place.versions:
                await engine.load(place.bundle(version))
            return await asyncio.gather(*(one(engine, *each) for each in enumerate(place.rows)))
        finally:
            await engine.close()

    return asyncio.run(everything())


def test_rows_with_and_without_pictures_answer_together_as_each_does_alone(place: Place) -> None:
    assert ask_all(place, lambda _: 1, max_batch=7) == place.expected(1)


def test_both_arms_look_at_their_own_pictures(place: Place) -> None:
    expected = {version: place.expected(version) for version in place.versions}
    assert sum(a != b for a, b in zip(expected[1], expected[2], strict=True)) > 8
    found = ask_all(place, lambda number: 1 + number % 2, max_batch=5)
    assert found == [expected[1 + number % 2][number] for number in range(len(found))]


@pytest.mark.parametrize(
    ("family", "projector", "tower"),
    [("llava", "lora", "lora"), ("qwen3_vl", "lora", "frozen"), ("idefics3", "whole", "frozen")],
)
def test_arms_with_projectors_of_their_own_answer_as_each_does_alone(
    family: str, projector: str, tower: str, tmp_path: Path
) -> None:
    adapter = AdapterConfig(rank=4, alpha=64.0, projector=projector, tower=tower)
    place = make_place(tmp_path, family, adapter)
    expected = {version: place.expected(version) for version in place.versions}
    found = ask_all(place, lambda number: 1 + number % 2, max_batch=5)
    assert found == [expected[1 + number % 2][number] for number in range(len(found))]


def test_the_evaluation_measures_rows_with_pictures_as_each_alone(place: Place) -> None:
    chat = load_chat(place.base, place.pictures)
    model = load_trained(place.base, place.versions[1]).eval()
    shown = [row for row in place.rows if row.media]
    wholes, prompts = (
        [encode_last_answer(chat, row) for row in shown],
        [chat.encode_prompt(row.prompt) for row in shown],
    )
    likelihoods, answers = likelihoods_and_answers(model, wholes, prompts, chat, max_new_tokens=6)
    assert [chat.decode_answer(ids) for ids in answers] == [
        answer for answer, row in zip(place.expected(1), place.rows, strict=True) if row.media
    ]
    alone = answer_likelihoods(model, wholes, pad_id=chat.pad_id, batch_size=1, inputs=chat.inputs)
    assert [one.nll for one in likelihoods] == pytest.approx([one.nll for one in alone], rel=1e-4)
    other_way = chat.showing({name: inverted(data) for name, data in place.pictures.items()})
    other = answer_likelihoods(model, wholes, pad_id=chat.pad_id, batch_size=1, inputs=other_way.inputs)
    assert sum(a.nll != b.nll for a, b in zip(alone, other, strict=True)) > len(shown) // 2


def test_the_engine_tells_what_the_evaluation_sees_in_each_picture(place: Place) -> None:
    ended = [end for _, end in told(place, lambda number: 1 + number % 2, gateway={"max_batch": 5})]
    if hears(place.base):  # of recordings there are none
        assert not any(end.features for end in ended)
        return
    assert [set(end.features) for end in ended] == [set(row.media) for row in place.rows]
    model, processor = load_trained(place.base, place.versions[1]).eval(), load_chat(place.base).processor
    expected = measure_pictures(model, processor, place.pictures, list(place.pictures))
    assert set(expected) == set(place.pictures)
    for end in ended:
        for name, features in end.features.items():
            np.testing.assert_allclose(unpack([features]), unpack([expected[name]]), atol=2e-3)
    apart = np.abs(unpack(list(expected.values())) - unpack([next(iter(expected.values()))])).max(axis=1)
    assert np.sort(apart)[1] > 4e-3, "no other picture has the features of the first"


def test_the_engine_tells_nothing_of_pictures_where_the_log_keeps_nothing(place: Place) -> None:
    ended = [end for _, end in told(place, lambda _: 1, request_log={"picture_features": False})]
    assert not any(end.features for end in ended)


def inverted(picture: bytes) -> bytes:
    """Return a picture of the same size in the opposite colours, or a recording of the same length."""
    if picture.startswith(b"fLaC"):
        return write_flac(samples_of(picture)[::-1].copy() ** 2)
    stored = io.BytesIO()
    ImageOps.invert(Image.open(io.BytesIO(picture)).convert("RGB")).save(stored, "PNG")
    return stored.getvalue()
