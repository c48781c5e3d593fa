"""Slow and obvious computations that roundings and layer data are compared with."""

from __future__ import annotations

import torch
from torch import nn

from mpq.core.formats import Format
from mpq.nn.quantizers.grid import OnGrid


def plain_gptq(
    weight: torch.Tensor, gram: torch.Tensor, fmt: Format, grid: OnGrid, size: int, factor: float
) -> torch.Tensor:
    """Return a (channels, n) weight as it reads back, an input at a time in float64.

    The update of the rest is that of an optimal brain surgeon, from the inverse of the Hessian of
    the inputs that are left; scales of `size` weights are made when it is their turn.
    """
    hessian = 2.0 * gram.double()
    diagonal = hessian.diagonal().clone()
    added = torch.where(diagonal <= 0, 1.0, 0.01 * diagonal.mean())
    hessian = hessian + torch.diag(added)
    left, back = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    for j in range(weight.shape[1]):
        if j % size == 0:
            scales = grid.grid.scales(left[:, j : j + size].float(), fmt, factor)
        scale = scales.scale.double()
        zero = None if scales.zero is None else scales.zero.double()
        level = grid.grid.nearest(left[:, j : j + 1] / scale, zero, fmt)
        back[:, j : j + 1] = level * scale
        inverse = torch.linalg.inv(hessian[j:, j:])
        error = (left[:, j] - back[:, j]) / inverse[0, 0]
        left[:, j:] -= error.unsqueeze(1) * inverse[0].unsqueeze(0)
    return back


def patches(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """Return what each group of a convolution reads at each place, (groups, places, n)."""
    (ph, pw), (sh, sw), (dh, dw) = conv.padding, conv.stride, conv.dilation  # type: ignore[misc]
    kh, kw = conv.kernel_size
    padded = nn.functional.pad(x, (pw, pw, ph, ph))
    height = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    share = x.shape[1] // conv.groups
    found = [
        [
            padded[
                s,
                g * share : (g + 1) * share,
                i * sh : i * sh + dh * (kh - 1) + 1 : dh,
                j * sw : j * sw + dw * (kw - 1) + 1 : dw,
            ].flatten()
            for s in range(len(x))
            for i in range(height)
            for j in range(width)
        ]
        for g in range(conv.groups)
    ]
    return torch.stack([torch.stack(rows) for rows in found])
