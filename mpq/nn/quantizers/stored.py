"""A weight as a format stores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from mpq.core.formats import Format
from mpq.core.granularity import ChannelAxis


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """The codes of a weight and all that is needed to read them.

    `extra` holds what a family keeps beside codes, scales and zero points: a tensor scale, an
    order of inputs, codebooks, masks, outliers, the factors of a branch.
    """

    codes: torch.Tensor  # int16, (rows, weights that share a scale); of integers signed
    scales: torch.Tensor  # float32 values as they are stored, (rows, 1)
    zero_points: torch.Tensor | None  # int16, (rows, 1); None: there are none
    fmt: Format
    shape: tuple[int, ...]
    channel_axis: ChannelAxis
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def dequantize(self) -> torch.Tensor:
        """Return the float32 weight that the codes stand for, in the original shape."""
        from mpq.nn.quantizers import family_of

        return family_of(self.fmt).dequantize(self)

    def pack(self) -> dict[str, torch.Tensor]:
        """Return the arrays that a file holds, by the names of `Format.parts`."""
        from mpq.nn.quantizers import family_of

        return family_of(self.fmt).pack(self)


@dataclass(frozen=True, slots=True)
class LayerData:
    """What calibration data say of a layer, for formats and roundings that use it.

    `gram` is X^T X over all inputs X (positions, inputs); `outputs` the mean square of the loss's
    gradient at each output channel; `fisher` that of each weight, in the weight's shape.
    """

    gram: torch.Tensor | None = None  # (weights of a channel, same), float32
    outputs: torch.Tensor | None = None  # (output channels,)
    fisher: torch.Tensor | None = None
