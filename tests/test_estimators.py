"""Trace estimators against exact traces and their own error bars; ghost norms against autograd."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mpq.core.errors import InvalidInputError
from sensitivity.estimators import (
    Estimate,
    ghost,
    hutchinson,
    hutchpp,
    squared_norms,
    summed_squares,
    weighted_squares,
)
from tests.oracles import sample_gradients

DIMENSION = 40
STUDENT = {11: 2.201, 31: 2.040}  # 97.5 % points, by degrees of freedom
SEEDS = 1000  # of a share of 95 % the standard deviation is then 0.7 %


def spectrum(name: str) -> torch.Tensor:
    """Return a symmetric matrix: positive and decaying, as of a network, or indefinite and flat."""
    generator = torch.Generator().manual_seed(1)
    basis, _ = torch.linalg.qr(
        torch.randn(DIMENSION, DIMENSION, generator=generator, dtype=torch.float64)
    )
    places = torch.arange(DIMENSION, dtype=torch.float64)
    values = 0.8**places if name == "decaying" else (places % 3 - 0.8)
    return basis @ values.diag() @ basis.T


Estimator = Callable[[torch.Tensor, int], Estimate]
ESTIMATORS: dict[str, Estimator] = {
    "hutchinson": lambda A, seed: hutchinson(A.mv, DIMENSION, seed=seed, draws=32),
    "hutchpp": lambda A, seed: hutchpp(A.mv, DIMENSION, seed=seed, products=36),
}


@pytest.mark.parametrize("matrix", ["decaying", "flat"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_error_bars_cover_as_often_as_they_say(name: str, matrix: str) -> None:
    A = spectrum(matrix)
    found = [ESTIMATORS[name](A, seed) for seed in range(SEEDS)]
    t = STUDENT[found[0].draws - 1]
    inside = sum(abs(e.mean - float(A.trace())) <= t * e.stderr for e in found)
    assert 0.92 <= inside / SEEDS <= 0.98
    mean = sum(e.mean for e in found) / SEEDS
    spread = math.sqrt(sum((e.mean - mean) ** 2 for e in found) / SEEDS / (SEEDS - 1))
    assert abs(mean - float(A.trace())) <= 4 * spread  # unbiased


def test_a_diagonal_matrix_takes_one_draw() -> None:
    diagonal = torch.arange(5.0, dtype=torch.float64)
    estimate = hutchinson(lambda v: diagonal * v, 5, seed=0, draws=3)
    assert (estimate.mean, estimate.stderr, estimate.draws) == (10.0, 0.0, 3)
    assert math.isinf(hutchinson(lambda v: diagonal * v, 5, seed=0, draws=1).stderr)


def test_the_variance_is_that_of_the_off_diagonal() -> None:
    A = spectrum("decaying") + torch.triu(spectrum("flat"))  # not symmetric
    draws = 4000
    estimate = hutchinson(A.mv, DIMENSION, seed=0, draws=draws)
    both = A + A.T
    exact = 0.5 * (both.square().sum() - both.diagonal().square().sum())
    assert draws * estimate.stderr**2 == pytest.approx(float(exact), rel=4 * math.sqrt(6 / draws))


def test_large_eigenvalues_are_taken_exactly() -> None:
    A = spectrum("decaying")
    few = [hutchpp(A.mv, DIMENSION, seed=seed, products=30) for seed in range(20)]
    plain = [hutchinson(A.mv, DIMENSION, seed=seed, draws=30) for seed in range(20)]
    assert sum(e.stderr for e in few) < 0.3 * sum(e.stderr for e in plain)
    whole = hutchpp(A.mv, DIMENSION, seed=0, products=3 * DIMENSION)
    assert whole.mean == pytest.approx(float(A.trace()))
    assert whole.stderr == 0


def test_a_zero_matrix_has_no_trace_and_no_error() -> None:
    for estimate in (
        hutchinson(torch.zeros_like, 7, seed=0, draws=9, precision=0.1),
        hutchpp(torch.zeros_like, 7, seed=0, products=9),
    ):
        assert estimate.mean == 0
        assert estimate.stderr == 0


@pytest.mark.parametrize("precision", [0.3, 0.1, 0.03])
def test_it_stops_when_its_own_error_is_small_enough(precision: float) -> None:
    A = spectrum("decaying")
    estimate = hutchinson(A.mv, DIMENSION, seed=2, draws=10_000, precision=precision)
    assert estimate.stderr <= precision * abs(estimate.mean)
    assert 8 <= estimate.draws < 10_000
    if estimate.draws > 8:  # not one draw too late
        before = hutchinson(A.mv, DIMENSION, seed=2, draws=estimate.draws - 1)
        assert before.stderr > precision * abs(before.mean)


def test_it_stops_at_its_limit() -> None:
    A = spectrum("flat")
    assert hutchinson(A.mv, DIMENSION, seed=0, draws=12, precision=1e-6).draws == 12


def test_numbers_that_mean_nothing_are_refused() -> None:
    for call, says in (
        (lambda: hutchinson(torch.zeros_like, 3, seed=0, draws=0), "draws .* got 0"),
        (lambda: hutchinson(torch.zeros_like, 3, seed=0, draws=9, precision=0), "0.03, got 0"),
        (lambda: hutchpp(torch.zeros_like, 3, seed=0, products=5), "at least 6 products, got 5"),
    ):
        with pytest.raises(InvalidInputError, match=says):
            call()


# --- ghost norms: module, shape of its input, samples (several entries a sample where fewer) ------

GHOSTS = {
    "linear": (lambda: nn.Linear(5, 4), (6, 5), 6),
    "tokens": (lambda: nn.Linear(5, 4), (6, 3, 5), 6),
    "long": (lambda: nn.Linear(2, 3), (2, 30, 5, 2), 2),
    "windows": (lambda: nn.Linear(5, 4), (6, 3, 5), 3),
    "shared": (lambda: nn.Linear(5, 4), (6, 5), 1),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (3, 4, 6, 5), 3),
    "strided": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2, dilation=2),
        (4, 4, 9, 8),
        4,
    ),
    "frames": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), (4, 4, 9, 8), 2),
    "same": (lambda: nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2), (2, 4, 9, 8), 2),
    "depthwise": (
        lambda: nn.Conv2d(4, 4, 3, padding=(1, 2), groups=4, padding_mode="circular"),
        (4, 4, 9, 8),
        4,
    ),
    "no batch": (lambda: nn.Conv2d(4, 6, 3), (4, 9, 8), 1),
    "conv1d": (
        lambda: nn.Conv1d(4, 6, 4, padding=2, stride=3, groups=2, padding_mode="reflect"),
        (4, 4, 11),
        4,
    ),
    "uneven": (lambda: nn.Conv1d(4, 6, 4, padding="same"), (4, 4, 11), 4),
    "one position": (lambda: nn.Conv1d(4, 6, 11), (4, 4, 11), 4),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (4, 4, 5, 4),
        4,
    ),
    "gaps": (
        lambda: nn.ConvTranspose2d(
            4, 6, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(2, 1)
        ),
        (4, 4, 5, 4),
        2,
    ),
    "cut": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, padding=2), (4, 4, 5, 4), 2),
    "words": (lambda: nn.Embedding(7, 3), (4, 5), 4),
}


def check_against_one_by_one(calls: list[ghost.LayerCall], samples: int) -> None:
    slow = sum(sample_gradients(*call, samples) for call in calls)
    assert isinstance(slow, torch.Tensor)
    torch.testing.assert_close(squared_norms(calls, samples), slow.flatten(2).square().sum(2))
    weights = torch.rand(4, *slow.shape[2:], dtype=slow.dtype)
    torch.testing.assert_close(
        weighted_squares(calls, weights, samples),
        torch.einsum("rni,ci->rnc", slow.flatten(2).square(), weights.flatten(1)),
    )
    torch.testing.assert_close(summed_squares(calls, samples), slow.square().sum(1))


def called(module: nn.Module, inputs: torch.Tensor, rows: int = 3) -> ghost.LayerCall:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        output = module(inputs)
    return module, inputs, torch.randn(rows, *output.shape, dtype=torch.float64)


@pytest.mark.parametrize("cheaper", [True, False, None], ids=["ghost", "formed", "chosen"])
@pytest.mark.parametrize("name", GHOSTS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_squares_of_gradients_are_those_of_one_sample_at_a_time(
    name: str, cheaper: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cheaper is not None:
        monkeypatch.setattr(ghost._Factors, "norms_are_cheaper", property(lambda _: cheaper))
    make, shape, samples = GHOSTS[name]
    module = make().double()
    words = isinstance(module, nn.Embedding)
    inputs = torch.randint(0, 7, shape) if words else torch.randn(*shape, dtype=torch.float64)
    check_against_one_by_one([called(module, inputs)], samples)


def test_norms_are_those_of_vmap() -> None:
    module, inputs, gradient = called(
        nn.Conv2d(3, 4, 3, padding=1).double(), torch.randn(5, 3, 6, 6, dtype=torch.float64), 1
    )
    weight = module.weight.detach()

    def through(weight: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        output = torch.func.functional_call(module, {"weight": weight}, (x.unsqueeze(0),))
        return (output[0] * g).sum()

    slow = torch.func.vmap(torch.func.grad(through), (None, 0, 0))(weight, inputs, gradient[0])
    torch.testing.assert_close(
        squared_norms([(module, inputs, gradient)], 5)[0], slow.flatten(1).square().sum(1)
    )


@pytest.mark.parametrize("elements", [1, 200, 2**25])
def test_samples_are_worked_on_as_many_as_fit(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ghost, "_ELEMENTS", elements)
    module = nn.Conv2d(4, 6, 3, padding=1).double()
    check_against_one_by_one([called(module, torch.randn(5, 4, 6, 5).double())], 5)


def test_gradients_of_all_calls_add_before_they_are_squared() -> None:
    layer = nn.Linear(3, 7, bias=False).double()
    twin = nn.Embedding(7, 3).double()
    twin.weight = layer.weight
    calls = [
        called(layer, torch.randn(4, 2, 3).double()),
        called(layer, torch.randn(4, 5, 3).double()),
        called(twin, torch.randint(0, 7, (4, 6))),
    ]
    check_against_one_by_one(calls, 4)


def test_the_cheaper_way_depends_on_the_positions() -> None:
    def cheaper(positions: int) -> bool:
        module = nn.Linear(64, 64)
        call = module, torch.randn(1, positions, 64), torch.randn(2, 1, positions, 64)
        return next(ghost._chunks([call], 1)).norms_are_cheaper

    assert [cheaper(positions) for positions in (1, 4, 16, 128, 512)] == [True] * 3 + [False] * 2


def test_half_precision_is_squared_in_single() -> None:
    module = nn.Linear(5, 4).to(torch.bfloat16)
    inputs, gradient = (torch.full((2, 5), 1e-3).to(torch.bfloat16), torch.full((1, 2, 4), 1e-3))
    found = squared_norms([(module, inputs, gradient.to(torch.bfloat16))], 2)
    assert found.dtype == torch.float32
    assert found[0, 0] == pytest.approx(20e-12, rel=0.02)


def test_a_layer_without_a_known_gradient_is_an_error() -> None:
    with pytest.raises(TypeError, match="Bilinear"):
        squared_norms([(nn.Bilinear(2, 2, 2), torch.ones(1, 2), torch.ones(1, 1, 2))], 1)
