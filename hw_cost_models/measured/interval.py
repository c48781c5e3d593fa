"""The time of a kernel from interleaved rounds, with an interval that a repetition believes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mpq.core.tables import Floats, Indices

Blocks = list[Indices]

MOST_BLOCKS = 12
# 97.5 % points of Student's t for 1 to 11 degrees of freedom.
_STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)
NORMAL = 1.960
_MAD_TO_SD = 1.4826  # of a normal distribution
_MEDIAN_TO_MEAN = 1.2533  # standard error of a median over that of a mean, normal distribution
_DRAWS = 200


class Estimate(NamedTuple):
    """Seconds of each kernel, and two half-widths of the 95 % interval of their logarithm."""

    seconds: Floats
    sampling: Floats
    drift: Floats

    def half_width(self, least_drift_sd: Floats | float = 0.0) -> Floats:
        """Return both errors in quadrature, the drift with at least this standard deviation."""
        half: Floats = np.hypot(self.sampling, np.maximum(self.drift, NORMAL * least_drift_sd))
        return half


def estimate(times: Floats, reference: Floats, *, seed: int = 0) -> Estimate:
    """Return the time of each kernel and what is uncertain about it.

    `times` is (rounds, kernels) and `reference` (rounds,), in seconds. The estimate is
    median over rounds (time / reference) * median over rounds (reference): ratios compare
    kernels at the same moment, so that two kernels stay comparable when the machine changes
    speed in the middle.

    Sampling: Student's t times the standard deviation of the estimate when blocks of successive
    rounds are drawn with replacement, ratio and reference together, so that slow disturbances
    are not taken for independent ones. Drift: 1.96 times what the median of a block varies
    beyond its own sampling error. It is not divided by the number of blocks, because how long a
    drift lasts is unknown and the next measurement may fall whole into another speed.
    """
    rounds = len(times)
    blocks = np.array_split(np.arange(rounds), min(MOST_BLOCKS, rounds))
    columns = np.column_stack([times / reference[:, None], reference])
    middle = np.median(columns, axis=0)
    draws = np.log(_redrawn_medians(columns, blocks, np.random.default_rng(seed)))
    # A bootstrap of k blocks underestimates the variance by (k - 1) / k.
    correction = np.sqrt(len(blocks) / (len(blocks) - 1))
    spread = (draws[:, :-1] + draws[:, -1:]).std(axis=0, ddof=1) * correction
    return Estimate(
        seconds=middle[:-1] * middle[-1],
        sampling=_STUDENT[len(blocks) - 2] * spread,
        drift=NORMAL * _drift(np.log(times), blocks),
    )


def _redrawn_medians(columns: Floats, blocks: Blocks, rng: np.random.Generator) -> Floats:
    """Return (draws, columns) medians over blocks that are drawn with replacement."""
    count = len(blocks)
    times_drawn = rng.multinomial(count, np.full(count, 1 / count), size=_DRAWS)
    block_of = np.repeat(np.arange(count), [len(block) for block in blocks])
    order = np.argsort(columns, axis=0)
    medians = np.empty((_DRAWS, columns.shape[1]))
    for j in range(columns.shape[1]):
        below = np.cumsum(times_drawn[:, block_of[order[:, j]]], axis=1)
        place = (2 * below >= below[:, -1:]).argmax(axis=1)
        medians[:, j] = columns[order[place, j], j]
    return medians


def _drift(logs: Floats, blocks: Blocks) -> Floats:
    medians = np.array([np.median(logs[block], axis=0) for block in blocks])
    spread = _MAD_TO_SD * np.median(np.abs(medians - np.median(medians, axis=0)), axis=0)
    inner = np.concatenate([np.abs(logs[b] - m) for b, m in zip(blocks, medians, strict=True)])
    length = len(logs) / len(blocks)
    own_error = _MEDIAN_TO_MEAN * _MAD_TO_SD * np.median(inner, axis=0) / np.sqrt(length)
    drift: Floats = np.sqrt(np.maximum(0.0, np.square(spread) - np.square(own_error)))
    return drift
