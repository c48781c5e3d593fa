"""Formats whose weights are levels of one grid times a scale: stored, rounded, clipped alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar, cast

import torch

from mpq.core.formats import Format
from mpq.core.granularity import ChannelAxis
from mpq.nn.quantizers.bit_streams import from_stream, to_stream
from mpq.nn.quantizers.family import Factor
from mpq.nn.quantizers.rows import from_rows, rows_of
from mpq.nn.quantizers.stored import LayerData, StoredWeight

SMALLEST_SCALE = 2.0**-24  # of IEEE half; an all-zero group needs some scale
LARGEST_SCALE = 65504.0
_BLOCK = 2**17  # elements, so that a block and what is made of it stay in the cache


class Scales(NamedTuple):
    """The scale and zero point of each row, (rows, 1), as they are stored, and what they share."""

    scale: torch.Tensor
    zero: torch.Tensor | None = None
    shared: torch.Tensor | Mapping[str, torch.Tensor] | None = None  # a scalar, or by name


class Grid(Protocol):
    """The numbers of a family; rows, scales and zero points are float32."""

    def scales(self, rows: torch.Tensor, fmt: Format, factor: Factor = 1.0) -> Scales:
        """Return the scales of rows whose range is shrunk by `factor`."""

    def nearest(self, scaled: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the levels nearest to numbers already divided by their scale.

        May write to `scaled`, and may return it.
        """

    def codes(self, levels: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the code of each level (int16)."""

    def levels(self, codes: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the level that each code stands for; inverse of `codes`."""

    def lowest_code(self, fmt: Format) -> int:
        """Return the smallest code, which is stored as zero."""

    def pack_scales(self, stored: StoredWeight) -> dict[str, torch.Tensor]:
        """Return scales and what they share as a file holds them, by the names of parts."""

    def unpack_scales(self, arrays: dict[str, torch.Tensor], fmt: Format) -> Scales:
        """Return scales of the arrays of a file, without zero points."""


def as_half(scale: torch.Tensor) -> torch.Tensor:
    """Return positive scales as IEEE half keeps them."""
    return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()


def _by_name(
    shared: torch.Tensor | Mapping[str, torch.Tensor] | None,
) -> Mapping[str, torch.Tensor]:
    if shared is None:
        return {}
    return {"tensor_scale": shared} if isinstance(shared, torch.Tensor) else shared


class HalfScales:
    """Scales of a grid that are stored in IEEE half."""

    def pack_scales(self, stored: StoredWeight) -> dict[str, torch.Tensor]:
        """Return the scales in IEEE half."""
        return {"scales": stored.scales.reshape(-1).half()}

    def unpack_scales(self, arrays: dict[str, torch.Tensor], fmt: Format) -> Scales:
        """Return the scales."""
        return Scales(arrays["scales"].float().reshape(-1, 1))


@dataclass(frozen=True, slots=True)
class OnGrid:
    """A family whose weights are on a grid.

    `rows_share`: the scales of rows depend on all rows, so that rows cannot be looked at in parts.
    """

    grid: Grid
    rows_share: bool = False

    def store(
        self,
        weight: torch.Tensor,
        fmt: Format,
        channel_axis: ChannelAxis = 0,
        factor: Factor = 1.0,
        data: LayerData | None = None,
    ) -> StoredWeight:
        """Round a weight to nearest, the range of each row shrunk by `factor`.

        Raises InvalidInputError where groups do not divide the weights of a channel.
        """
        fmt.num_scales(tuple(weight.shape), channel_axis)  # refuses groups that do not divide
        rows = rows_of(weight.detach().float(), fmt.granularity, channel_axis)
        scales = self.grid.scales(rows, fmt, factor)
        levels = self.grid.nearest(rows / scales.scale, scales.zero, fmt)
        return self.of_levels(levels, scales, fmt, tuple(weight.shape), channel_axis)

    def of_levels(
        self,
        levels: torch.Tensor,
        scales: Scales,
        fmt: Format,
        shape: tuple[int, ...],
        channel_axis: ChannelAxis,
    ) -> StoredWeight:
        """Return the stored weight of levels (rows, weights) however they were chosen."""
        zero = None if scales.zero is None else scales.zero.to(torch.int16)
        extra = _by_name(scales.shared)
        codes = self.grid.codes(levels, scales.zero, fmt)
        return StoredWeight(codes, scales.scale, zero, fmt, shape, channel_axis, extra)

    def fake_quantize(
        self, weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis, factor: Factor = 1.0
    ) -> torch.Tensor:
        """Return `store(...).dequantize()` without making codes."""
        fmt.num_scales(tuple(weight.shape), channel_axis)
        rows = rows_of(weight.detach().float(), fmt.granularity, channel_axis)
        back = torch.empty_like(rows)
        known = self.grid.scales(rows, fmt, factor) if self.rows_share or len(rows) == 1 else None
        for own in _blocks(rows):
            scale, zero, _ = known or self.grid.scales(rows[own[0]], fmt, _of_rows(factor, own[0]))
            if known is not None:
                scale, zero = _of_rows(scale, own[0]), _of_rows(zero, own[0])
            levels = self.grid.nearest(rows[own] / scale, zero, fmt)
            torch.mul(levels, scale, out=back[own])
        return from_rows(back, tuple(weight.shape), channel_axis)

    def dequantize(self, stored: StoredWeight) -> torch.Tensor:
        """Return the float32 weight that codes stand for."""
        zero = None if stored.zero_points is None else stored.zero_points.float()
        levels = self.grid.levels(stored.codes, zero, stored.fmt)
        return from_rows(levels * stored.scales, stored.shape, stored.channel_axis)

    def clip_factor(
        self, weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis = 0
    ) -> torch.Tensor:
        """Return the factor of each row with the least squared rounding error ("MSE clip").

        The range is shrunk by 9 factors from 1.0 to 0.2, then four rounds look on both sides of
        the best at half the distance. Shape (rows, 1).
        """
        fmt.num_scales(tuple(weight.shape), channel_axis)
        rows = rows_of(weight.detach().float(), fmt.granularity, channel_axis)
        height = max(1, len(rows) if self.rows_share else _BLOCK // max(1, rows.shape[1]))
        parts = [self._least_error(part, fmt) for part in torch.split(rows, height)]
        return torch.cat(parts)

    def _least_error(self, rows: torch.Tensor, fmt: Format) -> torch.Tensor:
        factor = rows.new_ones(len(rows), 1)
        error = torch.full_like(factor, torch.inf)

        def look(tried: torch.Tensor) -> None:
            nonlocal factor, error
            scale, zero, _ = self.grid.scales(rows, fmt, tried)
            off = self.grid.nearest(rows / scale, zero, fmt).mul(scale).sub_(rows)
            tried_error = off.square_().sum(1, keepdim=True)
            better = tried_error < error
            factor = torch.where(better, tried, factor)
            error = torch.where(better, tried_error, error)

        step = 0.1
        for number in range(9):
            look(torch.full_like(factor, 1.0 - number * step))
        for _ in range(4):
            step /= 2
            centre = factor
            look(centre - step)
            look((centre + step).clamp_max(1.0))
        return factor

    def pack(self, stored: StoredWeight) -> dict[str, torch.Tensor]:
        """Return the arrays of a file: codes, scales, zero points."""
        fmt = stored.fmt
        codes = stored.codes - self.grid.lowest_code(fmt)
        arrays = {"codes": to_stream(codes, fmt.bits), **self.grid.pack_scales(stored)}
        if stored.zero_points is not None:
            arrays["zero_points"] = to_stream(stored.zero_points, fmt.bits)
        return arrays

    def unpack(
        self,
        arrays: dict[str, torch.Tensor],
        fmt: Format,
        shape: tuple[int, ...],
        channel_axis: ChannelAxis = 0,
    ) -> StoredWeight:
        """Return the stored weight of the arrays of a file; inverse of `pack`."""
        count = torch.Size(shape).numel()
        scales = self.grid.unpack_scales(arrays, fmt)
        codes = from_stream(arrays["codes"], fmt.bits, count) + self.grid.lowest_code(fmt)
        zero = None
        if "zero_points" in arrays:
            zero = from_stream(arrays["zero_points"], fmt.bits, len(scales.scale)).reshape(-1, 1)
        rows = fmt.num_scales(shape, channel_axis)
        extra = _by_name(scales.shared)
        codes = codes.reshape(rows, -1)
        return StoredWeight(codes, scales.scale, zero, fmt, shape, channel_axis, extra)


_Part = TypeVar("_Part", bound=torch.Tensor | float | None)


def _of_rows(of: _Part, own: slice) -> _Part:
    """Return the part of what each row, or all rows have, that belongs to some rows."""
    return cast(_Part, of[own]) if isinstance(of, torch.Tensor) and len(of) > 1 else of


def _blocks(rows: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of rows that stay in the cache; of a single row, parts."""
    width = rows.shape[1] if len(rows) > 1 else _BLOCK
    height = max(1, _BLOCK // max(1, width))
    for top in range(0, len(rows), height):
        for left in range(0, rows.shape[1], max(1, width)):
            yield slice(top, top + height), slice(left, left + width)
