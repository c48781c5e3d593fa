"""Scales that are powers of two, kept as their exponents in a byte (OCP's E8M0: e + 127).

2^-127 (byte 0) is no normal float32 and byte 255 is no number, so that neither is ever made.
"""

from __future__ import annotations

import torch

from mpq.core.formats import Format
from mpq.nn.quantizers.grid import Scales
from mpq.nn.quantizers.stored import StoredWeight

_BIAS = 127
_LEAST, _MOST = -126, 127
_FRACTION_BITS = 23  # of float32


def floor_log2(values: torch.Tensor) -> torch.Tensor:
    """Return floor(log2 x) of numbers >= 0 (int32), of zeros the smallest exponent."""
    exponent = torch.frexp(values).exponent - 1
    return torch.where(values > 0, exponent, _LEAST)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Return 2^e in float32, exact; exponents beyond what a byte keeps become the nearest."""
    byte = exponent.to(torch.int32).clamp(_LEAST, _MOST).add_(_BIAS)
    return byte.bitwise_left_shift_(_FRACTION_BITS).view(torch.float32)


class ExponentScales:
    """Scales of a grid that are stored as exponents of two."""

    def pack_scales(self, stored: StoredWeight) -> dict[str, torch.Tensor]:
        """Return one byte for each scale."""
        exponent = floor_log2(stored.scales.reshape(-1))
        return {"scales": exponent.add_(_BIAS).to(torch.uint8)}

    def unpack_scales(self, arrays: dict[str, torch.Tensor], fmt: Format) -> Scales:
        """Return the scales."""
        exponent = arrays["scales"].to(torch.int32) - _BIAS
        return Scales(power_of_two(exponent).reshape(-1, 1))
