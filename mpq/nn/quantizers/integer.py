"""Integers of 1 to 8 bits: symmetric or with a zero point, or the leading bits of int8.

A symmetric b-bit weight is w ~ s q, q in [-2^(b-1), 2^(b-1) - 1], s = max|w| / (2^(b-1) - 1);
one bit has the two levels +-s/2 instead (a grid with a zero would have one level only).
An asymmetric one is w ~ s (q - z) with q in [0, 2^b - 1], and its range always holds zero.
"int4of8" keeps the leading bits of an int8 tensor ("double rounding", Nearly lossless
bit switching, 2025): q8 = round(w / s), q = clip(round(q8 / 2^D)), D = 8 - b, w ~ q (s 2^D), so
one stored int8 tensor yields all narrower ones. Scales are rounded to IEEE half, as stored.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mpq.core.errors import InvalidInputError
from mpq.core.formats import Format
from mpq.nn.quantizers.family import Factor
from mpq.nn.quantizers.grid import HalfScales, OnGrid, Scales, as_half
from mpq.nn.quantizers.stored import StoredWeight

_WIDE = 8


class Integers(HalfScales):
    """The grid of families "int"."""

    def scales(self, rows: torch.Tensor, fmt: Format, factor: Factor = 1.0) -> Scales:
        """Return max|w| / (2^(b-1) - 1), or the range in 2^b - 1 steps and its zero."""
        low, high = _range(rows, fmt)
        low, high = low * factor, high * factor
        if fmt.variant == "of8":
            return Scales(as_half(_wide_scale(high) * 2.0 ** (_WIDE - fmt.bits)))
        if fmt.symmetric:
            return Scales(as_half(high / max(2 ** (fmt.bits - 1) - 1, 1)))
        steps = 2**fmt.bits - 1
        scale = as_half((high - low) / steps)
        return Scales(scale, (-low / scale).round_().clamp_(0, steps))

    def nearest(self, scaled: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return rounded numbers inside the range of the bits."""
        if zero is not None:
            return scaled.add_(zero).round_().clamp_(0, 2**fmt.bits - 1).sub_(zero)
        if fmt.bits == 1:
            return torch.where(scaled >= 0, 0.5, -0.5)
        half = 2 ** (fmt.bits - 1)
        if fmt.variant == "of8":
            ratio = 2.0 ** (_WIDE - fmt.bits)
            scaled.mul_(ratio).round_().clamp_(-128, 127).div_(ratio)
        return scaled.round_().clamp_(-half, half - 1)

    def codes(self, levels: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the integers; with a zero point from zero on, else signed."""
        if zero is not None:
            levels = levels + zero
        return (levels - 0.5 if fmt.bits == 1 and zero is None else levels).to(torch.int16)

    def levels(self, codes: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the integers less the zero point."""
        if zero is not None:
            return codes.float() - zero
        return codes.float() + 0.5 if fmt.bits == 1 else codes.float()

    def lowest_code(self, fmt: Format) -> int:
        """Return -2^(b-1) where codes are signed."""
        return -(2 ** (fmt.bits - 1)) if fmt.symmetric else 0


def leading_bits(stored: StoredWeight, bits: int) -> StoredWeight:
    """Return the weight in `bits` that a stored int8 tensor yields, without the weight itself.

    It is what "int{bits}of8" stores. Raises InvalidInputError (`format`) for anything but
    symmetric int8 codes, and for bits outside of 2 to 8.
    """
    fmt = stored.fmt.as_stored
    whole = fmt.is_plain_integer and fmt.bits == _WIDE and fmt.symmetric
    if not whole or not 2 <= bits <= _WIDE:
        raise InvalidInputError(
            "format",
            f"the 2 to 8 leading bits are those of symmetric int8 weights, got {bits} of "
            f"{fmt.text('weights')}",
        )
    ratio, half = 2.0 ** (_WIDE - bits), 2 ** (bits - 1)
    codes = (stored.codes.float() / ratio).round_().clamp_(-half, half - 1).to(torch.int16)
    narrow = replace(fmt, bits=bits, variant="of8")
    return replace(stored, codes=codes, scales=stored.scales * ratio, fmt=narrow)


class UnsignedIntegers(HalfScales):
    """The grid of family "uint": 0 to 2^b - 1, no zero point; what is negative becomes 0."""

    def scales(self, rows: torch.Tensor, fmt: Format, factor: Factor = 1.0) -> Scales:
        """Return max(w, 0) / (2^b - 1)."""
        top = rows.amax(1, keepdim=True).clamp_min(0.0) * factor
        return Scales(as_half(top / (2**fmt.bits - 1)))

    def nearest(self, scaled: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return rounded numbers inside the range of the bits."""
        return scaled.round_().clamp_(0, 2**fmt.bits - 1)

    def codes(self, levels: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the integers."""
        return levels.to(torch.int16)

    def levels(self, codes: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the integers."""
        return codes.float()

    def lowest_code(self, fmt: Format) -> int:
        """Return 0."""
        return 0


INTEGERS = OnGrid(Integers())
UNSIGNED = OnGrid(UnsignedIntegers())


def _range(rows: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    if fmt.symmetric:
        largest = rows.abs().amax(1, keepdim=True)
        return -largest, largest
    # not aminmax, which is ten times as slow as both on one thread
    return rows.amin(1, keepdim=True).clamp_max(0.0), rows.amax(1, keepdim=True).clamp_min(0.0)


def _wide_scale(high: torch.Tensor) -> torch.Tensor:
    """Return the scale of the int8 tensor, of which narrower ones are powers of two times."""
    return as_half(high / (2 ** (_WIDE - 1) - 1))
