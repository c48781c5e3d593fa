"""Calibration batches of a diffusion model, chosen over its timesteps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mpq.core.errors import InvalidInputError, unknown
from mpq.nn.batches import Batch, num_samples
from mpq.nn.timesteps.eda_dm import eda_dm
from mpq.nn.timesteps.q_diffusion import q_diffusion
from mpq.nn.timesteps.recording import Step, record_steps

_STEPS = 8
_METHODS = ("uniform", "density_diversity")


@dataclass(frozen=True, slots=True)
class TimestepBatches:
    """Batches for a search, one a timestep that gives samples, and the times they are of."""

    batches: tuple[Batch, ...]
    timesteps: tuple[float, ...]

    @property
    def counts(self) -> dict[float, int]:
        """How many samples each timestep gives."""
        return dict(zip(self.timesteps, map(num_samples, self.batches), strict=True))


def timestep_calibration(
    model: nn.Module,
    trajectories: Callable[[nn.Module], object] | Sequence[Step],
    *,
    method: Literal["uniform", "density_diversity"] = "uniform",
    samples: int = 64,
    every: int | None = None,
    feature: str | None = None,
    balance: float = 1.0,
    radius: float = 3.0,
    timestep: str | None = None,
    seed: int = 0,
) -> TimestepBatches:
    """Choose calibration samples of a diffusion model over its timesteps.

    `trajectories` is `sample_loop(model)`, which samples some images and is recorded
    (`record_steps`), or what was recorded. "uniform" takes equally many samples at each
    `every`-th step (default: at most eight steps), as many as `samples` allows (Q-Diffusion);
    "density_diversity" exactly `samples`, more where the `feature`, a module such as the middle
    block, stands for many other
    steps or is unlike them (EDA-DM; `balance`, `radius`). Which samples of a step is drawn by
    `seed`, without repeating. `mpq.search(model, found.batches, ...)` takes the batches. Raises
    InvalidInputError (`timestep`) where a step has fewer samples than its count.
    """
    if method not in _METHODS:
        raise unknown("method", method, _METHODS)
    if samples < 1:
        raise InvalidInputError("timestep", f"samples is a whole number from 1 on, got {samples}")
    steps = list(
        record_steps(model, trajectories, timestep=timestep, feature=feature, seed=seed)
        if callable(trajectories)
        else trajectories
    )
    if not steps:
        raise InvalidInputError("timestep", "there are no steps: record some with record_steps")
    if method == "uniform":
        every = every or -(-len(steps) // _STEPS)
        per_step = samples // len(range(0, len(steps), every))
        if per_step < 1:
            raise InvalidInputError(
                "timestep",
                f"{samples} samples are not one for each of the steps: raise samples, or every, "
                f"which is {every}",
            )
        counts = q_diffusion(len(steps), every, per_step)
    else:
        features = [step.feature for step in steps if step.feature is not None]
        if len(features) < len(steps):
            raise InvalidInputError(
                "timestep",
                "density_diversity compares a feature of the steps: name a module, for example "
                "feature='mid_block'",
            )
        counts = eda_dm(features, samples, balance, radius)
    return _selected(steps, counts, seed)


def _selected(steps: Sequence[Step], counts: npt.NDArray[np.int64], seed: int) -> TimestepBatches:
    generator = torch.Generator().manual_seed(seed)
    batches, times = [], []
    for step, count in zip(steps, counts.tolist(), strict=True):
        total = num_samples(step.batch)
        if count > total:
            raise InvalidInputError(
                "timestep",
                f"step {step.timestep:g} gives {count} samples and was recorded with {total}: let "
                f"the sample loop make at least {int(counts.max())} images, or ask for fewer",
            )
        places = torch.randperm(total, generator=generator)[:count].sort().values
        if count:
            batches.append(_taken(step.batch, places, total))
            times.append(step.timestep)
    return TimestepBatches(tuple(batches), tuple(times))


def _taken(batch: Batch, places: torch.Tensor, total: int) -> Batch:
    def part(value: Any) -> Any:
        is_samples = isinstance(value, torch.Tensor) and value.ndim and len(value) == total
        return value[places.to(value.device)] if is_samples else value

    if isinstance(batch, torch.Tensor):
        return part(batch)
    if isinstance(batch, dict):
        return {key: part(value) for key, value in batch.items()}
    return tuple(part(value) for value in batch)
