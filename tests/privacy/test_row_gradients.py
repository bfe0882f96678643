"""The gradients of single rows are what a loop over rows gives, and nothing but them is in a step's sum."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from ratchet.config.training import AdapterConfig
from ratchet.errors import ConfigError
from ratchet.models.adapters import add_adapter
from ratchet.models.cache import logits_at
from ratchet.models.loading import load_base
from ratchet.privacy.accountant import Mechanism
from ratchet.privacy.gradients import RowGradients
from ratchet.privacy.noise import KEY_FILE, Purpose, draw_units, keep_key, normal, uniform
from ratchet.training.collation import Private, RowCollator, by_user, draw_batches, make_batches, rows_apart
from ratchet.training.loss import AnswerLoss
from ratchet.training.packing import IGNORED, Window, read_windows
from ratchet.training.schedule import Schedule
from ratchet.training.state import trainable

KEY = bytes(range(32))
OTHER = bytes(range(1, 33))
SCHEDULE = Schedule(
    steps=40,
    batch_windows=2,
    accumulate=1,
    learning_rate=1e-2,
    kind="constant",
    warmup_share=0.0,
    weight_decay=0.0,
    max_grad_norm=1.0,
    evaluations=1,
    patience=1,
    seed=7,
)


@pytest.fixture(scope="module")
def windows(tokens: Path) -> list[Window]:
    return read_windows(tokens / "train.arrow")[:8]


@pytest.fixture(scope="module")
def rows(windows: list[Window]) -> list[Window]:
    return rows_apart(windows)


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    made = add_adapter(load_base(tiny_base), AdapterConfig(rank=4, alpha=8.0), seed=1)
    torch.manual_seed(3)
    with torch.no_grad():  # B begins as zeros, for which A has no gradient
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    return made.eval()


def losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean loss of each row's learned tokens, in the plainest way: all logits, one row after another."""
    predict = partial(logits_at, model, model.get_output_embeddings(), batch)
    found, _ = AnswerLoss()(batch, predict, torch.tensor(1))
    learned = batch["labels"][:, 1:] != IGNORED
    parts = found.split(learned.sum(1).tolist())
    return torch.stack([part.mean() for part in parts])


def brute_force(model: Any, rows: list[Window], norm: float) -> dict[str, torch.Tensor]:
    """Compute each row alone, without padding, by plain autograd; clip; add up in float64."""
    total: dict[str, torch.Tensor] = {}
    for row in rows:
        model.zero_grad()
        batch = RowCollator(0)([[row]])
        logits = model(input_ids=batch["input_ids"]).logits[0, :-1]
        targets = batch["labels"][0, 1:]
        torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED).backward()
        found = {
            name: weight.grad.double() for name, weight in model.named_parameters() if weight.requires_grad
        }
        length = torch.stack([gradient.square().sum() for gradient in found.values()]).sum().sqrt()
        scale = min(1.0, norm / float(length))
        total = {name: total.get(name, torch.zeros_like(part)) + scale * part for name, part in found.items()}
    model.zero_grad()
    return total


def lengths_of(model: Any, rows: list[Window]) -> list[float]:
    found = []
    for row in rows:
        parts = brute_force(model, [row], 1e9).values()
        found.append(float(sum(part.square().sum() for part in parts) ** 0.5))
    return found


@pytest.mark.parametrize("groups", [1, 3], ids=["one pass", "three passes"])
def test_the_clipped_sum_equals_a_loop_over_rows(model: Any, rows: list[Window], groups: int) -> None:
    chosen = rows[:9]
    assert len({len(row.input_ids) for row in chosen}) > 3, "rows are padded"
    norm = float(
        np.mean(sorted(lengths_of(model, chosen))[4:6])
    )  # between two rows: the four longest are clipped
    gradients = RowGradients(model, norm)
    for part in range(groups):
        group = chosen[part::groups]
        batch = RowCollator(0)([group])
        gradients.add(partial(losses, model, batch), torch.arange(len(group)))
    assert gradients.clipped == 4
    wanted = brute_force(model, chosen, norm)
    assert {f"{name}.weight" for name in gradients.sums} == set(wanted)
    for name, found in gradients.sums.items():
        assert torch.allclose(found.double(), wanted[f"{name}.weight"], atol=1e-6, rtol=0), name


