"""The calibration pipeline the slow and obvious way: loops over values, whole data at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def rounded(value: float, low: float, high: float, bits: int) -> float:
    """A value as asymmetric codes of a range read it back."""
    steps = 2**bits - 1
    scale = max((high - low) / steps, 1e-12)
    zero = round(-low / scale)
    return (min(max(round(value / scale + zero), 0), steps) - zero) * scale


def squared_error(values: Sequence[float], low: float, high: float, bits: int) -> float:
    return sum((rounded(v, low, high, bits) - v) ** 2 for v in values)


def kl_of_range(counts: Sequence[float], first: int, stop: int, levels: int) -> float:
    """KL of what is inside bins [first, stop), rest at the ends, from its merged form."""
    inside = [float(c) for c in counts[first:stop]]
    p = list(inside)
    p[0] += sum(counts[:first])
    p[-1] += sum(counts[stop:])
    q = [0.0] * len(p)
    for level in range(levels):
        bins = [i for i in range(len(p)) if i * levels // len(p) == level]
        filled = [i for i in bins if p[i] > 0]
        for i in filled:
            q[i] = sum(inside[j] for j in bins) / len(filled)
    total, kept = sum(p), sum(q)
    if any(a > 0 and b <= 0 for a, b in zip(p, q, strict=True)):
        return math.inf
    return sum(
        a / total * math.log((a / total) / (b / kept)) for a, b in zip(p, q, strict=True) if a > 0
    )


def outside(values: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """The share of values below and above a range."""
    return float((values < low).mean()), float((values > high).mean())


def mean_output_change(
    module: nn.Module, stored: torch.Tensor, inputs: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Mean over samples and positions of W x - Q(W) x, for each output channel."""
    changes = []
    for x in inputs:
        own = module.weight.detach().double()
        if isinstance(module, nn.Linear):
            change = F.linear(x.double(), own - stored.double()).reshape(-1, len(own))
        elif isinstance(module, nn.ConvTranspose2d):
            moved = F.conv_transpose2d(
                x.double(), own - stored.double(), None, module.stride, module.padding
            )
            change = moved.movedim(1, -1).reshape(-1, moved.shape[1])
        else:
            moved = module._conv_forward(x.double(), own - stored.double(), None)
            change = moved.movedim(1, -1).reshape(-1, moved.shape[1])
        changes.append(change)
    return torch.cat(changes).mean(0)
