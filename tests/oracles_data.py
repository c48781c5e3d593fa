"""The slow, obvious computations that calibration data is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def norm_distance(
    values: np.ndarray, mean: np.ndarray, std: np.ndarray, *, per_sample: bool
) -> float:
    """Squared distance of channel statistics of (samples, channels, positions), loop by loop."""
    samples, channels, positions = values.shape
    alone = [values[n : n + 1] for n in range(samples)]
    groups = alone if per_sample and positions > 1 else [values]
    total = 0.0
    for group in groups:
        for channel in range(channels):
            seen = [float(v) for v in group[:, channel].reshape(-1)]
            middle = sum(seen) / len(seen)
            var = sum((v - middle) ** 2 for v in seen) / len(seen)
            total += (middle - mean[channel]) ** 2
            total += (math.sqrt(var + 1e-6) - std[channel]) ** 2
    return total / len(groups)


def timestep_weights(features: Sequence[np.ndarray], balance: float, radius: float) -> list[float]:
    """EDA-DM: min-max normalised density plus `balance` times min-max normalised diversity."""
    density, diversity = [], []
    for one in features:
        near, far = 0, 0.0
        for other in features:
            near += float(np.mean((one - other) ** 2)) <= radius
            norms = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
            far += 1 - float(np.dot(one.ravel(), other.ravel())) / norms
        density.append(float(near))
        diversity.append(far)

    def scaled(values: list[float]) -> list[float]:
        low, high = min(values), max(values)
        differ = high - low > 1e-12 * len(values)  # more than sums of equal terms do
        return [(v - low) / (high - low) if differ else 0.0 for v in values]

    return [d + balance * v for d, v in zip(scaled(density), scaled(diversity), strict=True)]
