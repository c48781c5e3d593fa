"""Trust in pairs: kept where they are real, withdrawn where a few samples only seem to say so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mpq.core.problem import Budget, Problem
from mpq.core.tables import Responses, SensitivityTable
from solvers import solve
from solvers.trust import cross_validated
from tests.builders import cells, cost

UNITS, SCHEMES = 24, ("int2", "int3", "int4", "int6")


def problem(vectors: np.ndarray, slopes: np.ndarray | None = None) -> Problem:
    of = cells(UNITS, SCHEMES)
    responses = Responses(
        cells=of,
        vectors=vectors.astype(np.float32),
        slopes=None if slopes is None else slopes.astype(np.float32),
    )
    values, stderr = responses.own_scores()
    bits = cost(of)
    sizes = np.tile([2.0, 3, 4, 6], UNITS)
    return Problem(
        sensitivity=SensitivityTable(metric="made", cells=of, values=values, stderr=stderr),
        costs={"memory": type(bits).exact("memory", "bytes", of, sizes)},
        budgets=(Budget("memory", 3.5 * UNITS),),
        responses=responses,
    )


def drawn(samples: int, shared: float, seed: int = 0) -> np.ndarray:
    """Return responses whose units share a direction of the given strength, or none at all."""
    rng = np.random.default_rng(seed)
    of_unit = rng.normal(size=(UNITS, 1, samples, 2))
    common = rng.normal(size=(1, 1, samples, 2))
    signs = rng.choice([-1.0, 1.0], size=(UNITS, 1, 1, 1))
    sizes = np.array([1.0, 0.5, 0.25, 0.06])[None, :, None, None]
    found = sizes * (of_unit + shared * signs * common)
    return found.reshape(UNITS * len(SCHEMES), samples, 2)


def true_losses(samples: int, shared: float) -> dict[str, np.ndarray]:
    """Return what choices from a few samples lose on many others, for several draws."""
    found: dict[str, list[float]] = {"validated": [], "full": [], "none": []}
    for seed in range(8):
        vectors = drawn(samples + 2000, shared, seed)
        few = problem(vectors[:, :samples])
        many = problem(vectors[:, samples:]).responses
        assert few.responses is not None
        assert many is not None
        ways = {
            "validated": cross_validated(few),
            "full": few,
            "none": replace(few, responses=replace(few.responses, trust=0.0)),
        }
        for name, given in ways.items():
            allocation = solve(given, "pairs").allocation
            assert allocation is not None
            found[name].append(float(many.losses(allocation.choice(given.cells)).mean()))
    return {name: np.array(losses) for name, losses in found.items()}


def test_pairs_that_are_real_are_used() -> None:
    found = true_losses(samples=100, shared=2.0)
    assert found["full"].mean() < 0.9 * found["none"].mean()  # there is something to gain
    gain = found["none"] - found["validated"]
    assert gain.mean() > 2 * gain.std(ddof=1) / np.sqrt(len(gain))


def test_pairs_of_pure_noise_cost_less_than_without_validation() -> None:
    found = true_losses(samples=6, shared=0.0)
    assert found["none"].mean() < 0.97 * found["full"].mean()  # there is something to lose
    assert found["validated"].mean() < found["full"].mean()


def test_without_trust_the_choice_is_the_additive_optimum() -> None:
    given = problem(drawn(samples=8, shared=0.0))
    assert given.responses is not None
    alone = replace(given, responses=replace(given.responses, trust=0.0))
    assert solve(alone, "pairs").allocation == solve(alone, "ilp").allocation


@pytest.mark.parametrize("samples", [1, 3])
def test_too_few_samples_leave_the_trust_as_it_is(samples: int) -> None:
    given = problem(drawn(samples=samples, shared=1.0))
    assert cross_validated(given) is given


def test_the_loss_of_a_choice_is_the_square_of_the_sum_plus_the_slopes() -> None:
    rng = np.random.default_rng(1)
    vectors, slopes = rng.normal(size=(96, 5, 3)), rng.normal(size=(96, 5))
    given = problem(vectors, slopes).responses
    assert given is not None
    choice = np.arange(0, 96, 4) + rng.integers(0, 4, UNITS)
    slow = [
        np.mean([0.5 * sum(vectors[c, n, k] for c in choice) ** 2 for k in range(3)])
        + sum(slopes[c, n] for c in choice)
        for n in range(5)
    ]
    assert given.losses(choice) == pytest.approx(slow, rel=1e-4)
    assert given.of_samples(slice(1, None, 2)).losses(choice) == pytest.approx(slow[1::2], rel=1e-4)
