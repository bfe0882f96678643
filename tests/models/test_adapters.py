"""Every `adapter.method`: trained on the tiny base, saved, and the same in engine and evaluation."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from evaluated import evaluate
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from ratchet.config.params import Config, parse_config
from ratchet.config.training import AdapterConfig, TrainConfig
from ratchet.data.examples import Message, read_examples
from ratchet.engines.loaded_model import LoadedModel, batch_place, model_place
from ratchet.engines.local_engine import LocalEngine
from ratchet.engines.upstream_engine import UpstreamEngine
from ratchet.errors import BaseModelError, ConfigError
from ratchet.files import read_json, sha256_file, write_json
from ratchet.models.adapters import BUILDERS, SHAPE, load_trained, read_kind
from ratchet.models.chat_template import ChatFormat, Encoded
from ratchet.models.generation import answer_likelihoods, greedy_answers, greedy_ids
from ratchet.models.loading import WEIGHTS, WHOLE, adapter_sha256, load_tokenizer, quiet, weights_file
from ratchet.serving.admission import check_adapter_fits
from ratchet.serving.bundle import Bundle, Generation
from ratchet.serving.engine import Ask, Ended, Piece
from ratchet.training.packing import IGNORED, Window, read_windows, rows_of
from tasks.train import train

LENGTH = 96
METHODS: dict[str, AdapterConfig] = {
    "lora": AdapterConfig(rank=4, alpha=8.0),
    "qlora": AdapterConfig(method="qlora", rank=4, alpha=8.0),
    "int8": AdapterConfig(method="qlora", quantisation="int8", rank=4, alpha=8.0),
    "dora": AdapterConfig(method="dora", rank=4, alpha=8.0, target_modules=["q_proj", "v_proj", "down_proj"]),
    "rslora": AdapterConfig(method="rslora", rank=4, alpha=8.0),
    "ia3": AdapterConfig(method="ia3"),
    "prefix": AdapterConfig(method="prefix", virtual_tokens=5),
    "prompt": AdapterConfig(method="prompt", virtual_tokens=5),
    "full": AdapterConfig(method="full"),
    "modules": AdapterConfig(rank=4, alpha=8.0, target_modules=["q_proj"], modules_to_save=["norm"]),
    "both": AdapterConfig(
        rank=4, alpha=8.0, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    ),
}
# float32 on both sides: what is left is the order of the sums (single or packed rows). A quantised base
# computes in bfloat16, with 8 bits of mantissa: training keeps its norms in float32, the engine does not.
TOLERANCE = {"qlora": 5e-3, "int8": 5e-3}


class Trained:
    """Each method's candidate, made when it is first asked for."""

    def __init__(self, folder: Path, tokens: Path, base: Path, nobody: Path, config: Config) -> None:
        self._folder, self._tokens, self.base, self._nobody, self._config = (
            folder,
            tokens,
            base,
            nobody,
            config,
        )

    def config(self, name: str, **settings: Any) -> Config:
        rate = 0.3 if name in ("ia3", "prefix", "prompt") else 1e-2
        return self._config.model_copy(
            update={
                "adapter": METHODS[name],
                "train": TrainConfig(**{"epochs": 0.3, "evaluations": 2, "learning_rate": rate, **settings}),
            }
        )

    def __call__(self, name: str) -> Path:
        out = self._folder / name / "candidate"
        if not out.exists():
            train(
                self._tokens, self.base, self._nobody, out, self._folder / name / "reports", self.config(name)
            )
        return out

    def figures(self, name: str) -> dict[str, Any]:
        return read_json(self(name).parent / "reports/figures.json")

    def other(self, name: str) -> Path:
        """Make another version of that method, with moved weights, so that it answers differently.

        Virtual tokens all move in one direction: random moves could cancel out.
        """
        out = self._folder / name / "other"
        if not out.exists():
            shutil.copytree(self(name), out)
            strength = {"prefix": 10.0, "prompt": 10.0, "ia3": 2.0}.get(name, 1.0)
            draw = torch.Generator().manual_seed(4)
            weights = {
                key: weight
                + strength
                * torch.randn(weight.shape[-1:] if "prompt" in key else weight.shape, generator=draw)
                for key, weight in load_file(weights_file(out)).items()
            }
            save_file(weights, weights_file(out), metadata={"format": "pt"})
        return out


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tokens: Path, tiny_base: Path, nobody: Path, tiny_config: Config
) -> Trained:
    """Train on a base with stronger attention.

    After twenty steps of pre-training it is so weak that virtual tokens would change the loss by 1e-5.
    """
    folder = tmp_path_factory.mktemp("methods")
    shutil.copytree(tiny_base, folder / "base")
    weights = {
        name: weight * (12 if "v_proj" in name or "o_proj" in name else 1)
        for name, weight in load_file(folder / "base" / WHOLE).items()
    }
    save_file(weights, folder / "base" / WHOLE, metadata={"format": "pt"})
    return Trained(folder, tokens, folder / "base", nobody, tiny_config)


