"""Bipolar integers: sum (2 b_i - 1) 2^i over the bits b_i of a code, that is all odd integers.

The levels are -(2^n - 1) to 2^n - 1 and the scale max|w| / (2^n - 1), in IEEE half. There is no
zero; n bits cost one multiplication of bit planes less than the n + 1 of two's complement
(APT-LLM, our reading of its bipolar-INT).
"""

from __future__ import annotations

import torch

from mpq.core.formats import Format
from mpq.nn.quantizers.family import Factor
from mpq.nn.quantizers.grid import HalfScales, OnGrid, Scales, as_half
from mpq.nn.quantizers.rows import largest_of


class Bipolar(HalfScales):
    """The grid of family "bipolar"."""

    def scales(self, rows: torch.Tensor, fmt: Format, factor: Factor = 1.0) -> Scales:
        """Return max|w| / (2^n - 1)."""
        return Scales(as_half(largest_of(rows) * factor / _top(fmt)))

    def nearest(self, scaled: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the nearest odd numbers inside the range; even numbers go up."""
        half = 2 ** (fmt.bits - 1)
        return scaled.mul_(0.5).floor_().clamp_(-half, half - 1).mul_(2).add_(1)

    def codes(self, levels: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the bits b_i as a number."""
        return ((levels + _top(fmt)) / 2).to(torch.int16)

    def levels(self, codes: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
        """Return the odd numbers."""
        return 2 * codes.float() - _top(fmt)

    def lowest_code(self, fmt: Format) -> int:
        """Return 0."""
        return 0


BIPOLAR = OnGrid(Bipolar())


def _top(fmt: Format) -> int:
    return (1 << fmt.bits) - 1
