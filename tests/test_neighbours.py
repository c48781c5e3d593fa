"""Which layers hand their outputs to each other."""

from __future__ import annotations

import torch
from torch import nn

from mpq.deploy.marked import export_marked
from mpq.deploy.neighbours import neighbours
from tests.test_tails import Residual


class Stack(nn.Module):
    """Three sums in a row: what is two sums away is no neighbour."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return x


class Attention(nn.Module):
    """Queries, keys and values meet in the layer after them, and not each other."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1)
        return self.out(weights @ self.v(x))


def found(model: nn.Module, sample: torch.Tensor, names: list[str]) -> set[tuple[str, str]]:
    pairs = neighbours(export_marked(model, sample, names))
    assert len(pairs) == len(set(pairs))
    return set(pairs)


def test_a_residual_block() -> None:
    """`two` and `stem` are summed; the head reads both behind that sum."""
    names = ["stem", "one", "two", "head"]
    assert found(Residual(), torch.randn(1, 3, 8, 8), names) == {
        ("stem", "one"),
        ("one", "two"),
        ("two", "stem"),
        ("two", "head"),
        ("stem", "head"),
    }


def test_of_a_stream_only_the_nearest_are_neighbours() -> None:
    pairs = found(Stack(), torch.randn(2, 4), [f"layers.{i}" for i in range(4)])
    assert {("layers.0", "layers.1"), ("layers.1", "layers.2"), ("layers.2", "layers.3")} <= pairs
    assert ("layers.0", "layers.3") not in pairs


def test_what_meets_in_a_layer_are_neighbours_of_it_alone() -> None:
    pairs = found(Attention(), torch.randn(1, 3, 4), ["q", "k", "v", "out"])
    assert pairs == {("q", "out"), ("k", "out"), ("v", "out")}