@pytest.fixture(scope="module")
def validation(tokens: Path) -> list[Window]:
    return read_windows(tokens / "validation.arrow")


@pytest.fixture(scope="module")
def prompts(prepared: Path) -> list[tuple[Message, ...]]:
    return [tuple(row.prompt) for row in list(read_examples(prepared / "test.jsonl"))[:10]]


def bundle(version: int, adapter: Path, base: Path) -> Bundle:
    return Bundle("tiny", version, adapter, base, LENGTH, Generation(6))


def loss_in_the_engine(adapter: Path, base: Path, windows: list[Window]) -> float:
    """Nats a learned token, each row by itself, through the engine's own forward pass."""
    check_adapter_fits(bundle(1, adapter, base))
    loaded = LoadedModel(bundle(1, adapter, base))
    loaded.add(bundle(1, adapter, base))
    total, count = 0.0, 0
    with torch.inference_mode():
        for row in [row for window in windows for row in rows_of(window)]:
            ids, virtual = torch.tensor([row.input_ids]), loaded.num_virtual(1)
            positions = torch.arange(virtual, virtual + ids.shape[1])[None]
            logits = loaded.forward(
                [1],
                ids,
                torch.ones(1, virtual + ids.shape[1], dtype=torch.long),
                positions,
                loaded.new_cache(1, 1),
                whole=True,
            )
            total += float(
                cross_entropy(
                    logits[0, :-1].float(),
                    torch.tensor(row.labels[1:]),
                    ignore_index=IGNORED,
                    reduction="sum",
                )
            )
            count += sum(label != IGNORED for label in row.labels)
    return total / count


@pytest.mark.parametrize("name", METHODS)
def test_the_engine_finds_the_loss_where_training_left_it(
    name: str, trained: Trained, validation: list[Window], nobody: Path
) -> None:
    found, tolerance = loss_in_the_engine(trained(name), trained.base, validation), TOLERANCE.get(name, 1e-5)
    assert found == pytest.approx(trained.figures(name)["best_validation_loss"], rel=tolerance)
    assert (
        abs(found - loss_in_the_engine(trained.other(name), trained.base, validation)) > 5 * tolerance * found
    ), "or the test would tell nothing"


# Without int8: bitsandbytes takes a column for an outlier when one row of the batch has one there, so the
# last bits of other rows depend on it.
@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"int8"}))
def test_two_versions_answer_together_as_each_does_in_the_evaluation(
    name: str, trained: Trained, prompts: list[tuple[Message, ...]]
) -> None:
    versions = {1: trained(name), 2: trained.other(name)}

    async def together() -> list[Said]:
        engine = LocalEngine(Config.model_validate({"gateway": {"max_batch": 6}}))
        try:
            for version, folder in versions.items():
                await engine.load(bundle(version, folder, trained.base))
            said = await asyncio.gather(
                *(
                    take(engine, Ask(f"r{number}", 1 + number % 2, prompt))
                    for number, prompt in enumerate(prompts)
                )
            )
            await engine.unload(1)
            return [*said, await take(engine, Ask("last", 2, prompts[0]))]
        finally:
            await engine.close()

    found = asyncio.run(together())
    alone_is = {version: alone(prompts, folder, trained.base) for version, folder in versions.items()}
    assert all(abs(one.nll - other.nll) > 1e-3 for one, other in zip(*alone_is.values(), strict=True)), (
        "or the test would tell nothing"
    )
    wanted = [*(alone_is[1 + number % 2][number] for number in range(len(prompts))), alone_is[2][0]]
    assert [said.text for said in found] == [said.text for said in wanted]
    assert [said.nll for said in found] == pytest.approx(
        [said.nll for said in wanted], rel=1e-3 if name == "qlora" else 1e-5
    )


