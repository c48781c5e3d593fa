"""A format of groups whose inputs are sorted by norm first, so that outliers share groups.

The columns of the (output channels, weights of each) matrix are stored by falling norm, as block
floating point accelerators sort channels (our reading of BFP with channel sorting: sorting by the
norm of all weights that an input meets), and their order beside them, an index for each column.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mpq.core.format_parts import index_bits
from mpq.core.formats import Format
from mpq.core.granularity import ChannelAxis, matrix_of
from mpq.nn.quantizers.bit_streams import from_index_stream, to_index_stream
from mpq.nn.quantizers.family import Factor
from mpq.nn.quantizers.grid import OnGrid
from mpq.nn.quantizers.rows import channels_of, from_rows
from mpq.nn.quantizers.stored import LayerData, StoredWeight


@dataclass(frozen=True, slots=True)
class Reordered:
    """A family on a grid, the columns in another order; `extra` holds "order" (int64)."""

    inner: OnGrid

    def store(
        self,
        weight: torch.Tensor,
        fmt: Format,
        channel_axis: ChannelAxis = 0,
        factor: Factor = 1.0,
        data: LayerData | None = None,
    ) -> StoredWeight:
        """Sort columns by norm, then round to nearest; cost: a sort of one number a column.

        Raises InvalidInputError where groups do not divide the weights of a channel.
        """
        fmt.num_scales(tuple(weight.shape), channel_axis)  # names the shape of the weight
        matrix = channels_of(weight.detach().float(), channel_axis)
        order = torch.linalg.vector_norm(matrix, dim=0).argsort(descending=True, stable=True)
        stored = self.inner.store(matrix[:, order], fmt, 0, factor)
        extra = {**stored.extra, "order": order}
        return replace(stored, shape=tuple(weight.shape), channel_axis=channel_axis, extra=extra)

    def fake_quantize(
        self, weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis, factor: Factor = 1.0
    ) -> torch.Tensor:
        """Return `store(...).dequantize()`."""
        return self.dequantize(self.store(weight, fmt, channel_axis, factor))

    def dequantize(self, stored: StoredWeight) -> torch.Tensor:
        """Return the float32 weight that codes stand for, its columns where they were."""
        matrix = matrix_of(stored.shape, stored.channel_axis)
        sorted_ = self.inner.dequantize(replace(stored, shape=matrix, channel_axis=0))
        back = torch.empty_like(sorted_)
        back[:, stored.extra["order"]] = sorted_
        return from_rows(back, stored.shape, stored.channel_axis)

    def pack(self, stored: StoredWeight) -> dict[str, torch.Tensor]:
        """Return the arrays of a file: codes, scales, the order of the columns."""
        order = stored.extra["order"]
        stream = to_index_stream(order, index_bits(len(order)))
        return {**self.inner.pack(stored), "order": stream}

    def unpack(
        self,
        arrays: dict[str, torch.Tensor],
        fmt: Format,
        shape: tuple[int, ...],
        channel_axis: ChannelAxis = 0,
    ) -> StoredWeight:
        """Return the stored weight of the arrays of a file; inverse of `pack`."""
        _, columns = matrix_of(shape, channel_axis)
        stored = self.inner.unpack(arrays, fmt, shape, channel_axis)
        order = from_index_stream(arrays["order"], index_bits(columns), columns)
        return replace(stored, extra={**stored.extra, "order": order})
