"""AdaRound: up or down is learned for each weight, as a number that ends at 0 or 1.

Nagel et al. 2020 (2004.10568): w ~ s clip(floor(w / s) + h(V)), h(V) = clip(1.2 sigmoid(V) - 0.1),
V at first such that h(V) is the fraction of w / s; what keeps h off 0 and 1 is punished by
10 times the mean of 1 - |2 h - 1|^beta, with beta falling from 20 to 2 after the first fifth of
the steps.
"""

from __future__ import annotations

import torch

from mpq.core.formats import Format
from mpq.core.granularity import ChannelAxis
from mpq.nn.quantizers.family import Factor
from mpq.nn.quantizers.grid import Scales
from mpq.nn.quantizers.integer import INTEGERS
from mpq.nn.quantizers.rows import from_rows, rows_of
from mpq.nn.quantizers.stored import StoredWeight

_LOW, _HIGH = -0.1, 1.1
_WARM = 0.2
_STRENGTH = 10.0


class AdaRound:
    """The rounding of one weight of integers; scales are those of nearest."""

    learning_rate = 0.3
    anneals = True

    def __init__(
        self, weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis, factor: Factor
    ) -> None:
        rows = rows_of(weight.detach().float(), fmt.granularity, channel_axis)
        self._scales: Scales = INTEGERS.grid.scales(rows, fmt, factor)
        self._of = (fmt, tuple(weight.shape), channel_axis)
        scaled = rows / self._scales.scale
        self._floor = scaled.floor()
        share = (scaled - self._floor - _LOW) / (_HIGH - _LOW)
        self._v = torch.logit(share).requires_grad_()
        self._last: torch.Tensor | None = None

    def parameters(self) -> list[torch.Tensor]:
        """Return V."""
        return [self._v]

    def weight(self) -> torch.Tensor:
        """Return the weight between both roundings."""
        _, shape, axis = self._of
        up = self._up()
        self._last = up
        return from_rows(self._clipped(self._floor + up) * self._scales.scale, shape, axis)

    def penalty(self, done: float) -> torch.Tensor:
        """Return what is left to decide."""
        if done < _WARM:
            return self._v.new_zeros(())
        beta = 20.0 - 18.0 * (done - _WARM) / (1.0 - _WARM)
        up = self._up() if self._last is None else self._last
        return _STRENGTH * (1.0 - (2.0 * up - 1.0).abs().pow(beta)).mean()

    def stored(self) -> StoredWeight:
        """Return the weight with each h(V) at the nearer of 0 and 1."""
        with torch.no_grad():
            levels = self._clipped(self._floor + (self._v >= 0))
            return INTEGERS.of_levels(levels, self._scales, *self._of)

    def _up(self) -> torch.Tensor:
        return (self._v.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)

    def _clipped(self, levels: torch.Tensor) -> torch.Tensor:
        return _inside(levels, self._scales.zero, self._of[0])


def _inside(levels: torch.Tensor, zero: torch.Tensor | None, fmt: Format) -> torch.Tensor:
    """Return levels inside what the bits hold."""
    if zero is not None:
        return torch.minimum(torch.maximum(levels, -zero), 2**fmt.bits - 1 - zero)
    half = 2 ** (fmt.bits - 1)
    return levels.clamp(-half, half - 1)
