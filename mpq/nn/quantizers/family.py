"""What a family of formats makes of weights."""

from __future__ import annotations

from typing import Protocol

import torch

from mpq.core.formats import Format
from mpq.core.granularity import ChannelAxis
from mpq.nn.quantizers.stored import LayerData, StoredWeight

Factor = torch.Tensor | float  # by which the range of each row is shrunk, (rows, 1)


class Family(Protocol):
    """Stores weights in its formats: one file of this package."""

    def store(
        self,
        weight: torch.Tensor,
        fmt: Format,
        channel_axis: ChannelAxis = 0,
        factor: Factor = 1.0,
        data: LayerData | None = None,
    ) -> StoredWeight:
        """Return codes and scales; ranges shrunk by `factor`, `data` used where there are some."""

    def fake_quantize(
        self, weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis, factor: Factor = 1.0
    ) -> torch.Tensor:
        """Return the weight as it reads back, float32."""

    def dequantize(self, stored: StoredWeight) -> torch.Tensor:
        """Return the float32 weight that codes stand for."""

    def pack(self, stored: StoredWeight) -> dict[str, torch.Tensor]:
        """Return the arrays of a file, by the names of `Format.parts`."""

    def unpack(
        self,
        arrays: dict[str, torch.Tensor],
        fmt: Format,
        shape: tuple[int, ...],
        channel_axis: ChannelAxis = 0,
    ) -> StoredWeight:
        """Return the stored weight of the arrays of a file; inverse of `pack`."""
