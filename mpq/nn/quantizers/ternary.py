"""Ternary weights: w ~ s q, q in {-1, 0, 1}, s = mean|w| (BitNet b1.58, Ma et al., 2024).

q = clip(round(w / s), -1, 1). Variant "median": s = median|w|, of an even number the lower one of
the middle two. Five codes lie in a byte.
"""

from __future__ import annotations

import numpy as np
import torch

from mpq.core.formats import Format
from mpq.core.granularity import ChannelAxis
from mpq.nn.quantizers.bit_streams import from_trits, to_trits
from mpq.nn.quantizers.family import Factor
from mpq.nn.quantizers.grid import HalfScales, OnGrid, Scales, as_half
from mpq.nn.quantizers.stored import StoredWeight


class Ternary(HalfScales):
    """The grid -1, 0, 1."""

    def scales(self, rows: torch.Tensor, fmt: Format, factor: Factor = 1.0) -> Scales:
        """Return mean|w| or median|w|, times `factor`."""
        size = rows.abs()
        if fmt.variant == "median":
            in_order = np.sort(size.cpu().numpy(), axis=1)  # much faster than a median of torch
            median = in_order[:, (size.shape[1] - 1) // 2 :][:, :1].copy()
            return Scales(as_half(torch.from_numpy(median).to(size.device) * factor))
        return Scales(as_half(size.mean(dim=1, keepdim=True) * factor))

    def nearest(self, scaled: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return -1, 0 or 1."""
        return scaled.round_().clamp_(-1, 1)

    def codes(self, levels: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return 0, 1, 2."""
        return levels.add(1).to(torch.int16)

    def levels(self, codes: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return -1, 0, 1."""
        return codes.float().sub_(1)

    def lowest_code(self, fmt: Format) -> int:
        """Return 0."""
        return 0


class _InTrits(OnGrid):
    """A grid of three levels whose codes are stored five to a byte."""

    def pack(self, stored: StoredWeight) -> dict[str, torch.Tensor]:
        return {"codes": to_trits(stored.codes), **self.grid.pack_scales(stored)}

    def unpack(
        self,
        arrays: dict[str, torch.Tensor],
        fmt: Format,
        shape: tuple[int, ...],
        channel_axis: ChannelAxis = 0,
    ) -> StoredWeight:
        scale = self.grid.unpack_scales(arrays, fmt).scale
        codes = from_trits(arrays["codes"], torch.Size(shape).numel()).reshape(len(scale), -1)
        return StoredWeight(codes, scale, None, fmt, shape, channel_axis)


TERNARY = _InTrits(Ternary(), rows_share=True)  # sums of rows depend on how many there are
