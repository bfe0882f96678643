"""Rows with pictures are trained like any other: whole, alone in their windows, repeatable to the byte."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
import torch
from media_models import (
    ALL_FAMILIES,
    BY_FAMILY,
    hears,
    make_llava,
    make_rows,
    name_of,
    picture,
    write_prepared,
    write_shard,
)
from PIL import Image, ImageOps
from pydantic import ValidationError
from safetensors.torch import load_file

from ratchet.config.data import TokenizeConfig
from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig, BaseConfig, TrainConfig
from ratchet.data.examples import MEDIA_MARK, Example, Message, make_example
from ratchet.errors import BaseModelError, ConfigError, DataError
from ratchet.files import read_json, sha256_file
from ratchet.media.sounds import samples_of, write_flac
from ratchet.media.store import MediaStore
from ratchet.models.adapters import check_start, load_base_of, load_trainable, load_trained, read_kind
from ratchet.models.cache import logits_at, place_rows
from ratchet.models.chat_template import ChatFormat, Encoded
from ratchet.models.generation import Inputs
from ratchet.models.loading import load_base, load_chat
from ratchet.models.manifests import read_base_manifest
from ratchet.models.merging import load_merged
from ratchet.training.checkpoints import Checkpoints
from ratchet.training.collation import RowCollator, make_batches
from ratchet.training.estimate import shapes
from ratchet.training.loss import AnswerLoss, answer_logprobs
from ratchet.training.packing import (
    IGNORED,
    Role,
    Unit,
    Window,
    pack,
    pack_units,
    read_windows,
    rows_of,
    write_windows,
)
from ratchet.training.schedule import Schedule
from ratchet.training.state import trainable
from ratchet.training.trainer import fit
from tasks.base import make_base
from tasks.tokenize import tokenize
from tasks.train import train

ROWS, PICTURES = make_rows(60)
SOUND_ROWS, SOUNDS = make_rows(60, sounds=True)
MEDIA = PICTURES | SOUNDS
SCHEDULE = Schedule(
    steps=8,
    batch_windows=2,
    accumulate=1,
    learning_rate=1e-2,
    kind="cosine",
    warmup_share=0.1,
    weight_decay=0.01,
    max_grad_norm=1.0,
    evaluations=4,
    patience=9,
    seed=7,
)


def config_for(model: Path, **train: Any) -> Config:
    return Config(
        base=BaseConfig(model=str(model)),
        train=TrainConfig(**{"epochs": 1.0, "evaluations": 2, "learning_rate": 1e-2, **train}),
        adapter=AdapterConfig(rank=4, alpha=8.0),
    )


@pytest.fixture(scope="module", params=BY_FAMILY)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp(request.param)
    make_base(home / "base", config_for(ALL_FAMILIES[request.param](home / "model")))
    return home / "base"


class Made(NamedTuple):
    """A project of rows with pictures up to its tokens."""

    base: Path
    prepared: Path
    tokens: Path
    nobody: Path
    config: Config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, nobody: Path) -> Made:
    home = tmp_path_factory.mktemp("pictures")
    config = config_for(make_llava(home / "model"))
    make_base(home / "base", config)
    prepared = write_prepared(home / "prepared", ROWS, PICTURES)
    tokenize(prepared, home / "base", nobody, home / "tokens", config)
    return Made(home / "base", prepared, home / "tokens", nobody, config)


def inputs_of(base: Path, media: Mapping[str, bytes] = MEDIA) -> Inputs:
    return load_chat(base, media).inputs


# --- windows ---


def test_rows_with_pictures_share_windows_and_come_apart_again() -> None:
    sizes = ((5, 1), (4, 0), (3, 0), (7, 2), (16, 0))
    names = ("a.png", "b.jpg")
    rows = [Encoded([size] * size, [True] * size, names[:shown]) for size, shown in sizes]
    windows = pack(rows, 16)
    assert [(len(window.input_ids), list(window.media), list(window.shown)) for window in windows] == [
        (16, ["a.png", "b.jpg", "a.png"], [2, 1, 0]),
        (16, [], []),
        (3, [], []),
    ]
    apart = [row for window in windows for row in rows_of(window)]
    assert [(len(row.input_ids), tuple(row.media)) for row in apart] == [
        (7, names),
        (5, ("a.png",)),
        (4, ()),
        (16, ()),
        (3, ()),
    ]
    with pytest.raises(ValueError, match="16 tokens, the window holds 6"):
        pack(rows, 6)


def test_compared_rows_both_show_the_pictures() -> None:
    pair = [Encoded([1] * 4, [True] * 4, ("a.png",)), Encoded([2] * 4, [True] * 4, ("a.png",))]
    (window,) = pack_units([Unit(pair, [Role.CHOSEN, Role.REJECTED])], 8)
    assert [tuple(row.media) for row in rows_of(window)] == [("a.png",), ("a.png",)]


def test_names_come_back_from_the_file_and_text_has_no_column_for_them(tmp_path: Path) -> None:
    text = Window([1, 2], [IGNORED, 2], [0, 1])
    windows = [text, text._replace(media=["a.png"])]
    write_windows(tmp_path / "shown.arrow", windows)
    assert [tuple(window.media) for window in read_windows(tmp_path / "shown.arrow")] == [(), ("a.png",)]
    write_windows(tmp_path / "text.arrow", [text])
    with pa.memory_map(str(tmp_path / "text.arrow")) as source:
        names = pa.ipc.open_file(source).schema.names
    assert names == ["input_ids", "labels", "position_ids"]


# --- tokens ---


def test_tokens_bring_the_pictures_that_training_needs(made: Made) -> None:
    windows = [
        window for split in ("train", "validation") for window in read_windows(made.tokens / f"{split}.arrow")
    ]
    named = {name for window in windows for name in window.media}
    store = MediaStore.read(made.tokens / "media")
    assert named
    assert {name: store[name] for name in named} == {name: PICTURES[name] for name in named}
    learned = sum(
        bool(example.media) for number, example in enumerate(ROWS) if number % 10 == 0 or number % 12 != 1
    )
    assert sum(count > 0 for window in windows for count in window.shown) == learned
    assert read_json(made.tokens / "profile.json")["rejected"] == {}


def test_only_shards_with_pictures_of_learned_rows_are_copied(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.prepared, tmp_path / "prepared")
    shutil.copyfile(made.prepared / "media/batch.tar", tmp_path / "prepared/media/other.tar")
    other = {name_of(stored): stored for stored in (picture(77), picture(78))}
    write_shard(tmp_path / "prepared/media", other, "unseen")
    tokenize(tmp_path / "prepared", made.base, made.nobody, tmp_path / "tokens", made.config)
    assert [path.name for path in sorted((tmp_path / "tokens/media").iterdir())] == ["batch.tar", "other.tar"]
    for split in ("train", "validation"):
        assert sha256_file(tmp_path / f"tokens/{split}.arrow") == sha256_file(made.tokens / f"{split}.arrow")


def test_rows_of_text_leave_no_folder_of_pictures(made: Made, tmp_path: Path) -> None:
    texts = [example for example in make_rows(200, seed=4)[0] if not example.media]
    write_prepared(tmp_path / "prepared", texts, {})
    tokenize(tmp_path / "prepared", made.base, made.nobody, tmp_path / "tokens", made.config)
    assert not (tmp_path / "tokens/media").exists()
    assert read_json(tmp_path / "tokens/profile.json")["train"]["rows"] > 20


def test_a_row_whose_pictures_make_it_too_long_is_rejected_and_counted(made: Made, tmp_path: Path) -> None:
    chat = load_chat(made.base)
    many = [picture(number) for number in range(40)]  # four tokens each
    asked = Message("user", MEDIA_MARK * 40 + "What?", media=tuple(map(name_of, many)))
    long = make_example([asked, Message("assistant", "It is red.")], {"batch": "b1.jsonl", "source": "made"})
    shown = PICTURES | {name_of(stored): stored for stored in many}
    write_prepared(tmp_path / "prepared", [*ROWS, *ROWS[:2], long], shown)
    config = made.config.model_copy(update={"tokenize": TokenizeConfig(max_length=128, window=128)})
    profile = tokenize(tmp_path / "prepared", made.base, made.nobody, tmp_path / "tokens", config)
    assert profile.rejected == {"train": 1}
    (line,) = (tmp_path / "tokens/rejected.jsonl").read_text().splitlines()
    assert long.id in line
    assert '"too_long"' in line
    assert f"{len(chat.showing(shown).encode(long).ids)} tokens" in line
    image = chat.processor.image_id if chat.processor else -1
    for window in read_windows(tmp_path / "tokens/train.arrow"):
        assert window.input_ids.count(image) == 4 * len(window.media)


def test_a_picture_that_preparation_lost_is_named(made: Made, tmp_path: Path) -> None:
    write_prepared(tmp_path / "prepared", ROWS, {})
    with pytest.raises(DataError, match=r"[0-9a-f]{64}\.(png|jpg)"):
        tokenize(tmp_path / "prepared", made.base, made.nobody, tmp_path / "tokens", made.config)
    assert not (tmp_path / "tokens").exists()


# --- the loss ---


def rows_like(base: Path) -> list[Example]:
    """Return rows with what the base takes: pictures or recordings."""
    return SOUND_ROWS if hears(base) else ROWS


def rows_for(chat: ChatFormat, examples: list[Example]) -> list[Window]:
    return [
        row
        for window in pack([chat.showing(MEDIA).encode(row) for row in examples], 2048)
        for row in rows_of(window)
    ]


def logprobs(model: Any, rows: list[Window], inputs: Inputs) -> torch.Tensor:
    batch = RowCollator(0, inputs)([rows])
    predict = partial(logits_at, model, model.get_output_embeddings(), batch)
    with torch.no_grad():
        return answer_logprobs(batch, predict)[0]


def test_a_row_loses_the_same_alone_and_in_a_batch(base: Path) -> None:
    model, inputs = load_base(base).float().eval(), inputs_of(base)
    rows = rows_for(load_chat(base), rows_like(base)[:16])
    assert {len(row.media) for row in rows} == {0, 1, 2, 3}
    together = logprobs(model, rows, inputs)
    alone = torch.cat([logprobs(model, [row], inputs) for row in rows])
    tokens = torch.tensor([sum(label != IGNORED for label in row.labels) for row in rows])
    assert ((together - alone) / tokens).abs().max() < 1e-5


def test_the_loss_depends_on_the_picture_and_covers_only_answers(base: Path) -> None:
    chat = load_chat(base)
    model, inputs = load_base(base).float().eval(), inputs_of(base)
    assert chat.processor
    example = next(example for example in rows_like(base) if len(example.media) == 1)
    (row,) = rows_for(chat, [example])
    (name,) = row.media
    other = inputs_of(base, {name: _inverted(MEDIA[name])})
    assert not torch.equal(logprobs(model, [row], inputs), logprobs(model, [row], other))
    places = [place for place, id in enumerate(row.input_ids) if id == chat.processor.image_id]
    assert places
    assert {row.labels[place] for place in places} == {IGNORED}
    answers = [message.content for message in example.messages if message.role == "assistant"]
    learned = chat.tokenizer.decode([label for label in row.labels if label != IGNORED])
    assert learned == "".join(f"{answer}<|end|>" for answer in answers)


def _inverted(stored: bytes) -> bytes:
    if stored.startswith(b"fLaC"):  # twice the pitch, and more
        return write_flac(samples_of(stored) ** 2)
    target = io.BytesIO()
    with Image.open(io.BytesIO(stored)) as opened:
        ImageOps.invert(opened.convert("RGB")).save(target, "PNG")
    return target.getvalue()


def test_a_training_in_windows_measures_what_one_in_rows_does(base: Path) -> None:
    windows = pack([load_chat(base).showing(MEDIA).encode(row) for row in rows_like(base)[:8]], 512)
    schedule = SCHEDULE._replace(steps=1, evaluations=1, learning_rate=1e-30)
    losses = []
    for apart in (True, False):
        model = load_trainable(base, None, AdapterConfig(rank=4, alpha=8.0), seed=1)
        curve = Curve()
        fit(
            model,
            windows,
            windows,
            schedule,
            loss=AnswerLoss(),
            pad_id=0,
            report=curve.add,
            apart=apart,
            inputs=inputs_of(base),
        )
        losses.append(curve.points[-1]["validation_loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5 if read_base_manifest(base).packs else 0.1)


# --- training ---


def test_the_same_rows_and_pictures_give_the_same_version(made: Made, tmp_path: Path) -> None:
    for name in ("one", "two"):
        home = tmp_path / name
        figures = train(
            made.tokens, made.base, made.nobody, home / "candidate", home / "reports", made.config
        )
        assert figures["best_validation_loss"] is not None
        assert figures["trainable_weights"] > 0
    for path in sorted((tmp_path / "one/candidate").iterdir()):
        assert path.read_bytes() == (tmp_path / "two/candidate" / path.name).read_bytes(), path.name
    manifest = read_json(tmp_path / "one/candidate/manifest.json")
    of_base = read_json(made.base / "manifest.json")["files"]
    assert manifest["files"]["processor_config.json"] == of_base["processor_config.json"]
    weights = load_file(tmp_path / "one/candidate/adapter_model.safetensors")
    assert {name.split(".")[3] for name in weights} == {"language_model"}
    assert any("gate_proj" in name for name in weights)
    trained = load_trained(made.base, tmp_path / "one/candidate").eval()
    rows, inputs = rows_for(load_chat(tmp_path / "one/candidate"), ROWS[:8]), inputs_of(made.base)
    before = logprobs(load_base(made.base).eval(), rows, inputs).sum()
    assert logprobs(trained, rows, inputs).sum() > before


def test_full_leaves_tower_and_projector_as_they_are(made: Made, tmp_path: Path) -> None:
    adapter = AdapterConfig(method="full")
    config = made.config.model_copy(update={"adapter": adapter})
    train(made.tokens, made.base, made.nobody, tmp_path / "candidate", tmp_path / "reports", config)
    before = load_file(made.base / "model.safetensors")
    after = load_file(tmp_path / "candidate/model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name, weight in before.items() if not torch.equal(weight.float(), after[name].float())}
    assert moved
    assert all("vision_tower" not in name and "multi_modal" not in name for name in moved)
    rows = rows_for(load_chat(tmp_path / "candidate"), ROWS[:8])
    trained = load_trained(made.base, tmp_path / "candidate").eval()
    assert logprobs(trained, rows, inputs_of(made.base)).isfinite().all()


SEEING_METHODS = {
    "lora": {"projector": "lora"},
    "tower": {"projector": "lora", "tower": "lora"},
    "whole": {"projector": "whole"},
    "qlora": {"method": "qlora", "projector": "whole"},
    "dora": {"method": "dora", "projector": "lora"},
    "full": {"method": "full", "projector": "whole"},
    "full_tower": {"method": "full", "projector": "whole", "tower": "whole"},
}


def part_of(name: str) -> str:
    """Tell which part of any of FAMILIES a weight belongs to."""
    if any(part in name for part in ("projector", "connector", "merger")):
        return "projector"
    return (
        "tower"
        if any(part in name for part in ("vision", "visual", "image_newline", "audio"))
        else "language"
    )


@pytest.mark.parametrize("kind", SEEING_METHODS)
def test_projector_and_tower_are_trained_as_asked_for(base: Path, kind: str) -> None:
    adapter = AdapterConfig(rank=4, alpha=8.0, **SEEING_METHODS[kind])
    if "gemma3" in str(base) and adapter.projector == "lora":
        with pytest.raises(ConfigError, match=r"(?s)projector: lora.*no linear layers.*whole"):
            load_trainable(base, None, adapter, seed=1)
        return
    model = load_trainable(base, None, adapter, seed=1)
    seen = {part_of(name) for name in trainable(model)}
    wanted = {"language"}
    wanted |= {part for part in ("projector", "tower") if getattr(adapter, part) != "frozen"}
    assert seen == wanted
    if adapter.projector == "whole":
        weights = [name for name, _ in load_base(base).named_parameters() if part_of(name) == "projector"]
        kept = [name for name in trainable(model) if part_of(name) == "projector" and "lora" not in name]
        assert len(kept) == len(weights)


@pytest.mark.parametrize("kind", SEEING_METHODS)
def test_a_version_with_a_trained_projector_is_trained_merged_and_gone_on_from(
    made: Made, kind: str, tmp_path: Path
) -> None:
    adapter = AdapterConfig(rank=4, alpha=8.0, **SEEING_METHODS[kind])
    config = made.config.model_copy(update={"adapter": adapter})
    out = tmp_path / "candidate"
    train(made.tokens, made.base, made.nobody, out, tmp_path / "reports", config)
    rows, inputs = rows_for(load_chat(out), ROWS[:8]), inputs_of(made.base)
    trained = load_trained(made.base, out).eval()
    said = logprobs(trained, rows, inputs)
    assert not torch.allclose(said, logprobs(load_base_of(made.base, out).eval(), rows, inputs), atol=1e-2)
    moved = {
        part_of(name)
        for name, weight in load_trained(made.base, out).named_parameters()
        if ("lora_B" in name or "modules_to_save" in name) and weight.any()
    }
    assert adapter.method == "full" or moved >= {"projector", "language"}
    merged = load_merged(made.base, out)
    tolerance = 0.05 if adapter.method == "qlora" else 1e-4
    assert torch.allclose(logprobs(merged, rows, inputs), said, rtol=tolerance, atol=tolerance)
    kind_of = read_kind(out)
    assert not kind_of.mixes
    assert kind_of.shares == (adapter.method != "full" and adapter.projector == "lora")
    again = load_trainable(made.base, out, adapter, seed=3)
    assert trainable(again).keys() == trainable(load_trainable(made.base, None, adapter, seed=3)).keys()
    check_start(out, adapter)
    if adapter.method != "full":
        with pytest.raises(BaseModelError, match="projector"):
            check_start(out, adapter.model_copy(update={"projector": "frozen"}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "full", "projector": "lora"}, "no updates of a rank"),
        ({"method": "lora", "tower": "whole"}, "`adapter.method: full`"),
        ({"method": "prompt", "projector": "whole"}, "does not take"),
    ],
)
def test_parts_that_a_method_cannot_train_are_refused(settings: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        AdapterConfig(**settings)


def test_only_the_language_model_is_quantised(base: Path) -> None:
    model = load_base(base, method="qlora")
    kinds = {
        (part_of(name), type(module).__name__)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }
    assert ("language", "Linear4bit") in kinds
    assert {kind for part, kind in kinds if part != "language"} <= {"Linear"}
    rows = rows_for(load_chat(base), rows_like(base)[:8])
    exact, rounded = (
        logprobs(load_base(base, method=method).eval(), rows, inputs_of(base)) for method in ("lora", "qlora")
    )
    tokens = torch.tensor([sum(label != IGNORED for label in row.labels) for row in rows])
    assert ((exact - rounded) / tokens).abs().max() < 0.1


def test_which_of_two_answers_is_better_is_learned_with_pictures(made: Made, tmp_path: Path) -> None:
    judged = [
        make_example(row.messages, row.meta, rejected=Message("assistant", "nothing at all")) for row in ROWS
    ]
    write_prepared(tmp_path / "prepared", judged, PICTURES)
    config = made.config.model_copy(
        update={"train": made.config.train.model_copy(update={"objective": "dpo"})}
    )
    tokenize(tmp_path / "prepared", made.base, made.nobody, tmp_path / "tokens", config)
    figures = train(
        tmp_path / "tokens", made.base, made.nobody, tmp_path / "candidate", tmp_path / "reports", config
    )
    assert figures["best_validation_loss"] is not None
    assert figures["best_validation_loss"] < 20


class Killed(BaseException):
    """In place of a kill: nothing of ours may catch it and tidy up."""


class Curve:
    def __init__(self, die_at: int | None = None) -> None:
        self.points: list[dict[str, Any]] = []
        self._die_at = die_at

    def add(self, step: int, values: dict[str, float]) -> None:
        if step == self._die_at:
            raise Killed
        self.points.append({"step": step, **values})

    def restore(self, points: list[dict[str, Any]]) -> None:
        self.points = list(points)


def go(base: Path, windows: list[Window], curve: Curve, checkpoints: Checkpoints | None) -> dict[str, Any]:
    model = load_trainable(base, None, AdapterConfig(rank=4, alpha=8.0, dropout=0.1), seed=1)
    saved = checkpoints.newest(curve.restore) if checkpoints else None
    fit(
        model,
        windows[:16],
        windows[16:20],
        SCHEDULE,
        loss=AnswerLoss(),
        pad_id=0,
        report=curve.add,
        apart=True,
        inputs=inputs_of(base),
        checkpoints=checkpoints,
        saved=saved,
    )
    return {"from": saved.step if saved else 0} | {
        name: weight.clone() for name, weight in trainable(model).items()
    }


@pytest.mark.parametrize("die_at", [3, 6])
def test_a_training_that_was_killed_ends_in_the_same_weights(die_at: int, base: Path, tmp_path: Path) -> None:
    windows = rows_for(load_chat(base), rows_like(base)[:20])
    whole, first, second = Curve(), Curve(die_at), Curve()
    wanted = go(base, windows, whole, None)

    def checkpoints(curve: Curve) -> Checkpoints:
        return Checkpoints(tmp_path, "key", {}, minutes=0.0, curve=lambda: curve.points)

    with pytest.raises(Killed):
        go(base, windows, first, checkpoints(first))
    found = go(base, windows, second, checkpoints(second))
    assert 0 < found.pop("from") < die_at
    assert wanted.pop("from") == 0
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name
    assert second.points == whole.points


@pytest.mark.parametrize("apart", [True, False])
def test_a_plan_counts_the_batches_of_rows_with_pictures(made: Made, apart: bool) -> None:
    windows = read_windows(made.tokens / "train.arrow")
    inputs = inputs_of(made.base)
    batches = make_batches(windows, [], 1, accumulate=1, pad_id=0, apart=apart, inputs=inputs)
    seen = [tuple(batches.collate([group])["input_ids"].shape) for group in batches.train]
    padded = shapes(windows, 1, apart=apart)
    assert [rows for rows, _ in padded] == [rows for rows, _ in seen]
    assert max(padded) == max(seen)
    assert len(windows[0].media) == max(len(window.media) for window in windows)


@pytest.mark.parametrize("apart", [True, False])
def test_a_batch_has_the_pixels_of_all_its_pictures(made: Made, apart: bool) -> None:
    windows = read_windows(made.tokens / "train.arrow")
    inputs = inputs_of(made.base)
    batches = make_batches(windows, [], 2, accumulate=1, pad_id=0, apart=apart, inputs=inputs)
    part = batches.train[: batches.items]
    batch = batches.collate(part)
    shown = [name for item in part for window in (item if apart else [item]) for name in window.media]
    assert batch["pixel_values"].shape[0] == len(shown) > 1
    assert ("position_ids" in batch) != apart


def token_losses(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    predict = partial(logits_at, model, model.get_output_embeddings(), batch)
    with torch.no_grad():
        return AnswerLoss()(batch, predict, torch.tensor(1.0))[0]


def test_a_row_loses_the_same_packed_among_others(base: Path) -> None:
    chat, model, inputs = load_chat(base), load_base(base).float().eval(), inputs_of(base)
    rows = rows_like(base)[:24]
    windows = pack([chat.showing(MEDIA).encode(row) for row in rows], 512)
    assert sum(len(window.shown) > 1 for window in windows) > 1
    assert sum(len(window.media) for window in windows) == sum(len(row.media) for row in rows)
    made = make_batches(
        windows, [], 2, accumulate=1, pad_id=0, apart=False, inputs=inputs, place=partial(place_rows, model)
    )
    away = 0.0
    for start in range(0, len(windows), 2):
        part = made.train[start : start + 2]
        alone = [
            token_losses(model, RowCollator(0, inputs)([[row]])) for window in part for row in rows_of(window)
        ]
        away = max(away, float((token_losses(model, made.collate(part)) - torch.cat(alone)).abs().max()))
    # The base's proof says whether rows may share windows. Those of Gemma 3 would read each other.
    assert (away < 1e-5) == read_base_manifest(base).packs == ("gemma3" not in str(base))
