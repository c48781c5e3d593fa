"""Minifloats eXmY of 3 to 8 bits: a sign, X exponent and Y mantissa bits, subnormals.

The exponent bias is 2^(X-1) - 1 and all codes are finite, as in OCP's FP6 (e2m3, e3m2) and FP4
(e2m1), but for the OCP's FP8: e4m3 (largest 448, NaN where all bits behind the sign are one) and
e5m2 (largest 57344, infinities and NaN in the last exponent); codes that are no number are never
made. The scale of a row is real, which is the search of a real exponent bias of LLM-FP4.

Scales s are kept in IEEE half as s 2^E, E the exponent of the largest level, an exact shift that
is no part of the data: s itself would be subnormal for usual weights (0.05 / 57344) and lose bits.
"""

from __future__ import annotations

from functools import cache

import torch

from mpq.core.formats import Format
from mpq.nn.quantizers.family import Factor
from mpq.nn.quantizers.grid import OnGrid, Scales, as_half
from mpq.nn.quantizers.rows import largest_of
from mpq.nn.quantizers.stored import StoredWeight

_WIDE = {  # (integers of the size, bits of the exponent, bits of the fraction)
    torch.float32: (torch.int32, 0x7F800000, 23),
    torch.float64: (torch.int64, 0x7FF0000000000000, 52),
}


class MinifloatElements:
    """The levels and codes of minifloats, whatever their scales."""

    def nearest(self, scaled: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the nearest levels (float32 or float64), ties to the even code, saturating.

        The step at x is 2^(floor(log2|x|) - Y) from the smallest normal level on; adding and
        taking away 1.5 2^23 steps (float32) rounds to it. Five passes in place, one array beside.
        """
        integers, exponent, fraction = _WIDE[scaled.dtype]
        largest = largest_level(fmt)
        power = scaled.clamp_(-largest, largest).view(integers).bitwise_and(exponent)
        base = power.view(scaled.dtype).clamp_min_(2.0 ** least_exponent(fmt))
        steps = 1.5 * 2.0 ** (fraction - fmt.mantissa)  # of the smallest step in one base
        return scaled.add_(base, alpha=steps).sub_(base, alpha=steps)

    def codes(self, levels: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the bit patterns: sign, exponent, mantissa."""
        magnitude = levels.abs()
        exponent = (torch.frexp(magnitude).exponent - 1).clamp_min_(least_exponent(fmt))
        exponent = torch.where(magnitude > 0, exponent, least_exponent(fmt))
        significand = torch.ldexp(magnitude.double(), fmt.mantissa - exponent)
        codes: torch.Tensor = (exponent - least_exponent(fmt)) * (
            1 << fmt.mantissa
        ) + significand.int()
        return (codes + (levels < 0) * (1 << (fmt.bits - 1))).to(torch.int16)

    def levels(self, codes: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return what the bit patterns stand for."""
        every: torch.Tensor = _all_levels(fmt.bits, fmt.mantissa)
        return every.to(codes.device)[codes.int()]

    def lowest_code(self, fmt: Format) -> int:
        """Return 0."""
        return 0


class Minifloats(MinifloatElements):
    """The grid of family "float"."""

    def scales(self, rows: torch.Tensor, fmt: Format, factor: Factor = 1.0) -> Scales:
        """Return max|w| / (largest level)."""
        shift = 2.0 ** largest_exponent(fmt)
        return Scales(as_half(largest_of(rows) * factor / (largest_level(fmt) / shift)) / shift)

    def pack_scales(self, stored: StoredWeight) -> dict[str, torch.Tensor]:
        """Return the scales, shifted, in IEEE half."""
        shifted = stored.scales.reshape(-1) * 2.0 ** largest_exponent(stored.fmt)
        return {"scales": shifted.half()}

    def unpack_scales(self, arrays: dict[str, torch.Tensor], fmt: Format) -> Scales:
        """Return the scales."""
        scale = arrays["scales"].float() / 2.0 ** largest_exponent(fmt)
        return Scales(scale.reshape(-1, 1))


MINIFLOATS = OnGrid(Minifloats())


def least_exponent(fmt: Format) -> int:
    """Return the exponent of the smallest normal level."""
    return 2 - (1 << (_exponent_bits(fmt) - 1))


def largest_exponent(fmt: Format) -> int:
    """Return the exponent of the largest level."""
    return (1 << (_exponent_bits(fmt) - 1)) - (1 if _is_e5m2(fmt) else 0)


def largest_level(fmt: Format) -> float:
    """Return the largest level."""
    lost = 2 if _is_e4m3(fmt) else 1  # the last mantissa of e4m3 is NaN
    return (2 - lost * 2.0**-fmt.mantissa) * 2.0 ** largest_exponent(fmt)


def _exponent_bits(fmt: Format) -> int:
    return fmt.bits - 1 - fmt.mantissa


def _is_e4m3(fmt: Format) -> bool:
    return (fmt.bits, fmt.mantissa) == (8, 3)


def _is_e5m2(fmt: Format) -> bool:
    return (fmt.bits, fmt.mantissa) == (8, 2)


@cache
def _all_levels(bits: int, mantissa: int) -> torch.Tensor:
    """Return the level of each code (float32), NaN where it is no number or infinite."""
    fmt = Format(family="float", bits=bits, mantissa=mantissa)
    code = torch.arange(2 ** (bits - 1))
    field, rest = code >> mantissa, (code & (2**mantissa - 1)).double()
    normal = field > 0
    exponent = least_exponent(fmt) + torch.where(normal, field - 1, 0)
    level = torch.ldexp(rest * 2.0**-mantissa + normal, exponent)
    level = torch.where(level > largest_level(fmt), torch.nan, level).float()
    return torch.cat([level, -level])
