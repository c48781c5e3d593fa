"""Calibration samples where timesteps stand for many others, or are unlike them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from mpq.core.errors import InvalidInputError


def eda_dm(
    features: Sequence[torch.Tensor], samples: int, balance: float = 1.0, radius: float = 3.0
) -> npt.NDArray[np.int64]:
    """Return how many of `samples` each timestep gives, by the feature of the network at it.

    density_t = #{j: mse(f_t, f_j) <= radius}, diversity_t = sum_j (1 - cos(f_t, f_j)), both
    scaled to 0..1 over steps; shares are density + balance * diversity (Liu et al., "EDA-DM", and
    its code; radius 3.0 there for CIFAR). Counts add up to `samples` exactly: the largest
    remainders round up, our reading of how the code's remainder is spread. Where no step
    differs from another all have the same share. Costs T^2 products of features.
    """
    if samples < 1 or not len(features):
        raise InvalidInputError(
            "timestep",
            f"eda_dm takes features of steps and samples, got {len(features)}, {samples}",
        )
    if not balance >= 0 or not radius >= 0:
        raise InvalidInputError(
            "timestep", f"balance and radius are from 0 on, got {balance} and {radius}"
        )
    sizes = {feature.numel() for feature in features}
    if len(sizes) > 1 or 0 in sizes:
        raise InvalidInputError(
            "timestep", f"features of all steps have one size, got {sorted(sizes)} elements"
        )
    flat = torch.stack([feature.detach().flatten().double() for feature in features])
    if not torch.isfinite(flat).all():
        raise InvalidInputError("timestep", "a feature is not finite")
    mse = torch.stack([(flat - one).square().mean(1) for one in flat])
    unit = torch.nn.functional.normalize(flat, dim=1)
    density = (mse <= radius).sum(1).double()
    diversity = (1 - unit @ unit.T).sum(1)
    return _apportioned((_scaled(density) + balance * _scaled(diversity)).numpy(), samples)


def _scaled(values: torch.Tensor) -> torch.Tensor:
    low, high = values.min(), values.max()
    rounding = 1e-12 * len(values)  # of sums that are equal
    return (values - low) / (high - low) if high - low > rounding else torch.zeros_like(values)


def _apportioned(shares: npt.NDArray[np.float64], total: int) -> npt.NDArray[np.int64]:
    """Return whole numbers in proportion to shares with exactly this sum (largest remainders)."""
    if not shares.sum() > 0:
        shares = np.ones_like(shares)
    exact = total * shares / shares.sum()
    counts: npt.NDArray[np.int64] = np.floor(exact).astype(np.int64)
    left = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:left]] += 1
    return counts
