"""Networks that switch gradients off inside: refused in one line, or scored without gradients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import mpq
from mpq.core.errors import InvalidInputError
from mpq.store.store import Store, open_store
from tests.builders import mlp


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened


class FrozenBody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = mlp(6, 8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.body(x)
        return self.head(x)


class FrozenWhole(FrozenBody):
    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def search(store: Store, model: type[nn.Module], metric: str, **options: object) -> object:
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "schemes": ["int3", "int8"],
        "budgets": ["memory <= 80%"],
        "executor": "serial",
        "metric": metric,
    }
    data = [torch.randn(8, 6) for _ in range(2)]
    return mpq.search(model().eval(), data, storage=store, **(settings | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [FrozenBody, FrozenWhole])
@pytest.mark.parametrize("metric", ["gauss_newton", "gauss_newton_trace", "taylor", "fisher"])
def test_a_metric_with_gradients_refuses_in_one_line(
    store: Store, model: type[nn.Module], metric: str
) -> None:
    with pytest.raises(InvalidInputError, match=r"^layer 'body.0' runs with gradients off") as got:
        search(store, model, metric)
    assert got.value.code == "no_gradient"
    assert "\n" not in str(got.value)


@pytest.mark.parametrize("model", [FrozenBody, FrozenWhole])
@pytest.mark.parametrize("metric", ["kl", "sqnr", "higgs", "weight_error"])
def test_a_metric_without_gradients_goes_on_without_refinement(
    store: Store, model: type[nn.Module], metric: str
) -> None:
    result = search(store, model, metric)
    assert isinstance(result, mpq.SearchResult)
    assert result.problem.sensitivity.values.any()
    (event,) = [e for e in store.events(result.run_id) if e.kind == "not refined"]
    assert "layer 'body.0' runs with gradients off" in event.message


def test_the_frozen_part_may_be_left_out(store: Store) -> None:
    result = search(store, FrozenBody, "gauss_newton", skip=["body.*"], budgets=["memory <= 99.5%"])
    assert isinstance(result, mpq.SearchResult)
    assert set(result.allocation) == {"head"}
