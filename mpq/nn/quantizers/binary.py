"""Binary weights: one sign a weight, or two or more planes of bits that add up.

- "binary": w ~ a sign(w), a = mean|w| of the row (XNOR-Net, Rastegari et al., 2016).
- "residual": w ~ sum_k a_k sign(r_k), r_0 = w, r_(k+1) = r_k - a_k sign(r_k), a_k = mean|r_k|,
  with a_k as IEEE half keeps it; zeros have a sign, too.
- "dual": w ~ a_1 b_1 + a_2 b_2, both b in {0, 1} (DB-LLM, Chen et al., 2024), see `DualBinary`.

Codes hold bit k of plane k. Scales are means or fits, no ranges: no clipping is applied.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mpq.core.formats import Format
from mpq.core.granularity import ChannelAxis
from mpq.nn.quantizers.bit_streams import from_stream, to_stream
from mpq.nn.quantizers.family import Factor
from mpq.nn.quantizers.grid import LARGEST_SCALE, HalfScales, OnGrid, Scales, as_half
from mpq.nn.quantizers.rows import from_rows, rows_of
from mpq.nn.quantizers.sorted_rows import SortedRows, middles
from mpq.nn.quantizers.stored import LayerData, StoredWeight

_FITS = 8
_STARTS = ((2.0, -1.0), (1.0, -2.0), (2 / 3, 4 / 3), (-2 / 3, -4 / 3))


class Signs(HalfScales):
    """The grid -1, 1."""

    def scales(self, rows: torch.Tensor, fmt: Format, factor: Factor = 1.0) -> Scales:
        """Return mean|w|; `factor` is ignored, any other scale has a larger error."""
        return Scales(as_half(rows.abs().mean(dim=1, keepdim=True)))

    def nearest(self, scaled: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the signs."""
        return torch.copysign(scaled.new_ones(()), scaled)

    def codes(self, levels: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return 1 where the sign is positive."""
        return (levels > 0).to(torch.int16)

    def levels(self, codes: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the signs."""
        return codes.float().mul_(2).sub_(1)

    def lowest_code(self, fmt: Format) -> int:
        """Return 0."""
        return 0


class _Planes:
    """Bits of several planes, each with a scale of its own in each row."""

    block = 2**20  # elements fitted at once

    def fake_quantize(
        self, weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis, factor: Factor = 1.0
    ) -> torch.Tensor:
        """Return the weight as it reads back, float32."""
        return self.dequantize(self.store(weight, fmt, channel_axis)).to(weight.device)

    def store(
        self,
        weight: torch.Tensor,
        fmt: Format,
        channel_axis: ChannelAxis = 0,
        factor: Factor = 1.0,
        data: LayerData | None = None,
    ) -> StoredWeight:
        """Return bits and scales (rows, planes); `factor` and `data` are not used."""
        shape = tuple(weight.shape)
        fmt.num_scales(shape, channel_axis)  # refuses groups that do not divide
        rows = rows_of(weight.detach().float().cpu(), fmt.granularity, channel_axis)
        height = max(1, self.block // max(1, rows.shape[1]))
        fits = [self.fit(part, fmt.bits) for part in torch.split(rows, height)]
        codes, scales = (torch.cat(parts) for parts in zip(*fits, strict=True))
        return StoredWeight(codes, scales, None, fmt, shape, channel_axis)

    def fit(self, rows: torch.Tensor, planes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes (int16) and scales (rows, planes)."""
        raise NotImplementedError

    def dequantize(self, stored: StoredWeight) -> torch.Tensor:
        """Return the float32 weight that bits stand for."""
        raise NotImplementedError

    def pack(self, stored: StoredWeight) -> dict[str, torch.Tensor]:
        """Return the bits of the planes, and their scales."""
        codes = to_stream(stored.codes, stored.fmt.bits)
        return {"codes": codes, "scales": stored.scales.reshape(-1).half()}

    def unpack(
        self,
        arrays: dict[str, torch.Tensor],
        fmt: Format,
        shape: tuple[int, ...],
        channel_axis: ChannelAxis = 0,
    ) -> StoredWeight:
        """Return the stored weight of the arrays of a file; inverse of `pack`."""
        scales = arrays["scales"].float().reshape(-1, fmt.bits)
        codes = from_stream(arrays["codes"], fmt.bits, torch.Size(shape).numel())
        codes = codes.reshape(len(scales), -1)
        return StoredWeight(codes, scales, None, fmt, shape, channel_axis)


class ResidualBinary(_Planes):
    """Planes of signs, each of what the planes before it leave."""

    block = 2**15  # stays in the cache

    def fake_quantize(
        self, weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis, factor: Factor = 1.0
    ) -> torch.Tensor:
        """Return the weight as it reads back, without making codes."""
        fmt.num_scales(tuple(weight.shape), channel_axis)
        rows = rows_of(weight.detach().float(), fmt.granularity, channel_axis)
        back = torch.zeros_like(rows)
        height = max(1, self.block // max(1, rows.shape[1]))
        for some, its_back in zip(
            torch.split(rows, height), torch.split(back, height), strict=True
        ):
            for _, _, part in _signs(some, fmt.bits):
                its_back += part
        return from_rows(back, tuple(weight.shape), channel_axis)

    def fit(self, rows: torch.Tensor, planes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes (int16) and scales (rows, planes)."""
        codes = torch.zeros(rows.shape, dtype=torch.int16)
        scales = []
        for number, (scale, rest, _) in enumerate(_signs(rows, planes)):
            codes += torch.signbit(rest).logical_not_().to(torch.int16) << number
            scales.append(scale)
        return codes, torch.cat(scales, dim=1)

    def dequantize(self, stored: StoredWeight) -> torch.Tensor:
        """Return the sum of the planes."""
        back = torch.zeros(stored.codes.shape)
        for number in range(stored.fmt.bits):
            scale = stored.scales[:, number : number + 1]
            back += torch.where((stored.codes >> number) & 1 > 0, scale, -scale)
        return from_rows(back, stored.shape, stored.channel_axis)


class DualBinary(_Planes):
    """Two planes of zeros and ones, so that each row has the levels 0, a_1, a_2, a_1 + a_2.

    Our reading: weights are assigned to the nearest level and (a_1, a_2) is their least-squares
    solution, in turns, at most 8 times, from four starts: s (2, -1), the levels of int2 that
    DB-LLM starts from; its mirror image s (1, -2); s (2, 4) / 3 and -s (2, 4) / 3 for rows of one
    sign; s = mean|w|. The best of the four is kept and rounded to half. No turn raises the error.
    """

    def fit(self, rows: torch.Tensor, planes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes (int16) and scales (rows, 2)."""
        unit = _power_of_two(rows)  # squares of what is left neither overflow nor vanish
        in_order = SortedRows(rows / unit)
        mean = (rows / unit).abs().mean(dim=1, keepdim=True).double()
        fits = [_alternate(in_order, mean * mean.new_tensor(start)) for start in _STARTS]
        errors = torch.stack([error for error, _ in fits])
        best = errors.argmin(dim=0)
        scales = torch.stack([scales for _, scales in fits])[best, torch.arange(len(best))]
        scales = (scales.float() * unit).clamp(-LARGEST_SCALE, LARGEST_SCALE).half().float()
        levels, its_codes = _levels(scales).sort(dim=1, stable=True)
        places = torch.searchsorted(middles(levels), rows.contiguous())
        return its_codes.gather(1, places).to(torch.int16), scales

    def dequantize(self, stored: StoredWeight) -> torch.Tensor:
        """Return the level of each code."""
        rows = _levels(stored.scales).gather(1, stored.codes.long())
        return from_rows(rows, stored.shape, stored.channel_axis)


def _alternate(rows: SortedRows, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least error found (less the rows' own squares) and its scales, (rows, 2)."""
    before = torch.empty(0, dtype=torch.int64)
    for number in range(_FITS + 1):
        levels, codes = _levels(scales).sort(dim=1, stable=True)
        count, total, places = rows.segments(middles(levels))
        error = (count * levels.square() - 2 * total * levels).sum(1)
        if number == _FITS or torch.equal(places, before):
            break
        before = places
        by_code = torch.zeros_like(count).scatter_(1, codes, count)
        sums = torch.zeros_like(total).scatter_(1, codes, total)
        ones = by_code[:, 1] + by_code[:, 3], by_code[:, 2] + by_code[:, 3], by_code[:, 3]
        right = sums[:, 1] + sums[:, 3], sums[:, 2] + sums[:, 3]
        det = ones[0] * ones[1] - ones[2] ** 2
        first = (right[0] * ones[1] - right[1] * ones[2]) / det
        second = (right[1] * ones[0] - right[0] * ones[2]) / det
        solved = torch.stack([first, second], dim=1)
        scales = torch.where(det[:, None] > 0, solved, scales)
    return error, scales


def _signs(
    rows: torch.Tensor, planes: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield the scale of each plane, what it is to stand for, and what it stands for."""
    rest = rows
    for _ in range(planes):
        scale = rest.abs().mean(dim=1, keepdim=True).clamp_max(LARGEST_SCALE).half().float()
        part = torch.copysign(scale, rest)
        yield scale, rest, part
        rest = rest - part


def _levels(scales: torch.Tensor) -> torch.Tensor:
    """Return the level of each code of two planes, (rows, 4)."""
    first, second = scales[:, :1], scales[:, 1:]
    return torch.cat([torch.zeros_like(first), first, second, first + second], dim=1)


def _power_of_two(rows: torch.Tensor) -> torch.Tensor:
    largest = rows.abs().amax(dim=1, keepdim=True).clamp(2.0**-120, 2.0**120)
    return torch.exp2(largest.log2().floor())


BINARY = OnGrid(Signs(), rows_share=True)  # sums of rows depend on how many there are
RESIDUAL_BINARY = ResidualBinary()
DUAL_BINARY = DualBinary()