@pytest.mark.parametrize("name", ["lora", "prefix", "prompt"])
def test_answers_of_a_batch_are_those_of_each_row_alone(name: str, trained: Trained, prepared: Path) -> None:
    """PEFT counts virtual tokens' positions through padding, so such rows share a batch by length only."""
    model, chat = (
        load_trained(trained.base, trained.other(name)).eval(),
        ChatFormat(load_tokenizer(trained.base)),
    )
    encoded = [chat.encode_prompt(row.prompt) for row in read_examples(prepared / "test.jsonl")]
    assert len({len(ids) for ids in encoded}) > 5
    with quiet():
        assert greedy_ids(model, encoded, chat, max_new_tokens=8, batch_size=64) == greedy_ids(
            model, encoded, chat, max_new_tokens=8, batch_size=1
        )


class Said(NamedTuple):
    text: str
    nll: float  # of the prompt, in nats a token


async def take(engine: LocalEngine, ask: Ask) -> Said:
    pieces = [piece async for piece in engine.answer(ask)]
    end = pieces[-1]
    assert isinstance(end, Ended) and end.prompt_nll is not None
    return Said("".join(piece.text for piece in pieces if isinstance(piece, Piece)), end.prompt_nll)


def alone(prompts: list[tuple[Message, ...]], folder: Path, base: Path) -> list[Said]:
    """What the evaluation says, a row at a time."""
    model, chat = load_trained(base, folder).eval(), ChatFormat(load_tokenizer(base))
    encoded = [chat.encode_prompt(prompt) for prompt in prompts]
    with quiet():  # as the evaluation does: PEFT warns of position ids that it makes itself
        answers = greedy_answers(model, encoded, chat, max_new_tokens=6, batch_size=1)
        rows = [Encoded([*ids, chat.stop_id], [False] * len(ids) + [True]) for ids in encoded]
        found = answer_likelihoods(model, rows, pad_id=chat.pad_id, batch_size=1)
    return [
        Said(answer, each.prompt_nll / each.prompt_tokens)
        for answer, each in zip(answers, found, strict=True)
    ]


def test_versions_of_different_methods_are_served_beside_each_other(
    trained: Trained, prompts: list[tuple[Message, ...]]
) -> None:
    folders = [trained(name) for name in ("lora", "full", "prompt", "prefix")]

    async def together() -> list[Said]:
        engine = LocalEngine(Config())
        try:
            for version, folder in enumerate(folders):
                await engine.load(bundle(version, folder, trained.base))
            return await asyncio.gather(
                *(take(engine, Ask(f"r{version}", version, prompts[0])) for version in range(len(folders)))
            )
        finally:
            await engine.close()

    found, wanted = (
        asyncio.run(together()),
        [alone(prompts[:1], folder, trained.base)[0] for folder in folders],
    )
    assert [said.text for said in found] == [said.text for said in wanted]
    assert [said.nll for said in found] == pytest.approx([said.nll for said in wanted], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "model_shared", "batch_shared"),
    [
        ("lora", 1, 1),
        ("qlora", 1, 1),
        ("rslora", 1, 1),
        ("dora", 1, 0),
        ("ia3", 1, 0),
        ("prefix", 1, 0),
        ("prompt", 1, 0),
        ("modules", 0, 0),
        ("full", 0, 0),
    ],
)
def test_what_shares_memory_and_what_shares_a_batch(
    name: str, model_shared: int, batch_shared: int, trained: Trained
) -> None:
    one, other = bundle(1, trained(name), trained.base), bundle(2, trained.other(name), trained.base)
    assert (model_place(one) == model_place(other), batch_place(one) == batch_place(other)) == (
        bool(model_shared),
        bool(batch_shared),
    )


