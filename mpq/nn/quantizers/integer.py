"""Integers of 1 to 8 bits: symmetric or with a zero point; per tensor, channel or group.

A symmetric b-bit weight is w ~ s q, q in [-2^(b-1), 2^(b-1) - 1], s = max|w| / (2^(b-1) - 1);
one bit has the two levels +-s/2 instead (a grid with a zero would have one level only).
An asymmetric one is w ~ s (q - z) with q in [0, 2^b - 1], and its range always holds zero.
Scales are rounded to IEEE half, as they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpq.core.formats import ChannelAxis, Format, PerChannel, PerGroup, channel_axes

_SMALLEST_SCALE = 2.0**-24  # of IEEE half; an all-zero group needs some scale
_LARGEST_SCALE = 65504.0
_BLOCK = 2**17  # elements

Range = tuple[torch.Tensor, torch.Tensor]  # smallest and largest value of each row, (rows, 1)


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """A stored weight: codes (rows, group), one scale and zero point per row, and its shape."""

    codes: torch.Tensor  # int16, (rows, group length); symmetric codes are signed
    scales: torch.Tensor  # float32 values of IEEE half, (rows, 1)
    zero_points: torch.Tensor | None  # int16, (rows, 1); None: symmetric
    fmt: Format
    shape: tuple[int, ...]
    channel_axis: ChannelAxis

    def dequantize(self) -> torch.Tensor:
        """Return the float32 weight that the codes stand for, in the original shape."""
        levels = _levels(self.codes.float(), self.fmt, self.zero_points)
        return _ungrouped(levels * self.scales, self.shape, self.channel_axis)


def quantize_weight(
    weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis = 0, limits: Range | None = None
) -> IntegerWeight:
    """Round `weight` to `fmt`, within `limits` of each row or else its smallest and largest value.

    Raises InvalidInputError where groups do not divide the weights of a channel.
    """
    fmt.num_scales(tuple(weight.shape), channel_axis)  # refuses groups that do not divide
    rows = _grouped(weight.detach().float(), fmt, channel_axis)
    low, high = limits or _range(rows, fmt)
    codes, scales, zero_points = _rounded(rows, low, high, fmt)
    if zero_points is not None:
        zero_points = zero_points.to(torch.int16)
    shape = tuple(weight.shape)
    return IntegerWeight(codes.to(torch.int16), scales, zero_points, fmt, shape, channel_axis)


def clip_range(weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis = 0) -> Range:
    """Return the range of each row with the least squared rounding error ("MSE clip").

    The smallest and largest value are shrunk together: 9 factors from 1.0 to 0.2, then four
    rounds that look on both sides of the best at half the distance.
    """
    fmt.num_scales(tuple(weight.shape), channel_axis)
    rows = _grouped(weight.detach().float(), fmt, channel_axis)
    block = max(1, _BLOCK // max(1, rows.shape[1]))  # so that a block stays in the cache
    found = [_least_error(part, fmt) for part in torch.split(rows, block)]
    low, high = (torch.cat(parts) for parts in zip(*found, strict=True))
    return low, high


_Rounded = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def _grouped(weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis) -> torch.Tensor:
    axes = channel_axes(channel_axis)
    by_channel = weight.movedim(axes, tuple(range(len(axes)))).flatten(0, len(axes) - 1)
    match fmt.granularity:
        case PerChannel():
            return by_channel.reshape(by_channel.shape[0], -1)
        case PerGroup(size):
            return by_channel.reshape(-1, size)
        case _:
            return by_channel.reshape(1, -1)


def _ungrouped(
    rows: torch.Tensor, shape: tuple[int, ...], channel_axis: ChannelAxis
) -> torch.Tensor:
    axes = channel_axes(channel_axis)
    moved = [*(shape[a] for a in axes), *(n for a, n in enumerate(shape) if a not in axes)]
    return rows.reshape(moved).movedim(tuple(range(len(axes))), axes).contiguous()


def _range(rows: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    if fmt.symmetric:
        largest = rows.abs().amax(1, keepdim=True)
        return -largest, largest
    return rows.amin(1, keepdim=True).clamp_max(0.0), rows.amax(1, keepdim=True).clamp_min(0.0)


def _levels(codes: torch.Tensor, fmt: Format, zero_points: torch.Tensor | None) -> torch.Tensor:
    if zero_points is not None:
        return codes - zero_points
    return codes + 0.5 if fmt.bits == 1 else codes


def _rounded(rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor, fmt: Format) -> _Rounded:
    steps = 2**fmt.bits - 1
    if fmt.symmetric:
        scale = _stored(high / max(2 ** (fmt.bits - 1) - 1, 1))
        if fmt.bits == 1:
            codes = torch.where(rows >= 0, 0.0, -1.0)
        else:
            codes = (rows / scale).round_().clamp_(-(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1)
        return codes, scale, None
    scale = _stored((high - low) / steps)
    zero = (-low / scale).round_().clamp_(0, steps)
    codes = (rows / scale + zero).round_().clamp_(0, steps)
    return codes, scale, zero


def _stored(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).half().float()


def _least_error(rows: torch.Tensor, fmt: Format) -> Range:
    low, high = _range(rows, fmt)
    factor = torch.ones_like(high)
    error = torch.full_like(high, torch.inf)

    def look(tried: torch.Tensor) -> None:
        nonlocal factor, error
        codes, scales, zero_points = _rounded(rows, low * tried, high * tried, fmt)
        off = _levels(codes, fmt, zero_points).mul_(scales).sub_(rows)
        tried_error = off.square_().sum(1, keepdim=True)
        better = tried_error < error
        factor = torch.where(better, tried, factor)
        error = torch.where(better, tried_error, error)

    step = 0.1
    for number in range(9):
        look(torch.full_like(high, 1.0 - number * step))
    for _ in range(4):
        step /= 2
        centre = factor
        look(centre - step)
        look((centre + step).clamp_max(1.0))
    return low * factor, high * factor


def fake_quantize_activation(
    values: torch.Tensor, fmt: Format, limits: tuple[float, float] | None = None
) -> torch.Tensor:
    """Return activations as an integer kernel sees them.

    `limits` is a calibrated range (static); without it each sample (first axis) takes its own
    range, as dynamic kernels do at batch one. The range always holds zero. Computed in float32
    or wider, as kernels do; the result has the dtype of `values`.
    """
    if fmt.is_native:
        return values
    dtype = values.dtype
    values = values.to(torch.promote_types(dtype, torch.float32))
    if limits is None:
        flat = values.flatten(1) if values.ndim > 1 else values.reshape(1, -1)
        shape = (-1,) + (1,) * (values.ndim - 1)
        low = flat.amin(1).clamp_max(0.0).reshape(shape)
        high = flat.amax(1).clamp_min(0.0).reshape(shape)
    else:
        low, high = values.new_tensor(limits[0]), values.new_tensor(limits[1])
    if fmt.symmetric:
        largest = torch.maximum(-low, high)
        top = max(2 ** (fmt.bits - 1) - 1, 1)
        scale = (largest / top).clamp_min(1e-12)
        rounded = (values / scale).round().clamp(-top - 1, top)
        return torch.mul(rounded, scale).to(dtype)
    steps = 2**fmt.bits - 1
    scale = ((high - low) / steps).clamp_min(1e-12)
    zero = (-low / scale).round()
    rounded = (values / scale + zero).round().clamp(0, steps)
    return torch.mul(rounded - zero, scale).to(dtype)
