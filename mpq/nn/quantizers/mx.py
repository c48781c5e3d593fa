"""OCP microscaling: blocks of 32 elements with a scale that is a power of two, in a byte (E8M0).

The scale is 2^(floor(log2 max|w|) - E), E the exponent of the largest element, and elements that
are then too large saturate (OCP MX v1.0, section 6.3). The elements are minifloats, or (mxint8)
q / 64 with q in -127 to 127; -128 is left out, as the standard allows, so that what was read back
has the same scale. Blocks run along the weights of an output channel.
"""

from __future__ import annotations

import torch

from mpq.core.formats import Format
from mpq.nn.quantizers.bfp import FractionElements
from mpq.nn.quantizers.exponents import ExponentScales, floor_log2, power_of_two
from mpq.nn.quantizers.family import Factor
from mpq.nn.quantizers.grid import OnGrid, Scales
from mpq.nn.quantizers.minifloat import MinifloatElements, largest_exponent
from mpq.nn.quantizers.rows import largest_of


class Microscaling(ExponentScales):
    """The grid of family "mx"."""

    def scales(self, rows: torch.Tensor, fmt: Format, factor: Factor = 1.0) -> Scales:
        """Return 2^(floor(log2 max|w|) - E)."""
        top = 0 if fmt.variant == "int" else largest_exponent(fmt)
        return Scales(power_of_two(floor_log2(largest_of(rows) * factor) - top))

    def nearest(self, scaled: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the nearest elements."""
        return _elements(fmt).nearest(scaled, zero, fmt)

    def codes(self, levels: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the codes of elements."""
        return _elements(fmt).codes(levels, zero, fmt)

    def levels(self, codes: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the elements."""
        return _elements(fmt).levels(codes, zero, fmt)

    def lowest_code(self, fmt: Format) -> int:
        """Return 0, of integers -128."""
        return _elements(fmt).lowest_code(fmt)


MICROSCALING = OnGrid(Microscaling())

_MINIFLOATS, _FRACTIONS = MinifloatElements(), FractionElements()


def _elements(fmt: Format) -> MinifloatElements | FractionElements:
    return _FRACTIONS if fmt.variant == "int" else _MINIFLOATS