# --- evaluation ---

Scores = Callable[[str, Path], dict[str, Any]]


@pytest.fixture(scope="module")
def scores(
    trained: Trained, prepared: Path, nobody: Path, tmp_path_factory: pytest.TempPathFactory
) -> Scores:
    """The scores of a version of a method by itself, evaluated once."""

    @cache
    def alone(name: str, folder: Path) -> dict[str, Any]:
        out = tmp_path_factory.mktemp("scores") / "evaluation"
        found = evaluate(prepared, trained.base, nobody, folder, out, trained.config(name))
        return found["slices"]["test"]

    return alone


@pytest.mark.parametrize(
    ("name", "champion"),
    [
        ("full", "lora"),
        ("prompt", "prompt"),
        ("lora", "full"),
        ("ia3", "lora"),
        ("modules", "modules"),
        ("lora", "qlora"),
        ("ia3", "ia3"),
    ],
)
def test_each_model_has_the_scores_that_it_has_alone(
    name: str, champion: str, trained: Trained, scores: Scores, prepared: Path, tmp_path: Path
) -> None:
    incumbent = tmp_path / "incumbent"
    shutil.copytree(trained.other(champion), incumbent)
    write_json(incumbent / "manifest.json", {**read_json(incumbent / "manifest.json"), "version": 1})
    both = evaluate(
        prepared, trained.base, incumbent, trained(name), tmp_path / "both", trained.config(name)
    )["slices"]["test"]
    one, other = scores(name, trained(name)), scores(champion, trained.other(champion))
    plain = scores("lora", trained("lora"))
    assert both["candidate"] == one["candidate"]
    assert both["champion"] == other["candidate"] != both["candidate"]
    assert both["base"] == plain["base"]


# --- what is saved ---


@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_describes_itself(name: str, trained: Trained) -> None:
    folder = trained(name)
    manifest, weights = read_json(folder / "manifest.json"), WHOLE if name == "full" else WEIGHTS
    assert manifest["adapter_sha256"] == adapter_sha256(folder) == sha256_file(folder / weights)
    assert manifest["adapter"] == METHODS[name].model_dump(mode="json")
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert not any(str(trained.base).encode() in path.read_bytes() for path in folder.iterdir())


def test_every_method_of_the_config_has_a_builder_a_shape_and_a_test() -> None:
    offered = set(AdapterConfig.model_json_schema()["properties"]["method"]["enum"])
    assert offered == {*BUILDERS, "full"} == set(SHAPE) == {config.method for config in METHODS.values()}


@pytest.mark.parametrize("change", ["missing", "foreign", "shape"])
def test_a_whole_model_that_is_not_whole_is_refused(change: str, trained: Trained, tmp_path: Path) -> None:
    """transformers would fill what is missing at random."""
    shutil.copytree(trained("full"), tmp_path / "full")
    weights = load_file(tmp_path / "full" / WHOLE)
    if change == "missing":
        del weights["model.layers.1.mlp.up_proj.weight"]
    elif change == "foreign":
        weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(4, 4)
    else:
        weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(4, 4)
    save_file(weights, tmp_path / "full" / WHOLE, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"does not fit the base|holds no whole model"):
        LoadedModel(bundle(1, tmp_path / "full", trained.base))


