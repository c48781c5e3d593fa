"""FlexRound: each weight is divided by a learned number of its own before it is rounded.

Our reading of Lee et al. 2023 (2306.00317): w ~ s1 round(w / (s1 S2 s3)), with the scale s1, S2 of
the weight's shape and s3 of each output channel all learned, S2 and s3 one at first, which is
rounding to nearest; rounding passes gradients straight through.
"""

from __future__ import annotations

import torch

from mpq.core.formats import Format
from mpq.core.granularity import ChannelAxis
from mpq.nn.quantizers.family import Factor
from mpq.nn.quantizers.grid import Scales, as_half
from mpq.nn.quantizers.integer import INTEGERS
from mpq.nn.quantizers.rows import channels_of, from_rows, rows_of
from mpq.nn.quantizers.stored import StoredWeight


class FlexRound:
    """The rounding of one weight of integers; zero points are those of nearest."""

    learning_rate = 1e-2
    anneals = False

    def __init__(
        self, weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis, factor: Factor
    ) -> None:
        own = weight.detach().float()
        self._rows = rows_of(own, fmt.granularity, channel_axis)
        self._scales: Scales = INTEGERS.grid.scales(self._rows, fmt, factor)
        self._of = (fmt, tuple(weight.shape), channel_axis)
        self._channels = len(channels_of(own, channel_axis))
        # Logarithms, so that what is learned stays positive.
        self._grid = torch.zeros_like(self._scales.scale).requires_grad_()
        self._each = torch.zeros_like(self._rows).requires_grad_()
        self._channel = self._rows.new_zeros(self._channels, 1).requires_grad_()

    def parameters(self) -> list[torch.Tensor]:
        """Return the logarithms of s1 (over that of nearest), S2 and s3."""
        return [self._grid, self._each, self._channel]

    def weight(self) -> torch.Tensor:
        """Return the rounded weight; its gradient is as if nothing had been rounded."""
        _, shape, axis = self._of
        levels, scale = self._levels()
        return from_rows(levels * scale, shape, axis)

    def penalty(self, done: float) -> torch.Tensor:
        """Return nothing."""
        return self._each.new_zeros(())

    def stored(self) -> StoredWeight:
        """Return the weight as it is rounded now."""
        with torch.no_grad():
            levels, scale = self._levels()
            return INTEGERS.of_levels(levels, self._scales._replace(scale=scale), *self._of)

    def _levels(self) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self._scales.scale * self._grid.exp()
        scale = scale + (as_half(scale) - scale).detach()
        divisor = self._each.reshape(self._channels, -1) + self._channel
        scaled = self._rows / (scale * divisor.exp().reshape(self._rows.shape))
        fmt, zero = self._of[0], self._scales.zero
        inside = INTEGERS.grid.nearest(scaled.detach().clone(), zero, fmt)
        # No gradient where the range cuts: no small change of the divisor changes the level.
        free = (scaled.detach() - inside).abs() <= 0.5
        return inside + torch.where(free, scaled - scaled.detach(), 0.0), scale
