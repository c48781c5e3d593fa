"""A small network whose every pass takes a moment, as entry points for jobs of other processes."""

from __future__ import annotations

import os
import time

import torch
from torch import nn


class Slow(nn.Module):
    """Sleeps as long as MPQ_TEST_SLEEP says before it runs."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.Linear(12, 5)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(float(os.environ.get("MPQ_TEST_SLEEP", "0")))
        return self.layers(x)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return Slow().eval()


def make_deep() -> nn.Module:
    """A network of many layers, for pages to show."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(8, 32)]
    for width in (32, 48, 32) * 4:
        layers += [nn.ReLU(), nn.Linear(layers[-1].out_features, width)]  # type: ignore[arg-type]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(32, 5)).eval()


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 8, generator=generator) for _ in range(10)]


def broken() -> nn.Module:
    raise RuntimeError("the weights are gone")
