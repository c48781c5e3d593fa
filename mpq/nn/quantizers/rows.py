"""A weight as a matrix whose rows share a scale, and back."""

from __future__ import annotations

import torch

from mpq.core.granularity import ChannelAxis, Granularity, PerChannel, PerGroup, channel_axes


def channels_of(weight: torch.Tensor, channel_axis: ChannelAxis) -> torch.Tensor:
    """Return (output channels, weights of each)."""
    axes = channel_axes(channel_axis)
    by_channel = weight.movedim(axes, tuple(range(len(axes)))).flatten(0, len(axes) - 1)
    return by_channel.reshape(by_channel.shape[0], -1)


def rows_of(
    weight: torch.Tensor, granularity: Granularity, channel_axis: ChannelAxis
) -> torch.Tensor:
    """Return (scales, weights of each): a row for each tensor, channel or group."""
    rows = channels_of(weight, channel_axis)
    match granularity:
        case PerChannel():
            return rows
        case PerGroup(size):
            return rows.reshape(-1, size)
        case _:
            return rows.reshape(1, -1)


def from_rows(
    rows: torch.Tensor, shape: tuple[int, ...], channel_axis: ChannelAxis
) -> torch.Tensor:
    """Return the weight of a shape; inverse of `rows_of`."""
    axes = channel_axes(channel_axis)
    moved = [*(shape[a] for a in axes), *(n for a, n in enumerate(shape) if a not in axes)]
    return rows.reshape(moved).movedim(tuple(range(len(axes))), axes).contiguous()


def largest_of(rows: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of each row, (rows, 1)."""
    return torch.maximum(rows.amax(1, keepdim=True), -rows.amin(1, keepdim=True))
