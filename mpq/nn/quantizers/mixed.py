"""A share of a layer's output channels, or of its groups, in a wider format than the rest.

"int4g128a+10%int8": a tenth of the output channels in int8 (MixLLM, Zheng et al., 2024), chosen by
what rounding them to the low format would cost the loss. For channel c with rounding error d_c that
is S_c = 1/2 E[g_c^2] d_c H d_c^T, where g_c is the gradient of the loss at the channel's output and
H the second moment of the layer's inputs: our reading of MixLLM's global salience, with the Fisher
matrix of a channel factored into outputs and inputs. A scheme with a share is one choice among
others: how many channels are worth more bits in which layer is what the solver decides.
"int2g64a+25%groups_int4g64a": groups (Fast-2-bit), S_g alike with the group's block of H. Without
data g and H are 1: channels by squared error, groups by range. The mask, a bit for each channel or
group, is stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mpq.core.format_parts import count_of
from mpq.core.formats import Format, PerGroup
from mpq.core.granularity import ChannelAxis, matrix_of
from mpq.nn.quantizers.bit_streams import from_stream, to_stream
from mpq.nn.quantizers.family import Factor, Family
from mpq.nn.quantizers.rows import channels_of, from_rows
from mpq.nn.quantizers.stored import LayerData, StoredWeight


class MixedChannels:
    """Rows of a weight in two formats; `family_of` tells what stores each."""

    def __init__(self, family_of: Callable[[Format], Family]) -> None:
        self._family_of = family_of

    def store(
        self,
        weight: torch.Tensor,
        fmt: Format,
        channel_axis: ChannelAxis = 0,
        factor: Factor = 1.0,
        data: LayerData | None = None,
    ) -> StoredWeight:
        """Return the packed arrays of both shares and the mask, in `extra`; there are no codes.

        `factor` is not used: rows that it belongs to move.
        """
        fmt.parts(tuple(weight.shape), channel_axis)  # refuses groups that do not divide
        matrix = channels_of(weight.detach().float(), channel_axis)
        rows = _rows(matrix, fmt)
        salience = self._salience(matrix, fmt, data)
        mask = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        order = salience.argsort(descending=True, stable=True)
        mask[order[: count_of(fmt.share, len(rows))]] = True
        arrays = {"mask": to_stream(mask.cpu(), 1)}
        for which, own, some in _shares(fmt, mask):
            if len(rows[some]):
                packed = self._family_of(own).store(rows[some], own).pack()
                arrays |= {f"{which}.{name}": array for name, array in packed.items()}
        return self.unpack(arrays, fmt, tuple(weight.shape), channel_axis)

    def fake_quantize(
        self, weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis, factor: Factor = 1.0
    ) -> torch.Tensor:
        """Return the weight as it reads back, float32."""
        return self.dequantize(self.store(weight, fmt, channel_axis, factor))

    def dequantize(self, stored: StoredWeight) -> torch.Tensor:
        """Return the float32 weight that both shares stand for."""
        fmt, (channels, columns) = stored.fmt, matrix_of(stored.shape, stored.channel_axis)
        width = _width(fmt, columns)
        back = torch.empty(channels * columns // max(width, 1), width)
        mask = from_stream(stored.extra["mask"], 1, len(back)).bool()
        for which, own, some in _shares(fmt, mask):
            count = int(some.sum())
            if count:
                found = stored.extra.items()
                arrays = {n.partition(".")[2]: a for n, a in found if n.startswith(f"{which}.")}
                family = self._family_of(own)
                back[some] = family.unpack(arrays, own, (count, width)).dequantize()
        return from_rows(back, stored.shape, stored.channel_axis)

    def pack(self, stored: StoredWeight) -> dict[str, torch.Tensor]:
        """Return the arrays of both shares and the mask."""
        return dict(stored.extra)

    def unpack(
        self,
        arrays: dict[str, torch.Tensor],
        fmt: Format,
        shape: tuple[int, ...],
        channel_axis: ChannelAxis = 0,
    ) -> StoredWeight:
        """Return the stored weight of the arrays of a file."""
        nothing = torch.empty(0, 0)
        codes = nothing.to(torch.int16)
        return StoredWeight(codes, nothing, None, fmt, shape, channel_axis, dict(arrays))

    def _salience(self, matrix: torch.Tensor, fmt: Format, data: LayerData | None) -> torch.Tensor:
        """Return what the low format costs the loss in each channel, or group."""
        gram = None if data is None else data.gram
        grouped = fmt.variant == "groups"
        if gram is None and grouped:
            rows = _rows(matrix, fmt)
            return rows.amax(1) - rows.amin(1)
        off = self._family_of(fmt.low).fake_quantize(matrix, fmt.low, 0) - matrix
        outputs = matrix.new_ones(len(matrix))
        if data is not None and data.outputs is not None:
            outputs = data.outputs.to(matrix)
        if gram is None:
            return off.square().sum(1) * outputs
        gram = gram.to(matrix)
        if not grouped:
            return (off @ gram * off).sum(1) * outputs
        size = _width(fmt, matrix.shape[1])
        places = matrix.shape[1] // size
        blocks = gram.reshape(places, size, places, size)
        own = blocks[torch.arange(places), :, torch.arange(places)]  # (places, size, size)
        parts = off.reshape(len(off), places, size)
        found = torch.einsum("cps,pst,cpt->cp", parts, own, parts)
        return (found * outputs[:, None]).reshape(-1)


def _rows(matrix: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return what is shared out: channels, or groups."""
    if fmt.variant != "groups":
        return matrix
    return matrix.reshape(-1, _width(fmt, matrix.shape[1]))


def _width(fmt: Format, columns: int) -> int:
    """Return the weights of what is shared out."""
    if fmt.variant != "groups":
        return columns
    assert isinstance(fmt.granularity, PerGroup)
    return fmt.granularity.size


def _shares(fmt: Format, mask: torch.Tensor) -> tuple[tuple[str, Format, torch.Tensor], ...]:
    assert fmt.high is not None
    return ("low", fmt.low, ~mask), ("high", fmt.high, mask)