def test_a_folder_with_an_adapter_and_a_whole_model_is_refused(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained("lora"), tmp_path / "both")
    shutil.copy(trained("full") / WHOLE, tmp_path / "both")
    with pytest.raises(BaseModelError, match="wanted one of"):
        adapter_sha256(tmp_path / "both")


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_virtual_tokens_of_another_base_are_refused(name: str, trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained(name), tmp_path / "spoilt")
    save_file(
        {"prompt_embeddings": torch.zeros(5, 48)}, tmp_path / "spoilt" / WEIGHTS, metadata={"format": "pt"}
    )
    with pytest.raises(BaseModelError, match=r"virtual tokens of shape \(5, 48\), wanted a width of"):
        LoadedModel(one := bundle(1, tmp_path / "spoilt", trained.base)).add(one)


@pytest.mark.parametrize("name", ["full", "dora", "ia3", "prompt"])
def test_an_upstream_is_not_asked_to_load_what_it_cannot(name: str, trained: Trained) -> None:
    engine = UpstreamEngine(
        Config.model_validate({"gateway": {"engine": "openai", "upstream": "http://127.0.0.1:9/v1"}})
    )
    with pytest.raises(BaseModelError, match="cannot load it at run time"):
        asyncio.run(engine.load(bundle(1, trained(name), trained.base)))


@pytest.mark.parametrize("name", ["lora", "dora", "rslora", "ia3", "modules"])
def test_what_can_be_merged_computes_the_same_merged(name: str, trained: Trained) -> None:
    # In float64, or the bound would be one on the processor's rounding: 1.8e-4 on one, under 1e-4 on another.
    ids, model = torch.arange(5, 60)[None], load_trained(trained.base, trained.other(name)).eval().double()
    with torch.no_grad():
        apart = model(ids).logits
        merged = model.merge_and_unload().eval()(ids).logits
    torch.testing.assert_close(merged, apart, rtol=1e-4, atol=1e-4)


# --- from the champion ---


