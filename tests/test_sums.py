"""Exact sums of many numbers against `math.fsum`."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpq.core.sums import exact_sum


@pytest.mark.parametrize("count", [0, 1, 7, 4095, 4096, 100_003])
@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1.0, 1e12, 1e290])
@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0])
def test_it_is_the_correctly_rounded_sum(count: int, scale: float, spread: float) -> None:
    rng = np.random.default_rng(count)
    values = scale * rng.normal(size=count) * np.exp(np.minimum(rng.normal(0, spread, count), 15))
    assert exact_sum(values) == math.fsum(values)


def test_what_cancels_is_not_lost() -> None:
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(0, 40, 50_000))
    both = np.concatenate([values, -values, [1e-30]])
    rng.shuffle(both)
    assert exact_sum(both) == 1e-30


def test_integers_and_zeros() -> None:
    assert exact_sum(np.zeros(10_000)) == 0.0
    assert exact_sum(np.arange(1e6)) == 499999500000.0
