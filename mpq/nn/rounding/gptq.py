"""GPTQ: each input's rounding error is made good by the inputs that are still to be rounded.

Frantar et al. 2022 (2210.17323). Let H = 2 X^T X with 1 % of its mean diagonal added to it, U the
upper Cholesky factor of its inverse. For input j = 1, 2, ... in order, all output channels at once,

    q_j = nearest(w_j),   e = (w_j - q_j) / U_jj,   w_i -= e U_ji   for i > j,

which minimises tr(dW H dW^T), the squared change of the outputs, one input at a time.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mpq.core.errors import InvalidInputError
from mpq.core.formats import Format
from mpq.core.granularity import ChannelAxis, PerGroup, PerTensor
from mpq.nn.quantizers import grid_of
from mpq.nn.quantizers.family import Factor
from mpq.nn.quantizers.grid import OnGrid, Scales
from mpq.nn.quantizers.rows import channels_of
from mpq.nn.quantizers.stored import LayerData, StoredWeight

_BLOCK = 128  # inputs after which the rest of the weight hears of the errors
_DAMPING = 0.01  # of the mean diagonal


def gptq(
    weight: torch.Tensor,
    fmt: Format,
    channel_axis: ChannelAxis = 0,
    factor: Factor = 1.0,
    data: LayerData | None = None,
) -> StoredWeight:
    """Store a weight on the grid of its format, rounded by GPTQ.

    `data.gram` is (n, n) for n weights of an output channel, or (G, n, n) for G groups of a
    convolution. A scale of a channel or a tensor is that of the weight as it was; one of a group
    is that of the group's weights when it is its turn, shrunk by the same `factor`, but where
    scales share something (a tensor scale) all are of the weight as it was. An input that is
    always zero is rounded to nearest. A channel whose squared change of outputs is not lower
    than by rounding to nearest keeps that, scales included: no channel is ever worse.

    Raises InvalidInputError (`rounding`) for a format without a grid. Cost: a Cholesky factor of
    n^3 in float64, then n^2 multiplications for each output channel.
    """
    plain = fmt.as_stored
    grid = grid_of(plain)
    if grid is None or data is None or data.gram is None:
        what = "is not on a grid" if grid is None else "needs the Gram of the layer's inputs"
        raise InvalidInputError(
            "rounding", f"{fmt.text('weights')}: {plain.text('weights')} {what}"
        )
    channels = channels_of(weight.detach().float(), channel_axis)
    nearest = grid.store(weight, plain, channel_axis, factor)
    gram = data.gram if data.gram.ndim == 3 else data.gram.unsqueeze(0)
    gram = gram.to(channels.device)
    levels, scales = _rounded(channels, grid, plain, factor, _inverse_factor(gram))
    found = grid.of_levels(levels, scales, fmt, nearest.shape, channel_axis)
    return _better(weight, found, nearest, gram, grid)


def squared_change(delta: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Return tr(dW X^T X dW^T) of each output channel, (channels,), float64.

    `delta` is (channels, n); `gram` (n, n), or (G, n, n) of G groups of channels.
    """
    gram = (gram if gram.ndim == 3 else gram.unsqueeze(0)).double()
    grouped = delta.double().reshape(len(gram), -1, delta.shape[1])
    return (torch.matmul(grouped, gram) * grouped).sum(-1).flatten()


