"""A 16-bit branch of low rank beside a narrow format: W ~ L R + Q(W - L R).

SVDQuant (Li et al., ICLR 2025): the branch takes the largest singular values, so that what is
left has a smaller range. With calibration data the columns of W are weighed by the root mean
square d of their inputs first, L R = SVD_r(W diag(d)) diag(d)^-1, the best branch of the output
where inputs are uncorrelated; without data d = 1.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mpq.core.formats import Format
from mpq.core.granularity import ChannelAxis
from mpq.nn.quantizers.family import Factor, Family
from mpq.nn.quantizers.rows import channels_of, from_rows
from mpq.nn.quantizers.stored import LayerData, StoredWeight

_LEFT, _RIGHT = "left", "right"


class LowRankBranch:
    """A branch around another family, which stores what the branch leaves."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def store(
        self,
        weight: torch.Tensor,
        fmt: Format,
        channel_axis: ChannelAxis = 0,
        factor: Factor = 1.0,
        data: LayerData | None = None,
    ) -> StoredWeight:
        """Return the residual's codes with both factors of the branch in `extra`, IEEE half.

        Raises InvalidInputError (`rank`) for a rank above that of the weight.
        """
        fmt.parts(tuple(weight.shape), channel_axis)  # refuses a rank above that of the weight
        matrix = channels_of(weight.detach().float(), channel_axis)
        inputs = torch.ones(matrix.shape[1], device=matrix.device)
        if data is not None and data.gram is not None:
            inputs = data.gram.diagonal().float().clamp_min(0).sqrt()
            inputs = (inputs / inputs.mean().clamp_min(1e-30)).clamp_min(1e-3)
        left, values, right = torch.linalg.svd(matrix * inputs, full_matrices=False)
        root = values[: fmt.rank].sqrt()
        factors = {
            _LEFT: (left[:, : fmt.rank] * root).half().contiguous(),
            _RIGHT: (right[: fmt.rank] * root[:, None] / inputs).half().contiguous(),
        }
        rest = matrix - _product(factors)
        residual = from_rows(rest, tuple(weight.shape), channel_axis)
        stored = self._family.store(residual, fmt.low, channel_axis, factor, data)
        return replace(stored, fmt=fmt, extra={**stored.extra, **factors})

    def fake_quantize(
        self, weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis, factor: Factor = 1.0
    ) -> torch.Tensor:
        """Return the weight as it reads back, float32."""
        return self.dequantize(self.store(weight, fmt, channel_axis, factor))

    def dequantize(self, stored: StoredWeight) -> torch.Tensor:
        """Return the product of the branch and the residual that codes stand for."""
        rest = self._family.dequantize(_residual(stored))
        branch = from_rows(_product(dict(stored.extra)), stored.shape, stored.channel_axis)
        return branch + rest

    def pack(self, stored: StoredWeight) -> dict[str, torch.Tensor]:
        """Return the arrays of the residual, and both factors."""
        factors = {name: stored.extra[name] for name in (_LEFT, _RIGHT)}
        return {**self._family.pack(_residual(stored)), **factors}

    def unpack(
        self,
        arrays: dict[str, torch.Tensor],
        fmt: Format,
        shape: tuple[int, ...],
        channel_axis: ChannelAxis = 0,
    ) -> StoredWeight:
        """Return the stored weight of the arrays of a file."""
        factors = {name: arrays[name] for name in (_LEFT, _RIGHT)}
        own = {name: array for name, array in arrays.items() if name not in factors}
        stored = self._family.unpack(own, fmt.low, shape, channel_axis)
        return replace(stored, fmt=fmt, extra={**stored.extra, **factors})


def _product(factors: dict[str, torch.Tensor]) -> torch.Tensor:
    return factors[_LEFT].float() @ factors[_RIGHT].float()


def _residual(stored: StoredWeight) -> StoredWeight:
    extra = {k: v for k, v in stored.extra.items() if k not in (_LEFT, _RIGHT)}
    return replace(stored, fmt=stored.fmt.low, extra=extra)