def in_charge(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    write_json(target / "manifest.json", {**read_json(target / "manifest.json"), "version": 1})
    return target


@pytest.mark.parametrize("name", METHODS)
def test_training_goes_on_from_a_champion_of_every_method(
    name: str, trained: Trained, tokens: Path, tmp_path: Path
) -> None:
    """With steps too small to move a float."""
    champion = in_charge(trained(name), tmp_path / "incumbent")
    config = trained.config(name, learning_rate=1e-30, weight_decay=0.0, epochs=0.05, evaluations=1)
    figures = train(tokens, trained.base, champion, tmp_path / "candidate", tmp_path / "reports", config)
    assert figures["best_validation_loss"] == pytest.approx(
        trained.figures(name)["best_validation_loss"], rel=TOLERANCE.get(name, 1e-5)
    )
    before, after = load_file(weights_file(champion)), load_file(weights_file(tmp_path / "candidate"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("champion", "wanted", "what"),
    [
        ("lora", AdapterConfig(method="dora", rank=4, alpha=8.0), "`method` lora, wanted dora"),
        ("full", AdapterConfig(rank=4), "`method` full, wanted lora"),
        ("lora", AdapterConfig(method="full"), "`method` lora, wanted full"),
        ("prompt", AdapterConfig(method="prompt", virtual_tokens=7), "`virtual_tokens` 5, wanted 7"),
        (
            "modules",
            AdapterConfig(rank=4, alpha=8.0, target_modules=["q_proj"]),
            r"`modules_to_save` \['norm'\], wanted \[\]",
        ),
    ],
)
def test_a_champion_of_another_method_or_shape_is_refused(
    champion: str, wanted: AdapterConfig, what: str, trained: Trained, tokens: Path, tmp_path: Path
) -> None:
    config = trained.config("lora").model_copy(update={"adapter": wanted})
    with pytest.raises(BaseModelError, match=rf"(?s){what}.*train\.start_from: base"):
        train(
            tokens,
            trained.base,
            in_charge(trained(champion), tmp_path / "incumbent"),
            tmp_path / "candidate",
            tmp_path / "reports",
            config,
        )


# --- settings ---


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (
            {"adapter": {"method": "prefix"}, "train": {"checkpoint_activations": True}},
            "train.checkpoint_activations is true",
        ),
        ({"adapter": {"method": "ia3", "bias": "all"}}, "adapter.bias is 'all'"),
        (
            {"adapter": {"method": "full", "modules_to_save": ["norm"]}},
            r"adapter.modules_to_save is \['norm'\]",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_anything_is_loaded(
    raw: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_config(raw, Path("params.yaml"))


def fails(
    trained: Trained,
    tokens: Path,
    nobody: Path,
    tmp_path: Path,
    name: str = "lora",
    adapter: AdapterConfig | None = None,
    **settings: Any,
) -> None:
    config = trained.config(name, **settings)
    config = config.model_copy(update={"adapter": adapter}) if adapter else config
    train(tokens, trained.base, nobody, tmp_path / "candidate", tmp_path / "reports", config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_an_optimizer_that_needs_cuda_says_so(
    optimizer: str, trained: Trained, tokens: Path, nobody: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"`train\.optimizer: {optimizer}` needs a GPU"):
        fails(trained, tokens, nobody, tmp_path, optimizer=optimizer)


def test_kernels_that_need_cuda_say_so(trained: Trained, tokens: Path, nobody: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`train\.liger` needs a GPU"):
        fails(trained, tokens, nobody, tmp_path, liger=True)


def test_modules_that_the_base_does_not_have_are_named(
    trained: Trained, tokens: Path, nobody: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"(?s)does not fit the base.*c_attn"):
        fails(trained, tokens, nobody, tmp_path, adapter=AdapterConfig(target_modules=["c_attn"]))


def test_virtual_tokens_beyond_the_bases_context_are_refused(
    trained: Trained, tokens: Path, nobody: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"adapter.virtual_tokens` 200 are \d+ positions, the base has 256"):
        fails(trained, tokens, nobody, tmp_path, adapter=AdapterConfig(method="prompt", virtual_tokens=200))


@pytest.mark.parametrize("name", ["lora", "full", "prompt", "qlora"])
def test_checkpointed_activations_change_nothing(
    name: str, trained: Trained, tokens: Path, nobody: Path, tmp_path: Path
) -> None:
    found = train(
        tokens,
        trained.base,
        nobody,
        tmp_path / "candidate",
        tmp_path / "reports",
        trained.config(name, checkpoint_activations=True),
    )
    assert found["best_validation_loss"] == pytest.approx(
        trained.figures(name)["best_validation_loss"], rel=1e-5
    )


@pytest.mark.parametrize("name", ["lora", "full", "prompt", "prefix"])
def test_noise_on_the_embeddings_reaches_every_kind_of_method_in_training_alone(
    name: str, trained: Trained, tokens: Path, nobody: Path, tmp_path: Path
) -> None:
    figures = train(
        tokens,
        trained.base,
        nobody,
        tmp_path / "candidate",
        tmp_path / "reports",
        trained.config(name, neftune_alpha=20.0),
    )
    assert figures["train_loss"] != trained.figures(name)["train_loss"]
    assert loss_in_the_engine(
        tmp_path / "candidate", trained.base, read_windows(tokens / "validation.arrow")
    ) == pytest.approx(figures["best_validation_loss"], rel=1e-5)


def test_a_constant_schedule_warms_up_as_well(
    trained: Trained, tokens: Path, nobody: Path, tmp_path: Path
) -> None:
    train(
        tokens,
        trained.base,
        nobody,
        tmp_path / "candidate",
        tmp_path / "reports",
        trained.config("lora", schedule="constant", warmup_share=0.5, epochs=0.5),
    )
    points = [json.loads(line) for line in (tmp_path / "reports/history.jsonl").read_text().splitlines()]
    rates = [point.get("learning_rate", 0.0) for point in points if "train_loss" in point]
    assert rates[0] < rates[1] and rates[-1] == rates[-2] == 1e-2


def test_a_kind_that_nobody_trains_here_is_said(tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"peft_type": "VERA"})
    with pytest.raises(BaseModelError, match="of no kind that is known here"):
        read_kind(tmp_path)
