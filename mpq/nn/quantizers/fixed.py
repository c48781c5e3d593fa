"""Fixed point: integers of b bits times 2^-f, without scales or with one exponent of the tensor.

"fixed(WL,IL)": w ~ clip(round(w 2^f), -2^(b-1), 2^(b-1) - 1) / 2^f, b = WL, f = WL - IL; nothing
but codes is stored. "fixed(WL)" searches the exponent with the least squared error, as QFX learns
it, from the smallest that holds max|w| downwards, and stores it in a byte. Whatever the factor of
the range: the search looks at clipping already.
"""

from __future__ import annotations

import torch

from mpq.core.formats import Format
from mpq.nn.quantizers.exponents import ExponentScales, floor_log2, power_of_two
from mpq.nn.quantizers.family import Factor
from mpq.nn.quantizers.grid import OnGrid, Scales
from mpq.nn.quantizers.rows import largest_of
from mpq.nn.quantizers.stored import StoredWeight

_CANDIDATES = 5  # exponents that are tried


class FixedPoint(ExponentScales):
    """The grid of family "fixed"."""

    def scales(self, rows: torch.Tensor, fmt: Format, factor: Factor = 1.0) -> Scales:
        """Return 2^-f, or that of the rows' least error; cost: 5 passes over the rows."""
        if not fmt.variant:
            return Scales(_given(fmt).to(rows.device))
        exponent = covering_exponent(largest_of(rows), fmt)
        best = power_of_two(exponent)
        error = torch.full_like(best, torch.inf, dtype=rows.dtype)
        for lower in range(_CANDIDATES):
            tried = power_of_two(exponent - lower)
            off = self.nearest(rows / tried, None, fmt).mul_(tried).sub_(rows)
            tried_error = off.square_().sum(1, keepdim=True)
            better = tried_error < error
            best, error = (
                torch.where(better, tried, best),
                torch.where(better, tried_error, error),
            )
        return Scales(best)

    def nearest(self, scaled: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return rounded numbers inside the range of the bits."""
        half = 2 ** (fmt.bits - 1)
        return scaled.round_().clamp_(-half, half - 1)

    def codes(self, levels: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the integers."""
        return levels.to(torch.int16)

    def levels(self, codes: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the integers."""
        return codes.float()

    def lowest_code(self, fmt: Format) -> int:
        """Return -2^(b-1)."""
        return -(1 << (fmt.bits - 1))

    def pack_scales(self, stored: StoredWeight) -> dict[str, torch.Tensor]:
        """Return the exponent that was searched, nothing if it is of the format."""
        return super().pack_scales(stored) if stored.fmt.variant else {}

    def unpack_scales(self, arrays: dict[str, torch.Tensor], fmt: Format) -> Scales:
        """Return the exponent that was searched, or that of the format."""
        return super().unpack_scales(arrays, fmt) if fmt.variant else Scales(_given(fmt))


FIXED = OnGrid(FixedPoint())


def covering_exponent(largest: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return the smallest e so that (2^(b-1) - 1) 2^e is at least `largest`."""
    top = (1 << (fmt.bits - 1)) - 1
    exponent = floor_log2(largest / top)
    return exponent + (power_of_two(exponent) * top < largest).to(torch.int32)


def _given(fmt: Format) -> torch.Tensor:
    return torch.full((1, 1), 2.0**-fmt.mantissa)
