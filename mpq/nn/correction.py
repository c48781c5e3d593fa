"""What rounding a weight moves the mean of a layer's output by, and the bias that takes it back."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mpq.core.formats import ChannelAxis, channel_axes
from mpq.core.layers import LayerName

# For each layer the mean of what one output position reads, in a shape that broadcasts against the
# weight: (1, inputs) of a linear layer, (1, channels, height, width) of a convolution.
InputMeans = Mapping[LayerName, torch.Tensor]


def bias_correction(
    delta: torch.Tensor, mean: torch.Tensor, channel_axis: ChannelAxis
) -> torch.Tensor:
    """Return -E[(Q(W) - W) x] of each output channel, in the dtype of `delta`.

    `delta` is Q(W) - W, `mean` is E[x] (InputMeans). Banner et al. 2018; Nagel et al. 2019,
    Data-Free Quantization, eq. 18.
    """
    (axis,) = channel_axes(channel_axis)
    other = tuple(a for a in range(delta.ndim) if a != axis)
    moved = (delta.double() * mean.to(delta.device, torch.float64)).sum(other)
    return -moved.to(delta.dtype)
