"""Training: repeatable to the byte, the best weights kept, nothing left behind when it fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ratchet.config.docs import render_params
from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig, TrainConfig
from ratchet.errors import BaseModelError, ConfigError, DiskSpaceError, DivergenceError
from ratchet.files import read_json, sha256_file, write_json
from ratchet.models.adapters import add_adapter, prepare_quantised
from ratchet.models.chat_template import Encoded
from ratchet.models.generation import answer_likelihoods
from ratchet.models.loading import adapter_sha256, compute_dtype, load_adapter, load_base
from ratchet.tracking.curve import read_history
from ratchet.training.collation import WindowCollator, count_batches
from ratchet.training.loss import AnswerLoss
from ratchet.training.packing import IGNORED, Window, read_windows
from ratchet.training.schedule import Schedule
from ratchet.training.state import trainable
from ratchet.training.trainer import fit
from tasks.train import train

ROOT = Path(__file__).parents[2]
WEIGHTS = "adapter_model.safetensors"
SCHEDULE = Schedule(
    steps=6,
    batch_windows=4,
    accumulate=1,
    learning_rate=1e-2,
    kind="cosine",
    warmup_share=0.0,
    weight_decay=0.01,
    max_grad_norm=1.0,
    evaluations=3,
    patience=3,
    seed=7,
)


# --- by the command, in processes of their own ---


@pytest.fixture(scope="module", autouse=True)
def started(tmp_path_factory, tokens, tiny_base, nobody, tiny_config) -> dict[str, subprocess.Popen[str]]:
    """`python -m tasks.train` as dvc.yaml runs it: twice the same, each with its own hash seed, and once with
    a NaN in the base. They run beside the other tests."""
    processes = {}
    for seed, name in enumerate(("one", "two", "broken")):
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(tokens, folder / "data/tokenized")
        shutil.copytree(tiny_base, folder / "models/base")
        shutil.copytree(nobody, folder / "models/incumbent")
        (folder / "params.yaml").write_text(render_params(tiny_config))
        if name == "broken":
            spoil(weights := folder / "models/base/model.safetensors")
            manifest = read_json(folder / "models/base/manifest.json")  # it was broken when it was stored
            files = {**manifest["files"], weights.name: sha256_file(weights)}
            write_json(folder / "models/base/manifest.json", {**manifest, "files": files})
        arguments = [
            "--tokens",
            "data/tokenized",
            "--base",
            "models/base",
            "--incumbent",
            "models/incumbent",
            "--out",
            "models/candidate",
            "--reports",
            "reports/train",
        ]
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)}
        processes[name] = subprocess.Popen(
            [sys.executable, "-m", "tasks.train", *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes[name].folder = folder
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


def spoil(weights: Path) -> None:
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})


def finished(process: subprocess.Popen[str]) -> tuple[Path, str, str]:
    out, error = process.communicate()
    return process.folder, out, error


# --- what is learned ---


@pytest.fixture(scope="module")
def windows(tokens: Path) -> list[Window]:
    return read_windows(tokens / "train.arrow")[:24]


@pytest.fixture(scope="module")
def validation(tokens: Path) -> list[Window]:
    return read_windows(tokens / "validation.arrow")


def adapted(base: Path, **settings) -> Any:
    return add_adapter(load_base(base), AdapterConfig(rank=4, alpha=8.0, **settings), seed=1)


def run(
    model: Any,
    windows: list[Window],
    validation: list[Window],
    apart: bool | None = None,
    **settings,
) -> tuple[Any, list[tuple[int, dict[str, float]]]]:
    curve: list[tuple[int, dict[str, float]]] = []
    outcome = fit(
        model,
        windows,
        validation,
        SCHEDULE._replace(**settings),
        loss=AnswerLoss(),
        pad_id=0,
        report=lambda step, values: curve.append((step, values)),
        apart=apart,
    )
    return outcome, curve


def loss_by_hand(model: Any, windows: list[Window]) -> float:
    """Nats a learned token, each row by itself, no packing and no padding."""
    rows = []
    for window in windows:
        starts = [index for index, position in enumerate(window.position_ids) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(window.input_ids)], strict=True):
            rows.append(
                Encoded(window.input_ids[start:end], [label != IGNORED for label in window.labels[start:end]])
            )
    found = answer_likelihoods(model.eval(), rows, pad_id=0, batch_size=1)
    return sum(each.nll for each in found) / sum(each.tokens for each in found)


def test_the_loss_falls(tiny_base, windows):
    model = adapted(tiny_base)
    before = loss_by_hand(model, windows[:4])
    _, curve = run(model, windows[:4], [], steps=40, kind="constant")
    assert len([values for _, values in curve if "train_loss" in values]) == 40
    assert loss_by_hand(model, windows[:4]) < before - 0.1


@pytest.mark.parametrize(("batch_windows", "accumulate"), [(2, 2), (1, 4)])
def test_one_batch_of_four_is_as_many_windows_accumulated(
    tiny_base, windows, validation, batch_windows, accumulate
):
    """The curve, the validation loss and the weights; losses are a learned token, however the windows are
    split."""
    whole, split = adapted(tiny_base), adapted(tiny_base)
    _, at_once = run(whole, windows, validation, apart=False, batch_windows=4, accumulate=1)
    _, in_parts = run(
        split, windows, validation, apart=False, batch_windows=batch_windows, accumulate=accumulate
    )
    assert [step for step, _ in at_once] == [step for step, _ in in_parts]
    for (_, left), (_, right) in zip(at_once, in_parts, strict=True):
        assert left == pytest.approx(right, rel=1e-5, abs=1e-6)
    for (name, left), (_, right) in zip(whole.named_parameters(), split.named_parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5, msg=name)


def step_of_sgd(base: Path, windows: list[Window], **settings) -> dict[str, torch.Tensor]:
    """All windows in one step: what moves is the gradient."""
    model = adapted(base)
    run(
        model,
        windows,
        [],
        steps=1,
        optimizer="sgd",
        kind="constant",
        learning_rate=1.0,
        weight_decay=0.0,
        max_grad_norm=1e9,
        **settings,
    )
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def test_rows_in_groups_of_like_length_give_the_gradient_of_the_windows(tiny_base, windows):
    batch = len(windows) // 3
    groups = count_batches(windows, batch, apart=True)
    assert groups > 1
    packed = step_of_sgd(tiny_base, windows, apart=False, batch_windows=len(windows))
    apart = step_of_sgd(tiny_base, windows, apart=True, batch_windows=batch, accumulate=groups)
    for name, weight in packed.items():
        torch.testing.assert_close(apart[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_the_output_layer_computes_only_what_bears_loss(tiny_base, windows):
    model = adapted(tiny_base)
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda layer, inputs, output: seen.append(output[..., 0].numel())
    )
    run(model, windows, [], steps=1, apart=False, batch_windows=len(windows))
    assert seen == [sum(label != IGNORED for window in windows for label in window.labels)]


def test_bfloat16_learns_what_float32_does_and_validates_exactly(tiny_base, windows, validation):
    exact, half = adapted(tiny_base), adapted(tiny_base)
    full, _ = run(exact, windows, validation, steps=30)
    coarse, _ = run(half, windows, validation, steps=30, compute="bfloat16")
    assert coarse.best_validation_loss == pytest.approx(full.best_validation_loss, abs=0.02)
    assert coarse.best_validation_loss != full.best_validation_loss
    assert coarse.best_validation_loss == pytest.approx(loss_by_hand(half, validation), rel=1e-5)
    assert {weight.dtype for weight in half.parameters()} == {torch.float32}


def test_a_precision_that_the_machine_does_not_have_is_refused():
    assert compute_dtype("auto")[0] in ("float32", "bfloat16", "float16")
    assert compute_dtype("float32")[0] == "float32"
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"float16.*bfloat16, float32"):
            compute_dtype("float16")


@pytest.mark.parametrize("batch_windows", [1, 3, 16])
def test_the_validation_loss_is_the_loss_a_learned_token_of_each_row_by_itself(
    tiny_base, windows, validation, batch_windows
):
    model = adapted(tiny_base)
    outcome, _ = run(model, windows, validation, steps=1, evaluations=1, batch_windows=batch_windows)
    assert outcome.best_validation_loss == pytest.approx(loss_by_hand(model, validation), rel=1e-5)


def test_early_stopping_keeps_the_best_weights(tiny_base, windows, validation):
    model = adapted(tiny_base)
    outcome, curve = run(
        model,
        windows[:2],
        validation[:4],
        steps=30,
        learning_rate=0.1,
        kind="constant",
        evaluations=15,
        patience=3,
    )
    losses = [(values["validation_loss"], step) for step, values in curve if "validation_loss" in values]
    assert outcome.steps < 30  # two windows by heart: the validation loss soon rises
    assert (outcome.best_validation_loss, outcome.best_step) == min(losses)
    assert [loss for loss, _ in losses[-3:]] > [outcome.best_validation_loss] * 3
    assert outcome.best_step < outcome.steps
    assert loss_by_hand(model, validation[:4]) == pytest.approx(outcome.best_validation_loss, rel=1e-5)


def test_the_adapters_weights_come_from_the_seed_alone(tiny_base):
    torch.manual_seed(99)
    first = adapted(tiny_base)
    torch.rand(10)
    for (name, left), (_, right) in zip(
        first.named_parameters(), adapted(tiny_base).named_parameters(), strict=True
    ):
        assert torch.equal(left, right), name


def test_a_fresh_adapter_computes_what_the_base_does(tiny_base, validation):
    assert loss_by_hand(adapted(tiny_base), validation) == loss_by_hand(load_base(tiny_base), validation)


# --- near the start (FedProx) ---


def trained(base: Path, windows: list[Window], **settings) -> dict[str, torch.Tensor]:
    model = adapted(base)
    run(model, windows, [], **settings)
    return {name: weight.clone() for name, weight in trainable(model).items()}


def test_the_proximal_term_has_its_gradient_in_every_step(tiny_base, windows):
    """The first step starts where the term is nothing, so two steps of plain gradient descent show it."""
    plain = {
        "optimizer": "sgd",
        "learning_rate": 0.5,
        "kind": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1e6,
        "batch_windows": 2,
        "accumulate": 2,
    }
    start = {name: weight.clone() for name, weight in trainable(adapted(tiny_base)).items()}
    one, two = (trained(tiny_base, windows[:4], steps=steps, **plain) for steps in (1, 2))
    first, near = (trained(tiny_base, windows[:4], steps=steps, proximal=0.5, **plain) for steps in (1, 2))
    away = 0.0
    for name, weight in near.items():
        assert torch.equal(first[name], one[name]), name
        wanted = two[name] - 0.5 * 0.5 * (one[name] - start[name])
        assert torch.allclose(weight, wanted, atol=1e-6), name
        away = max(away, float((weight - two[name]).abs().max()))
    assert away > 1e-3  # or the term would be too small to be seen here


def test_a_large_proximal_weight_keeps_the_weights_near_the_start(tiny_base, windows):
    start = {name: weight.clone() for name, weight in trainable(adapted(tiny_base)).items()}

    def away(proximal: float) -> float:
        found = trained(tiny_base, windows, steps=12, proximal=proximal)
        return float(sum((weight - start[name]).square().sum() for name, weight in found.items()) ** 0.5)

    free, held, fast = away(0.0), away(1.0), away(100.0)
    assert fast < held < free
    assert fast < 0.3 * free


def test_a_proximal_weight_of_nothing_changes_no_byte(tiny_base, windows):
    none, least = trained(tiny_base, windows), trained(tiny_base, windows, proximal=1e-30)
    for name, weight in none.items():
        assert torch.equal(weight, least[name]), name


# --- what stops it ---


def test_a_learning_rate_beyond_all_bounds_is_a_divergence(tiny_base, windows, validation):
    with pytest.raises(DivergenceError, match=r"(?s)(is nan|is inf|not finite).*train\.learning_rate"):
        run(adapted(tiny_base), windows, validation, learning_rate=1e30)


def test_a_weight_that_is_not_finite_is_a_divergence(tiny_base, windows):
    model = adapted(tiny_base)
    with torch.no_grad():
        next(weight for weight in model.parameters() if weight.requires_grad)[0, 0] = torch.nan
    with pytest.raises(DivergenceError, match="at step 1 of 6"):
        run(model, windows, [])


def test_a_training_that_diverges_leaves_neither_candidate_nor_report(
    tmp_path, tokens, tiny_base, nobody, tiny_config
):
    config = tiny_config.model_copy(
        update={"train": tiny_config.train.model_copy(update={"learning_rate": 1e30})}
    )
    with pytest.raises(DivergenceError):
        train(tokens, tiny_base, nobody, tmp_path / "models/candidate", tmp_path / "reports/train", config)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path, tokens, tiny_base, nobody, tiny_config, monkeypatch
):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30 - 2**20, 2**20)
    )
    with pytest.raises(DiskSpaceError, match=r"the candidate needs about 200 MiB at .*, 1 MiB are free"):
        train(
            tokens, tiny_base, nobody, tmp_path / "models/candidate", tmp_path / "reports/train", tiny_config
        )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# --- what is saved ---


def test_a_saved_adapter_computes_what_the_trained_one_did(tmp_path, tiny_base, windows):
    model = adapted(tiny_base)
    run(model, windows, [])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = load_adapter(load_base(tiny_base), tmp_path / "adapter")
    ids = torch.arange(5, 60)[None]
    with torch.inference_mode():
        assert torch.equal(model.eval()(ids).logits, again.eval()(ids).logits)
        assert not torch.equal(again(ids).logits, load_base(tiny_base)(ids).logits)


def test_a_candidate_has_the_validation_loss_that_its_figures_say(candidate, tiny_base, validation):
    figures = read_json(candidate.parent / "reports/figures.json")
    assert loss_by_hand(load_adapter(load_base(tiny_base), candidate), validation) == pytest.approx(
        figures["best_validation_loss"], rel=1e-5
    )


def test_a_candidate_holds_no_pickle_no_path_and_describes_itself(candidate, tmp_path_factory):
    names = sorted(path.name for path in candidate.iterdir())
    assert names == [
        "adapter_config.json",
        WEIGHTS,
        "chat_template.jinja",
        "generation_config.json",
        "manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for path in candidate.iterdir():
        content = path.read_bytes()
        assert not any(
            str(place).encode() in content
            for place in (tmp_path_factory.getbasetemp(), Path.cwd(), Path.home())
        )
    manifest = read_json(candidate / "manifest.json")
    assert manifest["files"] == {
        name: sha256_file(candidate / name) for name in names if name != "manifest.json"
    }
    assert manifest["adapter_sha256"] == sha256_file(candidate / WEIGHTS)
    assert len(manifest["batches"]) == 2
    assert (
        manifest["base"]["model"]
        == read_json(candidate / "adapter_config.json")["base_model_name_or_path"]
        == "demo"
    )


def test_the_curve_is_whole_and_in_order(candidate, tiny_config):
    history, figures = (
        read_history(candidate.parent / "reports/history.jsonl"),
        read_json(candidate.parent / "reports/figures.json"),
    )
    steps = [point["step"] for point in history if "train_loss" in point]
    assert steps == list(range(1, figures["steps"] + 1))
    assert (
        min(point["validation_loss"] for point in history if "validation_loss" in point)
        == figures["best_validation_loss"]
    )
    assert figures["epochs"] == pytest.approx(tiny_config.train.epochs, abs=0.1)


def test_an_adapter_on_a_base_in_nf4_trains_saves_and_loads(
    tmp_path, tokens, tiny_base, nobody, tiny_config, validation
):
    adapter = tiny_config.adapter.model_copy(update={"method": "qlora"})
    config = tiny_config.model_copy(
        update={"adapter": adapter, "train": TrainConfig(epochs=0.3, learning_rate=1e-2, evaluations=1)}
    )
    figures = train(tokens, tiny_base, nobody, tmp_path / "candidate", tmp_path / "reports", config)
    base = load_base(tiny_base, method="qlora")
    untrained = loss_by_hand(base, validation)
    trained = loss_by_hand(load_adapter(base, tmp_path / "candidate"), validation)
    assert type(base.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    assert trained == pytest.approx(
        figures["best_validation_loss"], rel=5e-3
    )  # bfloat16 where training had float32
    assert trained < untrained - 0.01


def test_an_evaluation_in_the_middle_of_a_training_in_nf4_leaves_the_gradients_as_they_were(
    tiny_base, windows
):
    model = add_adapter(
        prepare_quantised(load_base(tiny_base, method="qlora")), AdapterConfig(method="qlora", rank=4), seed=1
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)

    def gradients() -> dict[str, torch.Tensor]:
        model.train().zero_grad()
        model(**WindowCollator(0)(windows[:2]), use_cache=False).loss.backward()
        return {
            name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad
        }

    before = gradients()
    loss_by_hand(model, windows[:1])
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, before[name], rtol=0, atol=0, msg=name)


# --- adapters that do not fit ---


def other_base(**settings) -> LlamaForCausalLM:
    shape = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **settings}))


def copy_with(candidate: Path, folder: Path, change: Any) -> Path:
    shutil.copytree(candidate, folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


# PEFT warns of the missing key; that nobody need read it is the point.
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_an_adapter_with_a_missing_key_is_refused(tmp_path, candidate, tiny_base):
    name = sorted(load_file(candidate / WEIGHTS))[5]
    spoilt = copy_with(candidate, tmp_path / "spoilt", lambda tensors: tensors.pop(name))
    with pytest.raises(BaseModelError, match=rf"1 weights differ, the first {name}"):
        load_adapter(load_base(tiny_base), spoilt)


def test_an_adapter_with_a_foreign_key_is_refused(tmp_path, candidate, tiny_base):
    spoilt = copy_with(
        candidate,
        tmp_path / "spoilt",
        lambda tensors: tensors.update(
            {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(4, 32)}
        ),
    )
    with pytest.raises(BaseModelError, match=r"does not fit the base.*layers\.7"):
        load_adapter(load_base(tiny_base), spoilt)


@pytest.mark.parametrize(
    "settings",
    [{"num_hidden_layers": 1}, {"hidden_size": 48}, {"intermediate_size": 96}],
    ids=["layers", "width", "inner width"],
)
def test_an_adapter_of_another_base_is_refused(candidate, settings):
    with pytest.raises(BaseModelError, match=r"(?s)does not fit the base.*train\.start_from"):
        load_adapter(other_base(**settings), candidate)


def test_an_adapter_of_another_base_is_refused_beside_one_that_fits(tmp_path, candidate, tiny_base):
    spoilt = copy_with(
        candidate,
        tmp_path / "spoilt",
        lambda tensors: tensors.update(
            {name: torch.zeros(4, 48) for name in tensors if name.endswith("up_proj.lora_A.weight")}
        ),
    )
    model = load_adapter(load_base(tiny_base), candidate, name="candidate")
    with pytest.raises(BaseModelError, match="does not fit the base"):
        load_adapter(model, spoilt, name="champion")


def test_a_folder_without_safetensors_is_no_adapter(tmp_path, candidate, tiny_base):
    shutil.copytree(candidate, tmp_path / "pickled")
    (tmp_path / "pickled" / WEIGHTS).rename(tmp_path / "pickled/adapter_model.bin")
    with pytest.raises(BaseModelError, match=rf"holds no {WEIGHTS}"):
        load_adapter(load_base(tiny_base), tmp_path / "pickled")


# --- from the champion ---


@pytest.fixture(scope="module")
def champion(tmp_path_factory, candidate) -> Path:
    """models/incumbent as it is pinned when the candidate was promoted."""
    folder = tmp_path_factory.mktemp("champion") / "incumbent"
    shutil.copytree(candidate, folder)
    write_json(folder / "manifest.json", {**read_json(folder / "manifest.json"), "version": 1})
    return folder


def from_champion(config: Config, **settings) -> Config:
    return config.model_copy(
        update={
            "train": TrainConfig(
                **{"epochs": 0.05, "evaluations": 1, "learning_rate": 1e-30, "weight_decay": 0.0, **settings}
            )
        }
    )


def test_training_goes_on_from_the_champions_weights(
    tmp_path, tokens, tiny_base, nobody, champion, tiny_config
):
    config = from_champion(tiny_config)  # steps too small to move a float
    train(tokens, tiny_base, champion, tmp_path / "candidate", tmp_path / "reports", config)
    after, before = load_file(tmp_path / "candidate" / WEIGHTS), load_file(champion / WEIGHTS)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert read_json(tmp_path / "candidate/manifest.json")["inputs"]["start"] == adapter_sha256(champion)
    train(tokens, tiny_base, nobody, tmp_path / "fresh", tmp_path / "of-fresh", config)
    first_loss = [
        read_history(tmp_path / reports / "history.jsonl")[0]["train_loss"]
        for reports in ("reports", "of-fresh")
    ]
    assert first_loss[0] < first_loss[1] - 0.01


def test_training_from_the_base_does_not_look_at_the_champion(
    tmp_path, tokens, tiny_base, champion, candidate, tiny_config
):
    config = tiny_config.model_copy(
        update={"train": tiny_config.train.model_copy(update={"start_from": "base"})}
    )
    train(tokens, tiny_base, champion, tmp_path / "candidate", tmp_path / "reports", config)
    assert (tmp_path / "candidate" / WEIGHTS).read_bytes() == (candidate / WEIGHTS).read_bytes()
    assert read_json(tmp_path / "candidate/manifest.json")["inputs"]["start"] == "base"


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"rank": 8}, "`rank` 4, wanted 8"),
        ({"alpha": 4.0}, "`alpha` 8.0, wanted 4.0"),
        ({"target_modules": ["q_proj"]}, "`target_modules`"),
    ],
)
def test_another_shape_than_the_champions_is_refused(
    tmp_path, tokens, tiny_base, champion, tiny_config, settings, what
):
    config = tiny_config.model_copy(update={"adapter": tiny_config.adapter.model_copy(update=settings)})
    with pytest.raises(BaseModelError, match=rf"(?s){what}.*train\.start_from: base"):
        train(tokens, tiny_base, champion, tmp_path / "candidate", tmp_path / "reports", config)


def test_a_champion_of_another_base_is_refused(tmp_path, tokens, tiny_base, champion, tiny_config):
    shutil.copytree(champion, tmp_path / "incumbent")
    shutil.copytree(tiny_base, tmp_path / "incumbent/base")
    with pytest.raises(BaseModelError, match=r"(?s)another base.*train\.start_from: base"):
        train(
            tokens,
            tiny_base,
            tmp_path / "incumbent",
            tmp_path / "candidate",
            tmp_path / "reports",
            tiny_config,
        )


# --- the processes, which have ended by now ---


def test_the_same_inputs_give_the_same_bytes_in_every_process(started, candidate):
    (one, said, error), (two, *_) = finished(started["one"]), finished(started["two"])
    assert started["one"].returncode == started["two"].returncode == 0, error
    names = sorted(path.name for path in (one / "models/candidate").iterdir())
    assert WEIGHTS in names
    for name in names:
        assert (
            (one / "models/candidate" / name).read_bytes()
            == (two / "models/candidate" / name).read_bytes()
            == (candidate / name).read_bytes()
        ), name
    assert "best validation loss" in said
    curves = [
        [
            {key: value for key, value in point.items() if key != "time_ms"}
            for point in read_history(folder / "reports/train/history.jsonl")
        ]
        for folder in (one, two)
    ]
    assert curves[0] == curves[1]
    assert json.loads((one / "reports/train/figures.json").read_text())["best_validation_loss"] < 6


def test_a_base_that_is_broken_ends_the_command_without_a_candidate(started):
    folder, _, error = finished(started["broken"])
    assert started["broken"].returncode == 1
    assert "DivergenceError: train_loss is nan at step 1" in error
    assert "Traceback" not in error
    assert sorted(path.name for path in (folder / "models").iterdir()) == ["base", "incumbent"]
    assert list((folder / "reports").iterdir()) == []
