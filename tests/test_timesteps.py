"""Calibration batches of diffusion models: what is recorded, which samples of which steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mpq
from mpq.core.errors import InvalidInputError
from mpq.nn.batches import call, num_samples
from mpq.nn.fingerprint import batches_digest
from mpq.nn.timesteps import Step, eda_dm, q_diffusion, record_steps, timestep_calibration
from tests.contracts import borrowed_state, same_state
from tests.oracles_data import timestep_weights
from tests.tiny_unet import sample_loop, tiny_unet


def test_a_loop_is_recorded_and_the_model_given_back() -> None:
    model = tiny_unet()
    before = borrowed_state(model)
    steps = record_steps(model, sample_loop, feature="mid")
    assert same_state(before, borrowed_state(model))
    assert [step.timestep for step in steps] == list(range(9, -1, -1))
    assert all(num_samples(step.batch) == 6 for step in steps)
    assert all(step.batch.keys() == {"x", "timestep"} for step in steps)
    assert all(step.feature is not None and step.feature.numel() == 6 * 4 * 16 for step in steps)
    again = record_steps(model, sample_loop)
    assert torch.equal(again[4].batch["x"], steps[4].batch["x"])
    with torch.no_grad():  # the next latent follows from the one before
        x, noise = steps[8].batch["x"], call(model, steps[8].batch)
        left = steps[9].batch["x"] - (x - 0.1 * noise)
    assert float(left.std()) == pytest.approx(0.05, rel=0.2)


def test_calls_with_and_without_a_condition_are_joined() -> None:
    def guided(model: nn.Module) -> None:
        x = torch.zeros(3, 2, 8, 8)
        for time in (2, 1, 0):
            for label in (torch.ones(3), torch.zeros(3)):
                model(x, torch.full((3,), time), label)

    steps = record_steps(tiny_unet(), guided)
    assert [step.timestep for step in steps] == [2, 1, 0]
    assert steps[1].batch["label"].tolist() == [1, 1, 1, 0, 0, 0]
    assert steps[1].batch["timestep"].tolist() == [1] * 6
    assert steps[1].batch["x"].shape == (6, 2, 8, 8)


class Timeless(nn.Module):
    def forward(self, x: torch.Tensor, noise_level: torch.Tensor) -> torch.Tensor:
        return x * noise_level


def mixed(model: nn.Module) -> None:
    model(torch.zeros(2, 2, 8, 8), torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("model", "loop", "options", "words"),
    [
        (
            Timeless(),
            lambda m: m(torch.ones(1), torch.ones(1)),
            {},
            ("timestep='NAME'", "Timeless"),
        ),
        (tiny_unet(), mixed, {}, ("1 to 2",)),
        (tiny_unet(), lambda _: None, {}, ("did not call",)),
        (tiny_unet(), sample_loop, {"feature": "middle"}, ("did you mean 'mid'",)),
        (tiny_unet(), sample_loop, {"timestep": "time"}, ("unknown argument 'time'",)),
    ],
)
def test_what_cannot_be_recorded_is_told(
    model: nn.Module, loop: Any, options: dict[str, str], words: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        record_steps(model, loop, **options)
    for word in words:
        assert word in str(caught.value)


def test_the_time_may_have_any_name() -> None:
    def loop(model: nn.Module) -> None:
        for time in (0.5, 0.25):
            model(torch.ones(2, 3), torch.tensor(time))

    steps = record_steps(Timeless(), loop, timestep="noise_level")
    assert [step.timestep for step in steps] == [0.5, 0.25]


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 9))
def test_uniform_counts_are_at_even_distances(steps: int, every: int, per_step: int) -> None:
    counts = q_diffusion(steps, every, per_step)
    assert counts.tolist() == [per_step if t % every == 0 else 0 for t in range(steps)]


FEATURES = st.lists(st.lists(st.integers(-5, 5), min_size=3, max_size=3), min_size=1, max_size=9)


@settings(deadline=None)
@given(FEATURES, st.integers(1, 200), st.floats(0, 3), st.floats(0, 8))
def test_counts_add_up_and_follow_the_weights(
    values: list[list[int]], samples: int, balance: float, radius: float
) -> None:
    tensors = [torch.tensor([*one, 6]).double() for one in values]  # none is zero: cosines exist
    counts = eda_dm(tensors, samples, balance, radius)
    assert counts.sum() == samples
    assert (counts >= 0).all()
    features = [one.numpy() for one in tensors]
    near = [np.mean((a - b) ** 2) - radius for a in features for b in features]
    if min(map(abs, near)) < 1e-9:
        return  # on the radius: either side is right
    weights = np.array(timestep_weights(features, balance, radius))
    shares = (
        weights / weights.sum() if weights.sum() > 0 else np.full(len(weights), 1 / len(weights))
    )
    assert np.abs(counts - samples * shares).max() < 1 + 1e-6


def test_a_step_unlike_the_others_and_steps_like_many_give_more() -> None:
    like = [torch.tensor([10.0, 0.0, 0.1 * n]) for n in range(6)]
    odd, lonely = torch.tensor([-10.0, 0.0, 0.0]), torch.tensor([17.0, 0.0, 0.3])
    counts = eda_dm([*like, odd, lonely], 100, balance=1.0, radius=3.0)
    assert min(counts[:7]) > counts[7]  # like none in size, and in direction like six
    assert counts[6] > counts[7]
    assert eda_dm([*like, odd, lonely], 100, balance=0.0, radius=3.0)[6:].tolist() == [0, 0]


def test_equal_steps_share_equally() -> None:
    assert eda_dm([torch.ones(3)] * 4, 10).tolist() == [3, 3, 2, 2]


def test_batches_are_chosen_by_seed_and_can_be_run() -> None:
    model = tiny_unet()
    steps = record_steps(model, sample_loop, feature="mid")
    found = timestep_calibration(model, steps, every=3, samples=12, seed=1)
    assert found.counts == {9.0: 3, 6.0: 3, 3.0: 3, 0.0: 3}
    for time, batch in zip(found.timesteps, found.batches, strict=True):
        assert float(batch["timestep"]) == time
        recorded = next(step.batch["x"] for step in steps if step.timestep == time)
        assert all(any(torch.equal(x, r) for r in recorded) for x in batch["x"])
        assert len({x.sum().item() for x in batch["x"]}) == 3  # none twice
        assert call(model, batch).shape == (3, 2, 8, 8)
    same = timestep_calibration(model, steps, every=3, samples=12, seed=1)
    other = timestep_calibration(model, steps, every=3, samples=12, seed=2)
    assert batches_digest(found.batches) == batches_digest(same.batches)
    assert batches_digest(found.batches) != batches_digest(other.batches)


def test_density_and_diversity_choose_exactly_the_samples() -> None:
    model = tiny_unet()
    options: dict[str, Any] = {"method": "density_diversity", "radius": 0.01}
    found = timestep_calibration(model, sample_loop, samples=20, feature="mid", **options)
    assert sum(found.counts.values()) == 20
    steps = record_steps(model, sample_loop, feature="mid")
    counts = eda_dm([s.feature for s in steps if s.feature is not None], 20, 1.0, 0.01)
    assert [found.counts.get(s.timestep, 0) for s in steps] == counts.tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "unifrom"}, ("did you mean 'uniform'",)),
        ({"method": "density_diversity"}, ("feature='mid_block'",)),
        ({"samples": 400}, ("was recorded with 6", "at least 80")),
        ({"samples": 2}, ("raise samples",)),
        ({"samples": 0}, ("from 1 on",)),
    ],
)
def test_what_cannot_be_chosen_is_told(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        timestep_calibration(tiny_unet(), sample_loop, **options)
    for word in words:
        assert word in str(caught.value)


def test_no_steps_are_none() -> None:
    with pytest.raises(InvalidInputError, match="no steps"):
        timestep_calibration(tiny_unet(), [])
    assert isinstance(Step(1.0, torch.zeros(1)), Step)


def test_a_diffusion_model_is_searched_on_its_timesteps(tmp_path: Path) -> None:
    model = tiny_unet()
    found = mpq.timestep_calibration(model, sample_loop, samples=16)
    judged = mpq.timestep_calibration(model, sample_loop, samples=16, seed=1)
    result = mpq.search(
        model,
        found.batches,
        held_out=judged.batches,
        budgets=["memory <= 40%"],
        schemes=["int2", "int4", "int8"],
        divergence="mse",
        executor="serial",
        refine=0,
        storage=str(tmp_path / "runs.db"),
    )
    assert result.data["calibration"].startswith(f"given: {len(found.batches)} batches")
    assert set(result.allocation) >= {"mid", "up", "out"}
