"""Pictures of rows as a model takes them: nothing is cut, and no text of a user makes a place for one."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from media_models import (
    ALL_FAMILIES,
    BY_FAMILY,
    FAMILIES,
    hears,
    make_gemma3,
    make_llava,
    make_mllama,
    make_qwen2_audio,
    make_rows,
    make_tokenizer,
    medium,
    name_of,
    picture,
    sound,
    template,
)
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM

from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig, BaseConfig
from ratchet.data.examples import MEDIA_MARK, Example, Message, make_example
from ratchet.errors import BaseModelError, DataError
from ratchet.files import read_json, sha256_file
from ratchet.models import processors
from ratchet.models.chat_template import ChatFormat, encode_last_answer
from ratchet.models.loading import load_chat, load_tokenizer, quiet
from ratchet.models.processors import OF_SEQUENCE, OF_TEXT, Held, MediaProcessor, load_processor
from tasks.base import make_base

ROWS = (600, pytest.param(1500, marks=pytest.mark.e2e))  # of each family: over 10,000 in all
ONE, TWO = picture(1), picture(2, 90, 50, "JPEG")
SHOWN = {name_of(stored): stored for stored in (ONE, TWO)}


@pytest.fixture(scope="module", params=BY_FAMILY)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ALL_FAMILIES[request.param](tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava") / "model")


def processor_of(chat: ChatFormat) -> MediaProcessor:
    assert chat.processor
    return chat.processor


def row(content: str, *pictures: bytes, answer: str = "It is red.") -> Example:
    asked = Message("user", content, media=tuple(map(name_of, pictures)))
    return make_example([asked, Message("assistant", answer)], {"batch": "b"})


def count_features(model: Any, features: dict[str, torch.Tensor]) -> int:
    """Count the vectors that the model's tower and projector make of pictures or recordings."""
    with torch.inference_mode():
        if "feature_attention_mask" in features:
            tower = model.model.audio_tower
            made = tower(features["input_features"]).last_hidden_state  # (recordings, positions, width)
            _, lengths = tower._get_feat_extract_output_lengths(features["feature_attention_mask"].sum(-1))
            return sum(len(vectors[:length]) for vectors, length in zip(made, lengths, strict=True))
        found = model.get_image_features(**features)
    found = getattr(found, "pooler_output", found)
    parts = found if isinstance(found, (list, tuple)) else [found]
    return sum(part.numel() // part.shape[-1] for part in parts)


def read_out(ids: list[int], pieces: list[list[int]]) -> list[int]:
    """Take the tokens of the pictures out of a row, each in one piece and in order; return the others."""
    rest: list[int] = []
    place = 0
    for piece in pieces:
        start = next(at for at in range(place, len(ids)) if ids[at : at + len(piece)] == piece)
        rest += ids[place:start]
        place = start + len(piece)
    return [*rest, *ids[place:]]


# --- what a picture becomes ---


@pytest.mark.parametrize("count", ROWS)
def test_every_picture_is_whole_and_has_as_many_tokens_as_the_model_has_features(
    folder: Path, count: int
) -> None:
    chat = load_chat(folder)
    processor = processor_of(chat)
    with quiet():
        model = AutoModelForMultimodalLM.from_pretrained(folder)
    if hears(folder):
        count //= 6  # its features take longer
    rows, pictures = make_rows(count, seed=count, sounds=hears(folder))
    shown = 0
    for start in range(0, count, 50):
        part = rows[start : start + 50]
        encoded = [chat.showing(pictures).encode(example) for example in part]
        tokens = sum(of.ids.count(processor.image_id) for of in encoded)
        features = processor.features([[pictures[name] for name in example.media] for example in part])
        assert tokens == count_features(model, features)
        for example, of in zip(part, encoded, strict=True):
            pieces = [processor.tokens_of(pictures[name]) for name in example.media]
            rest = read_out(of.ids, pieces)
            assert processor.image_id not in rest
            assert of.media == example.media
            learned = [token for token, learns in zip(of.ids, of.learned, strict=True) if learns]
            assert processor.image_id not in learned
            assert (
                chat.decode_answer(learned[-len(chat._content_ids(example.answer)) - 1 :]) == example.answer
            )
            shown += len(pieces)
    assert shown > count


def test_the_prompt_is_the_beginning_of_the_row(folder: Path) -> None:
    chat = load_chat(folder)
    rows, pictures = make_rows(40, seed=6, sounds=hears(folder))
    for example in rows:
        whole = chat.showing(pictures).encode(example).ids
        prompt = chat.showing(pictures).encode_prompt(example.prompt, example.tools)
        assert whole[: len(prompt)] == prompt
        assert chat.showing(pictures).fit_prompt(example.prompt, 4096) == prompt
        last = encode_last_answer(chat.showing(pictures), example)
        assert (last.ids, last.media) == (whole, example.media)
        assert sum(last.learned) == len(whole) - len(prompt)


def test_a_row_has_the_same_features_alone_and_among_others(folder: Path) -> None:
    processor = processor_of(load_chat(folder))
    one, two = medium(folder, 1), medium(folder, 2)
    together = processor.features([[one], [], [two, one]])
    alone = [processor.features([[one]]), processor.features([[two, one]])]
    name = "input_features" if hears(folder) else "pixel_values"
    values = [part[name].flatten() for part in alone]
    if together[name].ndim == 5:  # Idefics3 pads the rows with empty tiles
        return
    assert torch.equal(together[name].flatten(), torch.cat(values))


def test_inputs_that_are_joined_are_those_that_the_processor_makes_together(folder: Path) -> None:
    processor = processor_of(load_chat(folder))
    assert processor._row_axis == (1 if folder.parent.name.startswith("idefics3") else 0)
    chance = random.Random(3)
    many = [
        sound(seed, chance.uniform(0.1, 1.9))
        if hears(folder)
        else picture(seed, chance.randint(8, 150), chance.randint(8, 150))
        for seed in range(12)
    ]
    for _ in range(8):
        rows = [chance.sample(many, k=chance.choice((0, 1, 1, 2, 3))) for _ in range(4)]
        found = processor.features(rows)
        together = processor._call([row for row in rows if row]) if any(rows) else {}
        assert found.keys() == together.keys() - {*OF_TEXT, *OF_SEQUENCE}
        assert all(torch.equal(value, together[name]) for name, value in found.items())


def test_a_picture_of_a_request_is_opened_once(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[bytes] = []
    processor = processor_of(load_chat(llava))
    processor.features([[ONE]])  # the trial of the first batch
    plain = processors._open
    monkeypatch.setattr(processors, "_open", lambda picture: opened.append(picture) or plain(picture))
    new = [picture(seed, 50, 40) for seed in range(700, 703)]
    for one in new:
        processor.tokens_of(one)
    processor.features([new[:2], [new[2]], []])
    processor.features([[new[0]]])
    assert opened == new


def test_held_inputs_are_bounded_and_the_newest_stay(llava: Path) -> None:
    processor = processor_of(load_chat(llava))
    (pixels,) = processor.features([[ONE]]).values()
    processor._held = Held(3 * pixels.nbytes)
    many = [picture(seed, 50, 40) for seed in range(800, 810)]
    before = [processor.features([[one]]) for one in many]
    assert processor._held._bytes == 3 * pixels.nbytes and len(processor._held._found) == 3
    assert all(
        torch.equal(processor.features([[one]])["pixel_values"], found["pixel_values"])
        for one, found in zip(many, before, strict=True)
    )
    processor._held = Held(pixels.nbytes - 1)  # a picture larger than all that is held
    assert torch.equal(processor.features([[ONE]])["pixel_values"], pixels)
    assert processor._held._bytes == 0


def test_rows_without_pictures_have_no_features(folder: Path) -> None:
    assert processor_of(load_chat(folder)).features([[], []]) == {}


def test_token_types_mark_the_tokens_of_pictures_and_no_others(folder: Path) -> None:
    chat = load_chat(folder)
    processor = processor_of(chat)
    one = medium(folder, 1)
    ids = torch.tensor([chat.showing({name_of(one): one}).encode(row(f"a{MEDIA_MARK}b", one)).ids])
    kinds = processor.sequence_features(ids)
    wanted = {"gemma3": "token_type_ids", "qwen2_5_vl": "mm_token_type_ids", "qwen3_vl": "mm_token_type_ids"}
    assert list(kinds) == [name for family, name in wanted.items() if folder.parent.name.startswith(family)]
    for value in kinds.values():
        assert torch.equal(value == 1, ids == processor.image_id)


# --- places for pictures ---


def test_user_text_makes_no_place_for_a_picture(folder: Path) -> None:
    chat = load_chat(folder)
    processor = processor_of(chat)
    tokens = {str(processor.placeholder), str(chat.tokenizer.convert_ids_to_tokens(processor.image_id))}
    forged = "".join(sorted(tokens))
    one = medium(folder, 1)
    ids = chat.showing({name_of(one): one}).encode(row(f"{forged}{MEDIA_MARK}{forged}", one)).ids
    assert ids.count(processor.image_id) == processor.tokens_of(one).count(processor.image_id)
    plain = chat.encode(row(forged, answer=forged)).ids
    assert not {processor.image_id, processor.placeholder_id} & set(plain)
    assert forged in chat.tokenizer.decode(plain)


def test_a_picture_stands_where_its_mark_stands(llava: Path) -> None:
    chat = load_chat(llava)
    image = processor_of(chat).image_id
    ids = chat.showing(SHOWN).encode_prompt(row(f"red{MEDIA_MARK}blue", ONE).prompt)
    before, after = ids[: ids.index(image)], ids[len(ids) - ids[::-1].index(image) :]
    assert chat.tokenizer.decode(before).endswith("red")
    assert chat.tokenizer.decode(after).startswith("blue")


def test_a_text_of_such_a_base_is_written_as_with_strings(llava: Path) -> None:
    chat, bare = load_chat(llava), ChatFormat(load_tokenizer(llava))
    for example in make_rows(30, seed=8)[0]:
        if not example.media:
            assert chat.encode(example) == bare.encode(example)


# Jinja templates that take the contents of messages in different ways.
OPENS = "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
ONLY_STRINGS = (
    "{%- for message in messages -%}<|{{ message.role }}|>{{ message.content + '<|end|>' }}{%- endfor -%}"
    + OPENS
)
ONLY_PARTS = (
    "{%- for message in messages -%}<|{{ message.role }}|>"
    "{%- if message.content[0].type == 'text' -%}{%- endif -%}"
    "{%- for part in message.content -%}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{%- endfor -%}<|end|>{%- endfor -%}" + OPENS
)
PICTURES_FIRST = (
    "{%- for message in messages -%}<|{{ message.role }}|>"
    "{%- for part in message.content | selectattr('type', 'equalto', 'image') -%}<image>{%- endfor -%}"
    "{%- for part in message.content | selectattr('type', 'equalto', 'text') -%}"
    "{{ part.text | trim }}{%- endfor -%}<|end|>{%- endfor -%}" + OPENS
)


def chat_with(chat_template: str, llava: Path) -> ChatFormat:
    tokenizer = load_tokenizer(llava)
    tokenizer.chat_template = chat_template
    return ChatFormat(tokenizer, processor=load_processor(llava))


@pytest.mark.parametrize("chat_template", [ONLY_STRINGS, ONLY_PARTS])
def test_templates_of_strings_and_of_parts_give_the_same_ids(chat_template: str, llava: Path) -> None:
    rows, pictures = make_rows(30, seed=9)
    ours, theirs = chat_with(chat_template, llava), load_chat(llava)
    for example in rows:
        assert ours.showing(pictures).encode(example) == theirs.showing(pictures).encode(example)


# The templates of SmolVLM, Qwen2-VL (without videos) and Gemma 3, as their checkpoints have them.
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN2_VL = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA3 = (
    "{%- if messages[0]['role'] == 'system' -%}{%- if messages[0]['content'] is string -%}"
    "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}{%- else -%}"
    "{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first_user_prefix = '' -%}"
    "{%- set loop_messages = messages -%}{%- endif -%}{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{%- endif -%}"
    "{%- if (message['role'] == 'assistant') -%}{%- set role = 'model' -%}"
    "{%- else -%}{%- set role = message['role'] -%}{%- endif -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}"
    "{%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}"
    "{%- else -%}{{ raise_exception('Invalid content type') }}{%- endif -%}{{ '<end_of_turn>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"
)
TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
AROUND = ("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", "<|im_start|>")
CHATML = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SOFT = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}


@pytest.mark.parametrize(
    ("family", "tokens", "named", "chat_template", "said"),
    [
        (
            "idefics3",
            (*AROUND, *TILES),
            {},
            SMOLVLM,
            "<|im_start|>User: red[]blue<end_of_utterance>\nAssistant: It is red.<end_of_utterance>",
        ),
        (
            "qwen2_5_vl",
            CHATML,
            {},
            QWEN2_VL,
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nred"
            "<|vision_start|>[]<|vision_end|>blue<|im_end|>\n<|im_start|>assistant\nIt is red.<|im_end|>",
        ),
        (
            "gemma3",
            ("<start_of_turn>", "<end_of_turn>"),
            SOFT,
            GEMMA3,
            "<start_of_turn>user\nred[]blue<end_of_turn>\n<start_of_turn>model\nIt is red.<end_of_turn>",
        ),
    ],
    ids=["smolvlm", "qwen2_vl", "gemma3"],
)
def test_the_templates_of_published_models_are_taken(
    family: str, tokens: tuple[str, ...], named: dict[str, str], chat_template: str, said: str, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(*tokens, chat_template=chat_template, size=480, **named)
    make_of: Any = FAMILIES[family]
    make_base(tmp_path / "base", config_for(make_of(tmp_path / "model", tokenizer)))
    chat = load_chat(tmp_path / "base")
    found = chat.showing(SHOWN).encode(row(f"red{MEDIA_MARK}blue", ONE))
    piece = processor_of(chat).tokens_of(ONE)
    place = next(at for at in range(len(found.ids)) if found.ids[at : at + len(piece)] == piece)
    before, after = found.ids[:place], found.ids[place + len(piece) :]
    assert f"{chat.tokenizer.decode(before)}[]{chat.tokenizer.decode(after)}" == said
    learned = [token for token, learns in zip(found.ids, found.learned, strict=True) if learns]
    assert chat.decode_answer(learned) == "It is red."


QWEN2_AUDIO = (  # as transformers has it for the checkpoints of Qwen2-Audio
    "{% set audio_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if 'audio' in content or 'audio_url' in content or message['type'] == 'audio' "
    "or content['type'] == 'audio' %}{% set audio_count.value = audio_count.value + 1 %}"
    "Audio {{ audio_count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_template_of_qwen2_audio_is_taken(tmp_path: Path) -> None:
    tokens = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|im_start|>", "<|im_end|>")
    tokenizer = make_tokenizer(*tokens, chat_template=QWEN2_AUDIO)
    make_base(tmp_path / "base", config_for(make_qwen2_audio(tmp_path / "model", tokenizer)))
    chat = load_chat(tmp_path / "base")
    one, two = sound(1, 0.1), sound(2, 1.0)
    shown = {name_of(one): one, name_of(two): two}
    asked = row(f"high{MEDIA_MARK}or{MEDIA_MARK}low", one, two)
    found = chat.showing(shown).encode(asked)
    heard, said = f"{'<|AUDIO|>' * 2}", str(chat.tokenizer.decode(found.ids))
    assert said.replace("<|AUDIO|>" * 25, "[]").replace(heard, "[]") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "highAudio 1: <|audio_bos|>[]<|audio_eos|>\norAudio 2: <|audio_bos|>[]<|audio_eos|>\nlow<|im_end|>\n"
        "<|im_start|>assistant\nIt is red.<|im_end|>"
    )
    assert chat.showing(shown).encode_whole(asked.prompt) == chat.showing(shown).encode_prompt(asked.prompt)


def test_a_template_may_write_pictures_before_the_text(llava: Path) -> None:
    chat = chat_with(PICTURES_FIRST, llava)
    ids = chat.showing(SHOWN).encode_prompt(row(f"red{MEDIA_MARK} blue", ONE).prompt)
    image = processor_of(chat).image_id
    assert chat.tokenizer.decode([id for id in ids if id != image]) == "<|user|>red blue<|end|><|assistant|>"
    assert ids[1:5] == [image] * 4


@pytest.mark.parametrize(
    "written", ["", "<image><image>", "{{ part }}"], ids=["not at all", "twice", "as a dict"]
)
def test_a_template_that_does_not_write_a_picture_once_is_refused(written: str, llava: Path) -> None:
    said = template("<image>").replace("{{ '<image>' }}", written)
    said = said.replace("{%- if message.content is string -%}", "{%- if false -%}")
    with pytest.raises(BaseModelError, match="does not write '<image>' for one"):
        chat_with(said, llava)


def test_a_missing_picture_is_named(llava: Path) -> None:
    with pytest.raises(DataError, match=name_of(ONE)):
        load_chat(llava).encode(row(MEDIA_MARK + "?", ONE))


def test_bytes_that_are_no_picture_are_refused(llava: Path) -> None:
    chat = load_chat(llava)
    with pytest.raises(BaseModelError, match="cannot be decoded"):
        chat.showing({name_of(ONE): ONE[:60]}).encode(row(MEDIA_MARK + "?", ONE))


def test_a_base_of_text_refuses_a_row_with_pictures(tiny_base: Path) -> None:
    with pytest.raises(BaseModelError, match="reads text only") as caught:
        load_chat(tiny_base, SHOWN).encode(row(MEDIA_MARK + "?", ONE))
    assert "base.model" in caught.value.remedy


# --- the base ---


def config_for(folder: Path, method: str = "lora") -> Config:
    return Config(base=BaseConfig(model=str(folder)), adapter=AdapterConfig(method=method, rank=4, alpha=8.0))


def test_a_base_is_proven_with_pictures_and_keeps_its_processor(folder: Path, tmp_path: Path) -> None:
    manifest = make_base(tmp_path / "base", config_for(folder), tmp_path / "proof.json")
    findings = {found["name"]: found["result"] for found in read_json(tmp_path / "proof.json")["findings"]}
    kind = "recordings" if hears(folder) else "pictures"
    assert findings[kind] == findings["training"] == findings["template"] == "ok"
    kept = [
        name for name in ("processor_config.json", "preprocessor_config.json") if (folder / name).exists()
    ]
    assert kept
    for name in kept:
        assert manifest["files"][name] == sha256_file(folder / name)
        assert sha256_file(tmp_path / "base" / name) == manifest["files"][name]
    rows, pictures = make_rows(10, seed=3, sounds=hears(folder))
    ours, theirs = load_chat(tmp_path / "base"), load_chat(folder)
    assert [ours.showing(pictures).encode(example) for example in rows] == [
        theirs.showing(pictures).encode(example) for example in rows
    ]


def test_a_template_beside_the_processor_is_found(llava: Path, tmp_path: Path) -> None:
    shutil.copytree(llava, tmp_path / "model")
    path = tmp_path / "model/chat_template.jinja"
    (tmp_path / "model/chat_template.json").write_text(json.dumps({"chat_template": path.read_text()}))
    path.unlink()
    make_base(tmp_path / "base", config_for(tmp_path / "model"))
    assert load_chat(tmp_path / "base", SHOWN).encode(row(MEDIA_MARK + "?", ONE)).media == (name_of(ONE),)


def test_a_model_without_its_processor_is_taken_for_text(llava: Path, tmp_path: Path) -> None:
    shutil.copytree(llava, tmp_path / "model")
    (tmp_path / "model/processor_config.json").unlink()
    with pytest.raises(BaseModelError, match="causal language model"):
        make_base(tmp_path / "base", config_for(tmp_path / "model"))


def test_a_processor_of_another_model_is_refused(llava: Path, tmp_path: Path) -> None:
    shutil.copytree(llava, tmp_path / "model")
    path = tmp_path / "model/processor_config.json"
    path.write_text(json.dumps(read_json(path) | {"patch_size": 8}))
    with pytest.raises(BaseModelError, match=r"pictures: .*other numbers of tokens") as caught:
        make_base(tmp_path / "base", config_for(tmp_path / "model"))
    assert "processor's files" in caught.value.remedy


def test_a_model_that_does_not_see_its_pictures_is_refused(tmp_path: Path) -> None:
    folder = make_gemma3(tmp_path / "model")
    with quiet():
        model = AutoModelForImageTextToText.from_pretrained(folder)
        torch.nn.init.zeros_(model.model.multi_modal_projector.mm_input_projection_weight)
        model.save_pretrained(folder)
    with pytest.raises(BaseModelError, match="does not see them"):
        make_base(tmp_path / "base", config_for(folder))


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_are_refused(method: str, llava: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=f"adapter.method: {method}"):
        make_base(tmp_path / "base", config_for(llava, method))


def test_a_processor_that_transformers_does_not_know_is_refused(llava: Path, tmp_path: Path) -> None:
    shutil.copytree(llava, tmp_path / "model")
    path = tmp_path / "model/processor_config.json"
    path.write_text(json.dumps(read_json(path) | {"processor_class": "NobodysProcessor"}))
    with pytest.raises(BaseModelError, match="reads no pictures"):
        make_base(tmp_path / "base", config_for(tmp_path / "model"))


def test_a_model_that_reads_pictures_by_cross_attention_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="cross-attention"):
        make_base(tmp_path / "base", config_for(make_mllama(tmp_path / "model")))


@pytest.mark.parametrize(
    ("kind", "package"), [("PixtralProcessor", "torchvision"), ("SmolVLMProcessor", "num2words")]
)
def test_a_processor_that_needs_another_package_is_refused(
    kind: str, package: str, llava: Path, tmp_path: Path
) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    shutil.copytree(llava, tmp_path / "model")
    path = tmp_path / "model/processor_config.json"
    path.write_text(json.dumps(read_json(path) | {"processor_class": kind}))
    with pytest.raises(BaseModelError, match=f"(?i){kind}.*{package}|{package}.*smolvlm"):
        make_base(tmp_path / "base", config_for(tmp_path / "model"))


def test_a_tokenizer_without_the_image_token_is_refused(tmp_path: Path, llava: Path) -> None:
    shutil.copytree(llava, tmp_path / "model")
    make_tokenizer(chat_template=template("<image>")).save_pretrained(tmp_path / "model")
    with pytest.raises(BaseModelError, match="no single token that stands for a picture"):
        make_base(tmp_path / "base", config_for(tmp_path / "model"))
