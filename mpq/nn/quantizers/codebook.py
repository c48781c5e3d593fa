"""Codebooks of 16 numbers times a scale: NF4 and the FP4 of bitsandbytes.

NF4 (QLoRA, Dettmers et al., NeurIPS 2023) has the quantiles of a normal distribution, normalised
to [-1, 1], with an exact zero. "bnb4" has +-{0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1}; its second
zero is read but never written. Numbers and the order of codes are those of bitsandbytes. The scale
is max|w|, in IEEE half, or (variant "double") in 8 bits, see `double_scales`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mpq.core.formats import Format
from mpq.nn.quantizers.double_scales import DoubleScales
from mpq.nn.quantizers.family import Factor
from mpq.nn.quantizers.grid import HalfScales, OnGrid, Scales, as_half
from mpq.nn.quantizers.stored import StoredWeight

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BNB4 = tuple(  # by code; the high bit is the sign
    sign * magnitude
    for sign in (1, -1)
    for magnitude in (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
)

_BINS = 1024  # so narrow that no bin holds two boundaries of levels


@dataclass(frozen=True, slots=True)
class _Table:
    """For each bin of numbers: the boundary in it, and the level below and above that."""

    boundary: torch.Tensor  # (bins,), infinite where there is none
    below: torch.Tensor  # (bins,), which of the sorted levels
    levels: torch.Tensor  # (2, bins), the level below and above

    def on(self, device: torch.device) -> _Table:
        """Return the table on a device."""
        if device == self.levels.device:
            return self
        return _Table(*(t.to(device) for t in (self.boundary, self.below, self.levels)))


class Codebook:
    """The grid of a codebook on [-1, 1].

    `numbers` are the levels by code; of equal levels the first code is written. The nearest level
    is exact: a number between two is rounded to the lower one, of `symmetric` codebooks to the one
    of less magnitude. It is looked up: bins are monotone in the number and hold one boundary at
    most, so what is not above the boundary of its bin has the level below it.
    """

    def __init__(self, numbers: Sequence[float], *, symmetric: bool) -> None:
        self._numbers = torch.tensor(numbers, dtype=torch.float32)
        exact = [float(n) for n in self._numbers]
        levels = sorted(set(exact))
        self._codes = torch.tensor([exact.index(n) for n in levels], dtype=torch.int16)
        self._table = _table(levels, symmetric)
        self._half, self._double = HalfScales(), DoubleScales()

    def scales(self, rows: torch.Tensor, fmt: Format, factor: Factor = 1.0) -> Scales:
        """Return max|w|, as half or as quantized scales read back."""
        largest = rows.abs().amax(1, keepdim=True) * factor
        if fmt.variant == "double":
            return self._double.scales(largest)
        return Scales(as_half(largest))

    def nearest(self, scaled: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the nearest levels; exact."""
        table, bins = self._table.on(scaled.device), _bins(scaled)
        shape = scaled.shape
        above = scaled.reshape(-1) > table.boundary.index_select(0, bins)
        low, high = (level.index_select(0, bins) for level in table.levels)
        return torch.where(above, high, low).reshape(shape)

    def codes(self, levels: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the codes of levels."""
        table, bins = self._table.on(levels.device), _bins(levels)
        above = levels.reshape(-1) > table.boundary.index_select(0, bins)
        places = table.below.index_select(0, bins) + above
        return self._codes.to(levels.device).index_select(0, places).reshape(levels.shape)

    def levels(self, codes: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the numbers of codes."""
        places = codes.reshape(-1).to(torch.int32)
        return self._numbers.to(codes.device).index_select(0, places).reshape(codes.shape)

    def lowest_code(self, fmt: Format) -> int:
        """Return 0."""
        return 0

    def pack_scales(self, stored: StoredWeight) -> dict[str, torch.Tensor]:
        """Return the scales, in half or in 8 bits with second scales and an offset."""
        return self._kept(stored.fmt).pack_scales(stored)

    def unpack_scales(self, arrays: dict[str, torch.Tensor], fmt: Format) -> Scales:
        """Return the scales."""
        return self._kept(fmt).unpack_scales(arrays, fmt)

    def _kept(self, fmt: Format) -> HalfScales | DoubleScales:
        return self._double if fmt.variant == "double" else self._half


def _bins(numbers: torch.Tensor) -> torch.Tensor:
    """Return the bin of each number, flat; monotone in the number."""
    half = _BINS // 2
    bins = numbers.reshape(-1).mul(half - 1).add_(half).clamp_(0, _BINS - 1).to(torch.int32)
    return bins.clamp_min_(0)  # not a number has some bin, too


def _table(levels: list[float], symmetric: bool) -> _Table:
    boundaries = torch.tensor([_boundary(*pair, symmetric) for pair in itertools.pairwise(levels)])
    bins = _bins(boundaries)
    assert len(set(bins.tolist())) == len(bins)
    boundary = torch.full((_BINS,), torch.inf)
    boundary[bins.long()] = boundaries
    below = torch.searchsorted(bins.long(), torch.arange(_BINS)).to(torch.int32)
    above = (below + 1).clamp_max(len(levels) - 1)
    both = torch.stack([below, above]).long()
    return _Table(boundary, below, torch.tensor(levels)[both])


def _boundary(low: float, high: float, symmetric: bool) -> float:
    """Return the largest float32 number that is rounded to `low`, not to `high`."""
    middle = (low + high) / 2  # exact in float64
    found = np.float32(middle)
    if float(found) > middle or (symmetric and middle < 0 and float(found) == middle):
        found = np.nextafter(found, np.float32(-np.inf))
    return float(found)


NORMAL_FLOATS = OnGrid(Codebook(NF4, symmetric=False), rows_share=True)
BITSANDBYTES_FLOATS = OnGrid(Codebook(BNB4, symmetric=True), rows_share=True)
