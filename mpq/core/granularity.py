"""Where the scales of a tensor are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpq.core.errors import InvalidInputError

ChannelAxis = int | tuple[int, ...]  # of several axes each combination is an output channel


def channel_axes(axis: ChannelAxis) -> tuple[int, ...]:
    """Return the axes that count output channels."""
    return (axis,) if isinstance(axis, int) else axis


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor (activations: of one sample)."""


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale for each output channel."""


@dataclass(frozen=True, slots=True)
class PerGroup:
    """One scale for each run of `size` consecutive weights of one output channel."""

    size: int


Granularity = PerTensor | PerChannel | PerGroup


def matrix_of(shape: tuple[int, ...], channel_axis: ChannelAxis) -> tuple[int, int]:
    """Return (output channels, weights of each) of a tensor."""
    channels = math.prod(shape[axis] for axis in channel_axes(channel_axis))
    return channels, math.prod(shape) // channels if channels else 0


def num_scales(
    granularity: Granularity, shape: tuple[int, ...], channel_axis: ChannelAxis = 0
) -> int:
    """Return how many scales a tensor of `shape` needs.

    Raises InvalidInputError (`group_size`) where groups do not divide a channel's weights.
    """
    channels, per_channel = matrix_of(shape, channel_axis)
    match granularity:
        case PerTensor():
            return 1
        case PerChannel():
            return channels
        case PerGroup(size):
            if per_channel % size:
                raise InvalidInputError(
                    "group_size",
                    f"group size {size} does not divide the {per_channel} weights of an "
                    f"output channel (shape {list(shape)})",
                )
            return channels * (per_channel // size)
