"""What is proven of a base before anything is trained: wrong ones are adapted, or refused with the reason."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from ratchet.bases.template_probe import adapt_template
from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig, BaseConfig
from ratchet.data.examples import Message, make_example, read_examples
from ratchet.demo.tokenizer import CHAT_TEMPLATE, CONTROL_TOKENS
from ratchet.engines.loaded_model import LoadedModel
from ratchet.errors import BaseModelError
from ratchet.files import read_json, write_json
from ratchet.models.chat_template import ChatFormat
from ratchet.models.generation import greedy_answers, greedy_ids
from ratchet.models.lengths import known_tokens
from ratchet.models.loading import WHOLE, load_base, load_chat, load_tokenizer
from ratchet.models.manifests import GENERATION, Finding, write_generation
from ratchet.parity.paths import engine_answers
from ratchet.serving.bundle import Bundle, Generation
from ratchet.training import collation
from tasks.base import make_base
from tasks.train import train

REVISION = "0123456789abcdef0123456789abcdef01234567"
DAY = dt.date(2026, 3, 5)
ASKED = [Message("user", "Which module documents this?")]
OPENS_THINKING = CHAT_TEMPLATE.replace("<|assistant|>{%", "<|assistant|><think>{%")
# As Qwen3: an answer stands behind an empty block, and so does the prompt where the block is switched off.
SWITCHED = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ message.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
WITHOUT_OPENING = CHAT_TEMPLATE.partition("{%- if add_generation_prompt")[0]
DATED = "<|system|>{{ strftime_now('%d %b %Y') }}<|end|>" + CHAT_TEMPLATE


class Probed(NamedTuple):
    """A checkpoint in the hub's cache that a test may spoil, and where its base goes."""

    files: Path
    base: Path

    def config(self, **adapter: Any) -> Config:
        base = BaseConfig(model="tiny/probed", revision=REVISION)
        return Config(base=base, adapter=AdapterConfig(**{"rank": 4, "alpha": 8.0, **adapter}))

    def prove(self, **adapter: Any) -> dict[str, Finding]:
        make_base(self.base, self.config(**adapter), self.base.with_name("base.json"))
        return {
            found["name"]: Finding(**found)
            for found in read_json(self.base.with_name("base.json"))["findings"]
        }

    def refusal(self, **adapter: Any) -> str:
        with pytest.raises(BaseModelError) as caught:
            make_base(self.base, self.config(**adapter))
        assert not self.base.exists()
        return str(caught.value)

    def change_json(self, name: str, **values: Any) -> None:
        path = self.files / name
        write_json(path, {**(read_json(path) if path.exists() else {}), **values})

    def change_weights(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        weights = load_file(self.files / WHOLE)
        change(weights)
        save_file(weights, self.files / WHOLE, metadata={"format": "pt"})


@pytest.fixture
def probed(hub_cache: Path, tiny_base: Path, tmp_path: Path) -> Iterator[Probed]:
    repository = hub_cache / "models--tiny--probed"
    files = repository / "snapshots" / REVISION
    ours = shutil.ignore_patterns("manifest.json", "seen.txt")
    shutil.copytree(tiny_base, files, ignore=ours)
    yield Probed(files, tmp_path / "base")
    shutil.rmtree(repository)


# --- the checkpoint ---


def test_a_sound_base_passes_all_proofs_and_says_so_on_one_page(
    probed: Probed, capsys: pytest.CaptureFixture[str]
) -> None:
    found = probed.prove()
    assert {finding.result for finding in found.values()} == {"ok"}
    assert [*found] == ["template", "weights", "attention", "ends", "cache", "packing", "targets", "training"]
    page = capsys.readouterr().out.splitlines()
    assert all(any(name in line and "ok" in line for line in page) for name in found)
    manifest = read_json(probed.base / "manifest.json")
    assert (manifest["attention"], manifest["packs"]) == ("sdpa", True)


def test_weights_that_the_checkpoint_lacks_are_named(probed: Probed) -> None:
    probed.change_weights(lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight" in probed.refusal()


def test_weights_of_another_model_are_named(probed: Probed) -> None:
    probed.change_weights(lambda weights: weights.update({"model.layers.7.odd.weight": torch.ones(2)}))
    assert "model.layers.7.odd.weight" in probed.refusal()


def test_weights_of_another_shape_are_refused(probed: Probed) -> None:
    probed.change_json("config.json", intermediate_size=16)
    assert "mlp.down_proj.weight" in probed.refusal()


def test_a_base_that_is_quantised_already_is_refused_with_the_way_to_quantise_here(probed: Probed) -> None:
    probed.change_json(
        "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    )
    said = probed.refusal()
    assert "quantised already (by bitsandbytes" in said and "adapter.method: qlora" in said


def test_weights_that_are_not_finite_are_refused(probed: Probed) -> None:
    probed.change_weights(lambda weights: weights["model.norm.weight"].fill_(torch.nan))
    assert "cache" in probed.refusal()


# --- what is trained ---


@pytest.mark.parametrize(
    "adapter", [{"method": "ia3"}, {"method": "prefix"}, {"method": "full"}, {"method": "dora"}], ids=str
)
def test_the_base_is_the_same_whatever_is_trained_on_it(probed: Probed, adapter: dict[str, Any]) -> None:
    """Its bytes are the base's identity: another method must not make it another base."""
    probed.prove()
    before = {path.name: path.read_bytes() for path in probed.base.iterdir()}
    probed.prove(**adapter)
    assert {path.name: path.read_bytes() for path in probed.base.iterdir()} == before


def test_modules_that_the_base_does_not_have_are_refused_before_training(probed: Probed) -> None:
    assert "training: `adapter` does not fit the base" in probed.refusal(target_modules=["c_attn"])


def test_rows_stay_apart_on_a_gpu_where_packed_rows_would_read_each_other(
    tokens: Path,
    tiny_base: Path,
    nobody: Path,
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collation, "is_faster_apart", lambda: False)
    shutil.copytree(tiny_base, tmp_path / "base")
    config = tiny_config.model_copy(
        update={"train": tiny_config.train.model_copy(update={"epochs": 1.0, "evaluations": 1})}
    )
    steps = {}
    for packs in (True, False):
        manifest = read_json(tmp_path / "base/manifest.json")
        write_json(tmp_path / "base/manifest.json", {**manifest, "packs": packs})
        out = tmp_path / str(packs)
        figures = train(tokens, tmp_path / "base", nobody, out / "candidate", out / "reports", config)
        steps[packs] = figures["steps"]
    windows = read_json(tokens / "profile.json")["train"]["windows"]
    whole = config.train.batch_windows
    assert steps[True] == -(-windows // whole)
    assert steps[False] != steps[True]


# --- how it answers ---


def test_a_checkpoints_own_generation_settings_change_no_answer(probed: Probed, prepared: Path) -> None:
    penalties = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 6}
    prompts = [row.prompt for row in list(read_examples(prepared / "test.jsonl"))[:6]]

    def answers() -> list[str]:
        chat = load_chat(probed.base)
        ids = [chat.encode_prompt(prompt) for prompt in prompts]
        model = load_base(probed.base).eval()
        return greedy_answers(model, ids, chat, max_new_tokens=12, batch_size=4)

    probed.prove()
    wanted = answers()
    probed.change_json(GENERATION, **penalties, temperature=0.6, do_sample=True)
    ends = probed.prove()["ends"]
    assert ends.result == "adapted" and all(name in ends.what for name in penalties)
    assert answers() == wanted

    raw, chat = AutoModelForCausalLM.from_pretrained(probed.files), load_chat(probed.base)
    assert (
        greedy_answers(
            raw, [chat.encode_prompt(prompt) for prompt in prompts], chat, max_new_tokens=12, batch_size=4
        )
        != wanted
    ), "the penalties would have changed nothing"


def test_all_end_tokens_are_taken_over_and_plain_text_is_none(probed: Probed) -> None:
    tokenizer = load_tokenizer(probed.files)
    end, other = tokenizer.convert_tokens_to_ids(["<|end|>", "<|system|>"])
    plain = tokenizer.encode("a", add_special_tokens=False)[0]
    probed.change_json(GENERATION, eos_token_id=[end, other, plain])
    assert probed.prove()["ends"].result == "adapted"
    chat = load_chat(probed.base)
    assert (chat.stop_id, chat.stop_ids) == (end, {end, other})
    assert read_json(probed.base / GENERATION) == {
        "do_sample": False,
        "eos_token_id": sorted([end, other]),
        "pad_token_id": tokenizer.pad_token_id,
    }


def test_every_end_token_ends_an_answer_in_evaluation_and_engine(
    tiny_base: Path, candidate: Path, tmp_path: Path
) -> None:
    chat, served = load_chat(tiny_base), tmp_path / "served"
    bundle = Bundle("tiny", 1, served, tiny_base, 96, Generation(6))
    shutil.copytree(candidate, served)
    model, row = LoadedModel(bundle), make_example([*ASKED, Message("assistant", "a")], {})
    (open_ended,) = engine_answers(model, bundle, chat, [row], max_new_tokens=6, batch_size=1)
    further = open_ended.ids[1]
    assert further != chat.stop_id
    write_generation(served, [chat.stop_id, further], chat.pad_id)
    heard = load_chat(served)
    (told,) = engine_answers(model, bundle, heard, [row], max_new_tokens=6, batch_size=1)
    assert told.ids == open_ended.ids[: open_ended.ids.index(further) + 1]
    assert told.finish == "stop" and further not in chat.tokenizer.encode(told.text)[1:]
    base = load_base(tiny_base).eval()
    (ids,) = greedy_ids(base, [chat.encode_prompt(ASKED)], chat, max_new_tokens=6, batch_size=1)
    ends = ChatFormat(chat.tokenizer, ids[1:2])
    (cut,) = greedy_ids(base, [chat.encode_prompt(ASKED)], ends, max_new_tokens=6, batch_size=1)
    assert cut == ids[: ids.index(ids[1]) + 1]
    assert ends.decode_answer(ids) == chat.decode_answer(cut[:-1])


def test_a_pad_token_without_an_embedding_is_not_used(probed: Probed) -> None:
    tokenizer = load_tokenizer(probed.files)
    tokenizer.add_special_tokens({"pad_token": "<|beyond|>"})
    tokenizer.save_pretrained(probed.files)
    assert probed.prove()["ends"].result == "adapted"
    chat = load_chat(probed.base)
    assert chat.pad_id == chat.stop_id < 512


# --- the chat template ---


def make_tokenizer(template: Any, control: tuple[str, ...] = CONTROL_TOKENS) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["the answer"], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)
    made.add_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    made.eos_token = "<|end|>"
    return made


def adapted(template: Any) -> tuple[dict[str, Finding], PreTrainedTokenizerFast]:
    tokenizer = make_tokenizer(template)
    return {finding.name: finding for finding in adapt_template(tokenizer, DAY)}, tokenizer


def rendered(tokenizer: PreTrainedTokenizerFast, *contents: str) -> str:
    turns = [
        {"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)
    ]
    opening = len(contents) % 2 == 1
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opening))


def test_a_date_that_moves_is_fixed_with_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    found, tokenizer = adapted(DATED)
    assert found["date"].result == "adapted"
    texts = set()
    for year in (2026, 2031):

        class Clock(dt.datetime):
            @classmethod
            def now(cls, tz: Any = None, year: int = year) -> dt.datetime:
                return dt.datetime(year, 7, 1)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        texts.add(rendered(tokenizer, "a"))
    assert texts == {"<|system|>05 Mar 2026<|end|><|user|>a<|end|><|assistant|>"}


def test_a_date_in_a_made_up_format_is_refused() -> None:
    found, _ = adapted("{% set wanted = '%d' %}{{ strftime_now(wanted) }}" + CHAT_TEMPLATE)
    assert found["date"].result == "refused"


def test_a_prompt_that_opens_reasoning_is_refused() -> None:
    found, _ = adapted(OPENS_THINKING)
    assert found["template"].result == "refused" and "<think>" in found["template"].what


def test_a_base_that_cannot_reason_is_refused_with_what_to_change(probed: Probed) -> None:
    config = probed.config()
    learns = config.model_copy(update={"base": config.base.model_copy(update={"reasoning": "learn"})})
    with pytest.raises(BaseModelError) as caught:
        make_base(probed.base, learns)
    assert "base.reasoning: drop" in caught.value.remedy and not probed.base.exists()


def test_a_base_with_another_setting_of_reasoning_makes_no_tokens(tiny_base: Path) -> None:
    assert known_tokens(tiny_base, BaseConfig())[0]
    chat, why = known_tokens(tiny_base, BaseConfig(reasoning="learn"))
    assert chat is None and "base.reasoning" in why


def test_reasoning_is_switched_off_where_the_template_can() -> None:
    found, tokenizer = adapted(SWITCHED)
    assert (found["opening"].result, found["template"].result) == ("adapted", "ok")
    assert rendered(tokenizer, "a", "b").startswith(rendered(tokenizer, "a") + "b")
    assert "<think></think>" in rendered(tokenizer, "a")


def test_a_template_that_opens_no_answer_gets_what_stands_before_answers() -> None:
    found, tokenizer = adapted(WITHOUT_OPENING)
    assert (found["opening"].result, found["template"].result) == ("adapted", "ok")
    assert rendered(tokenizer, "a") == "<|user|>a<|end|><|assistant|>"
    assert rendered(tokenizer, "a", "b") == "<|user|>a<|end|><|assistant|>b<|end|>"


def test_of_several_named_templates_the_default_alone_is_kept(probed: Probed) -> None:
    tokenizer = load_tokenizer(probed.files)
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "rag": "{{ documents }}"}
    tokenizer.save_pretrained(probed.files)
    probed.prove()
    assert load_tokenizer(probed.base).chat_template == CHAT_TEMPLATE
    assert all(path.is_file() for path in probed.base.iterdir())


def test_named_templates_without_a_default_are_refused() -> None:
    found, _ = adapted({"rag": CHAT_TEMPLATE})
    assert {finding.result for finding in found.values()} == {"refused"}


def test_a_tokenizer_that_begins_each_piece_with_a_blank_is_refused() -> None:
    """As Llama 2's: decoding takes the blank away again, so only the whole conversation shows it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(["[INST] the user a b [/INST] the answer"], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    made.chat_template = (
        "{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST] "
        "{% else %}{{ message.content }}</s>{% endif %}{% endfor %}"
    )
    chat = ChatFormat(made)
    with pytest.raises(BaseModelError, match="byte-level"):
        chat.prove()


def test_what_the_template_takes_is_told() -> None:
    takes_tools = CHAT_TEMPLATE.replace("{%", "{% if tools %}{{ tools }}{% endif %}{%", 1)
    found, _ = adapted(takes_tools)
    assert "system messages yes, tools yes, reasoning no" in found["template"].what
    assert json.dumps(found["template"].remedy) == '""'
