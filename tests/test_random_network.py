"""Networks that draw random numbers in eval mode: warned of, with the same numbers every time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpq
from mpq.core.errors import MpqWarning
from tests.builders import mlp


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = mlp(6, 16, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.dropout(self.body(x), 0.3))  # in eval mode too


def search(model: nn.Module, data: list[torch.Tensor], **options: Any) -> mpq.SearchResult:
    settings: dict[str, Any] = {
        "storage": "sqlite://",
        "schemes": ["int3", "int8"],
        "budgets": ["memory <= 80%"],
        "executor": "serial",
    }
    with pytest.warns(MpqWarning, match="not deterministic"):
        return mpq.search(model, data, **(settings | options))


def numbers(generator_at: int, metric: str) -> list[np.ndarray]:
    torch.manual_seed(0)
    model = Dropping().eval()
    data = [torch.randn(8, 6) for _ in range(3)]
    torch.manual_seed(generator_at)
    state = torch.get_rng_state()
    result = search(
        model, data[:2], held_out=data[2:], metric=metric, evaluate=first_output, refine=1
    )
    assert torch.equal(torch.get_rng_state(), state)  # the user's generator is as it was
    evaluations = result.evaluation
    whole = [e.mean for e in evaluations if e.candidate == "unquantized"]
    assert whole == [0.0]  # both passes over a batch draw the same
    measured = [np.array([e.mean, *e.metrics.values()]) for e in evaluations]
    return [result.problem.sensitivity.values, *measured]


def first_output(model: nn.Module) -> dict[str, float]:
    return {"first": float(model(torch.ones(1, 6))[0, 0])}


@pytest.mark.parametrize(
    "metric",
    ["gauss_newton", "kl", "taylor", "gauss_newton_trace", "lrp", "hessian_trace", "sqnr"],
)
def test_numbers_do_not_depend_on_the_state_of_the_generator(metric: str) -> None:
    for one, other in zip(numbers(1, metric), numbers(2, metric), strict=True):
        np.testing.assert_array_equal(one, other)


def test_batches_draw_differently() -> None:
    torch.manual_seed(0)
    one = torch.ones(1, 6)
    data = [one, one + 1e-7]  # another content, hardly another input
    result = search(Dropping().eval(), data, metric="kl", budgets=["memory <= 100%"], refine=0)
    table = result.problem.sensitivity
    assert table.stderr[0] > 1e-3 * table.values[0]
