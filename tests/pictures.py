"""A network of which it is known what each layer moves, and searches for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import mpq
from mpq.core.evaluation import Evaluation
from mpq.core.problem import Allocation
from mpq.result import SearchResult
from mpq.store.store import Store


class Picture(nn.Module):
    """8x8 images: `layout` makes the mean of each 4x4 block, `texture` what has no such mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layout = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
        self.texture = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = F.interpolate(self.layout(x).reshape(-1, 1, 2, 2), scale_factor=4)
        fine = self.texture(x).reshape(-1, 1, 8, 8)
        return 30.0 * blocks + fine - F.interpolate(F.avg_pool2d(fine, 4), scale_factor=4)


def layout(z: torch.Tensor, y: torch.Tensor, batch: object) -> torch.Tensor:
    return (F.avg_pool2d(z, 4) - F.avg_pool2d(y, 4)).double().square().flatten(1).mean(1)


def texture(z: torch.Tensor, y: torch.Tensor, batch: object) -> torch.Tensor:
    change = (y - z).double()
    rest = change - F.interpolate(F.avg_pool2d(change, 4), scale_factor=4)
    return rest.square().flatten(1).mean(1)


QUALITY = {"layout": layout, "texture": texture}
GROUPS = {"layout": ["layout.*"], "texture": ["*"]}


def make_picture() -> nn.Module:
    torch.manual_seed(0)
    return Picture().eval()


def batches(count: int = 2, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 6, generator=generator) for _ in range(count)]


def search(store: Store, **options: Any) -> SearchResult:
    settings: dict[str, Any] = {
        "budgets": ["memory <= uniform int4"],
        "schemes": ["int2", "int3", "int4", "int6", "int8"],
        "executor": "serial",
        "quality": QUALITY,
        "refine": 0,
    }
    return mpq.search(make_picture(), batches(), storage=store, **(settings | options))


def on_calibration(result: SearchResult) -> dict[str, Evaluation]:
    return {e.candidate: e for e in result.evaluation if e.split == "calibration"}


def measured(name: str, mean: float = 1.0, **metrics: float) -> Evaluation:
    return Evaluation(
        candidate=name,
        split="calibration",
        allocation=Allocation({}),
        divergence="kl",
        mean=mean,
        stderr=0.0,
        metrics=metrics,
    )