def _inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """Return U of each Gram, the upper Cholesky factor of the damped inverse, float32."""
    hessian = 2.0 * gram.double()
    diagonal = torch.diagonal(hessian, dim1=1, dim2=2)
    dead = diagonal <= 0
    added = torch.where(dead, 1.0, _DAMPING * diagonal.mean(1, keepdim=True))
    diagonal.add_(added)
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed.any():
            break
        diagonal.add_(added)  # float32 sums of inputs that nearly depend on each other
    inverse = torch.cholesky_inverse(lower)
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def _rounded(
    channels: torch.Tensor, grid: OnGrid, fmt: Format, factor: Factor, upper: torch.Tensor
) -> tuple[torch.Tensor, Scales]:
    """Return levels (rows, weights that share a scale) and the scales of the rows."""
    count, inputs = channels.shape
    size = fmt.granularity.size if isinstance(fmt.granularity, PerGroup) else inputs
    whole = isinstance(fmt.granularity, PerTensor)
    rows = channels.reshape(1, -1) if whole else channels.reshape(-1, size)
    scales = grid.grid.scales(rows, fmt, factor)
    late = isinstance(fmt.granularity, PerGroup) and scales.shared is None
    factors = factor.reshape(count, -1) if isinstance(factor, torch.Tensor) and late else None
    # (channels, groups) or (1, 1); contiguous columns are faster: inputs come first below
    scale = scales.scale.reshape(1 if whole else count, -1).T.contiguous()
    zero = None if scales.zero is None else scales.zero.reshape(scale.T.shape).T.contiguous()
    groups = len(upper)
    left = channels.reshape(groups, -1, inputs).permute(2, 0, 1).contiguous()  # (n, G, channels)
    levels = torch.empty_like(left)
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        errors = left.new_empty(stop - start, *left.shape[1:])
        block = left[start:stop]
        inner = upper[:, start:stop, start:stop]
        for j in range(start, stop):
            group, at = j // size, j - start
            if late and j % size == 0:
                # Errors of this block have not reached what lies behind it.
                now = _group_now(left, upper, errors, start, at, stop, j + size)
                own = factor if factors is None else factors[:, group : group + 1]
                own_scales = grid.grid.scales(now.reshape(size, -1).T.contiguous(), fmt, own)
                scale[group] = own_scales.scale.squeeze(1)
                if zero is not None and own_scales.zero is not None:
                    zero[group] = own_scales.zero.squeeze(1)
            s = scale[0 if whole else group]
            z = None if zero is None else zero[0 if whole else group].unsqueeze(1)
            column = block[at].flatten()
            level = grid.grid.nearest((column / s).unsqueeze(1), z, fmt).squeeze(1)
            levels[j] = level.reshape(levels[j].shape)
            error = (column - level * s).reshape(groups, -1) / inner[:, at, at].unsqueeze(1)
            errors[at] = error
            if j + 1 < stop:
                step = inner[:, at, at + 1 :].T.unsqueeze(2)
                block[at + 1 :] -= step * error
        if stop < inputs:
            behind = upper[:, start:stop, stop:]
            left[stop:] -= torch.einsum("gbr,bgc->rgc", behind, errors)
    back = levels.permute(1, 2, 0).reshape(rows.shape)
    scale = scale.T.reshape(-1, 1).contiguous()
    return back, Scales(scale, None if zero is None else zero.T.reshape(-1, 1), scales.shared)


def _group_now(
    left: torch.Tensor,
    upper: torch.Tensor,
    errors: torch.Tensor,
    start: int,
    at: int,
    stop: int,
    end: int,
) -> torch.Tensor:
    """Return a group's weights with the errors of all inputs before it."""
    first = start + at
    now = left[first:end]
    if end > stop and at:
        behind = upper[:, start:first, stop:end]
        late = left[stop:end] - torch.einsum("gbr,bgc->rgc", behind, errors[:at])
        now = torch.cat([left[first:stop], late])
    return now


def _better(
    weight: torch.Tensor,
    found: StoredWeight,
    nearest: StoredWeight,
    gram: torch.Tensor,
    grid: OnGrid,
) -> StoredWeight:
    """Return the better of both for each output channel."""
    axis = found.channel_axis
    channels = channels_of(weight.detach().float(), axis)
    wins = [
        squared_change(channels_of(grid.dequantize(stored), axis) - channels, gram)
        for stored in (found, nearest)
    ]
    lower = wins[0] < wins[1]
    of_rows = lower.repeat_interleave(max(1, len(found.scales) // len(channels))).unsqueeze(1)
    whole = len(found.scales) == 1 and len(channels) > 1
    of_codes = lower.unsqueeze(1) if whole else of_rows
    shape = (len(channels), -1) if whole else found.codes.shape
    codes = torch.where(of_codes, found.codes.reshape(shape), nearest.codes.reshape(shape))
    zero = found.zero_points
    if not whole:
        scales = torch.where(of_rows, found.scales, nearest.scales)
        if zero is not None and nearest.zero_points is not None:
            zero = torch.where(of_rows, zero, nearest.zero_points)
    else:
        scales = found.scales
    return replace(found, codes=codes.reshape(found.codes.shape), scales=scales, zero_points=zero)