def test_the_rows_of_a_user_are_clipped_as_one(model: Any, rows: list[Window]) -> None:
    """A unit's gradient is that of its rows' mean loss: the mean of theirs, clipped once."""
    users = [rows[:3], rows[3:4], rows[4:6]]
    batch = RowCollator(0)([[row for user in users for row in user]])
    norm = 0.7 * float(np.median(lengths_of(model, rows[:6])))
    gradients = RowGradients(model, norm)
    gradients.add(partial(losses, model, batch), torch.tensor([0, 0, 0, 1, 2, 2]))
    wanted: dict[str, torch.Tensor] = {}
    for user in users:
        mean = {name: part / len(user) for name, part in brute_force(model, user, 1e9).items()}
        length = float(sum(part.square().sum() for part in mean.values()) ** 0.5)
        for name, part in mean.items():
            wanted[name] = wanted.get(name, torch.zeros_like(part)) + min(1.0, norm / length) * part
    assert gradients.seen == 3
    for name, found in gradients.sums.items():
        assert torch.allclose(found.double(), wanted[f"{name}.weight"], atol=1e-6, rtol=0), name


def test_a_users_rows_are_drawn_together_in_one_pass(windows: list[Window]) -> None:
    owned = [window._replace(owners=[0] * window.position_ids.count(0)) for window in windows]
    rows = [row._replace(owners=[place // 3]) for place, row in enumerate(rows_apart(owned))]
    users = by_user(rows, 2)
    assert {len(user) for user in users[:-1]} == {2}, "the third row of each is left out"
    private = Private(Mechanism(1.0, 0.4, 40), 1.0, KEY, users)
    plain = make_batches(windows, [], 1, accumulate=1, pad_id=0, apart=True)
    batches = draw_batches(plain, windows, private, SCHEDULE)
    whole = {frozenset(tuple(row.input_ids) for row in user) for user in users}
    for step in batches.train:
        for part, units in batches.collate([step])["passes"]:
            ids = [
                tuple(row[mask.bool()].tolist())
                for row, mask in zip(part["input_ids"], part["attention_mask"], strict=True)
            ]
            for unit in set(units.tolist()):
                members = (units == unit).nonzero().flatten().tolist()
                assert frozenset(ids[place] for place in members) in whole


def test_one_row_changes_the_sum_by_no_more_than_the_norm(model: Any, rows: list[Window]) -> None:
    norm = 0.5 * min(lengths_of(model, rows[:6]))  # every row is clipped

    def sums(chosen: list[Window]) -> torch.Tensor:
        gradients = RowGradients(model, norm)
        gradients.add(partial(losses, model, RowCollator(0)([chosen])), torch.arange(len(chosen)))
        return torch.cat([part.flatten() for part in gradients.sums.values()])

    whole = sums(rows[:6])
    for left_out in range(6):
        without = sums([row for place, row in enumerate(rows[:6]) if place != left_out])
        assert float((whole - without).norm()) == pytest.approx(norm, rel=1e-3)


def test_the_release_is_the_sum_and_noise_of_the_size_that_is_accounted_for(
    model: Any, rows: list[Window]
) -> None:
    gradients = RowGradients(model, 0.5)
    gradients.add(partial(losses, model, RowCollator(0)([rows[:4]])), torch.arange(4))
    sums = {name: part.clone() for name, part in gradients.sums.items()}
    gradients.release(KEY, 3, noise_multiplier=2.0, divisor=8.0)
    layers = dict(model.named_modules())
    noise = torch.cat(
        [(8 * layers[name].weight.grad - part).flatten() for name, part in sums.items()]
    ).numpy()
    assert len(noise) == sum(weight.numel() for weight in trainable(model).values())
    assert stats.kstest(noise, stats.norm(0, 2.0 * 0.5).cdf).pvalue > 0.01
    assert gradients.sums == {}, "the next step begins with nothing"
    gradients.release(KEY, 4, noise_multiplier=2.0, divisor=8.0)  # no row was drawn
    alone = torch.cat([(8 * layers[name].weight.grad).flatten() for name in sums])
    assert float(alone.std()) == pytest.approx(1.0, rel=0.05)
    model.zero_grad()


@pytest.mark.parametrize(
    ("settings", "new_ids"), [({}, [5]), ({"modules_to_save": ["lm_head"]}, [])], ids=["embedding", "head"]
)
def test_weights_without_gradients_by_row_are_refused(
    tiny_base: Path, settings: dict[str, Any], new_ids: list[int]
) -> None:
    config = AdapterConfig(rank=4, alpha=8.0, **settings)
    other = add_adapter(load_base(tiny_base), config, seed=1, new_ids=new_ids)
    with pytest.raises(ConfigError, match=r"no matrix of a linear layer|cannot be told apart by row"):
        gradients = RowGradients(other.eval(), 1.0)
        batch = RowCollator(0)([[Window([1, 2, 3], [IGNORED, 2, 3], [0, 1, 2])] * 2])
        gradients.add(partial(losses, other, batch), torch.arange(2))


# --- which rows, which noise ---


def test_a_step_draws_each_row_by_itself_and_computes_it_apart(
    windows: list[Window], rows: list[Window]
) -> None:
    assert any(window.position_ids.count(0) > 1 for window in windows), "windows hold several rows"
    private = Private(Mechanism(1.0, 0.3, 40), 1.0, KEY, [[row] for row in rows])
    plain = make_batches(windows, [], 2, accumulate=1, pad_id=0, apart=True)
    batches = draw_batches(plain, windows, private, SCHEDULE)
    assert len(batches.train) == 40
    known = {tuple(row.input_ids): place for place, row in enumerate(rows)}
    assert len(known) == len(rows)
    seen = np.zeros((40, len(rows)), dtype=int)
    for step in batches.train:
        batch = batches.collate([step])
        for part, units in batch["passes"]:
            assert "position_ids" not in part
            assert units.tolist() == list(range(len(part["labels"])))
            for ids, mask in zip(part["input_ids"], part["attention_mask"], strict=True):
                seen[step, known[tuple(ids[mask.bool()].tolist())]] += 1
    assert seen.max() == 1
    assert seen.sum() / seen.size == pytest.approx(0.3, abs=0.05)
    sizes = seen.sum(1)
    assert len(set(sizes)) > 5, "the number of rows of a step is drawn, too"


def test_samples_and_noise_come_from_the_key_alone() -> None:
    assert draw_units(KEY, 5, 500, 0.1) == draw_units(KEY, 5, 500, 0.1)
    assert draw_units(KEY, 5, 500, 0.1) != draw_units(KEY, 6, 500, 0.1)
    assert draw_units(KEY, 5, 500, 0.1) != draw_units(OTHER, 5, 500, 0.1)
    assert draw_units(KEY, 5, 500, 1.0) == list(range(500))
    assert not np.array_equal(uniform(KEY, Purpose.SAMPLE, 1, 9), uniform(KEY, Purpose.NOISE, 1, 9))
    assert not np.array_equal(normal(KEY, 1, 9), normal(KEY, 1, 9, part=1))


def test_noise_is_normal_and_steps_are_independent() -> None:
    drawn = np.stack([normal(KEY, step, 20_000) for step in range(4)])
    assert stats.kstest(drawn.ravel(), "norm").pvalue > 0.01
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 0.03
    halves = np.corrcoef(drawn[0][:10_000], drawn[0][10_000:])[0, 1]
    assert abs(halves) < 0.04


def test_the_key_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    key = keep_key(tmp_path / "run")
    assert len(key) == 32
    assert keep_key(tmp_path / "run") == key
    assert (tmp_path / "run" / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert keep_key(tmp_path / "other") != key
