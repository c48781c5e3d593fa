"""Block floating point: one exponent for the weights of a row, a signed mantissa for each.

w ~ 2^e q / 2^(b-2) with e = floor(log2 max|w|) in a byte and q in -(2^(b-1) - 1) to 2^(b-1) - 1,
so that b bits are a sign and b - 1 bits of which one is before the point. One bit more than the
exponent needs is never made (-2^(b-1)): what was read back has the same exponent.
"""

from __future__ import annotations

import torch

from mpq.core.formats import Format
from mpq.nn.quantizers.exponents import ExponentScales, floor_log2, power_of_two
from mpq.nn.quantizers.family import Factor
from mpq.nn.quantizers.grid import OnGrid, Scales
from mpq.nn.quantizers.rows import largest_of


class FractionElements:
    """Levels q / 2^(b-2), |q| < 2^(b-1), whatever their scales; codes are q."""

    def nearest(self, scaled: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the nearest levels."""
        top = 2 ** (fmt.bits - 1) - 1
        unit = 2.0 ** (fmt.bits - 2)
        return scaled.mul_(unit).round_().clamp_(-top, top).div_(unit)

    def codes(self, levels: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the integers."""
        return (levels * 2.0 ** (fmt.bits - 2)).to(torch.int16)

    def levels(self, codes: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the fractions."""
        return codes.float() / 2.0 ** (fmt.bits - 2)

    def lowest_code(self, fmt: Format) -> int:
        """Return -2^(b-1)."""
        return -(1 << (fmt.bits - 1))


class BlockFloatingPoint(ExponentScales, FractionElements):
    """The grid of family "bfp"."""

    def scales(self, rows: torch.Tensor, fmt: Format, factor: Factor = 1.0) -> Scales:
        """Return 2^floor(log2 max|w|)."""
        return Scales(power_of_two(floor_log2(largest_of(rows) * factor)))


BLOCK_FLOATING_POINT = OnGrid(BlockFloatingPoint())
