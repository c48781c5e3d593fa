"""NVFP4: blocks of 16 elements e2m1, a scale in e4m3 for each and one float32 for the tensor.

The scale of the tensor is max|w| / (448 x 6), so that the scale of the block with the largest
weight is the largest e4m3; that of a block is max|w| / 6 / (scale of the tensor), rounded to e4m3,
at least its smallest level 2^-9 (some libraries: 2^-6). Elements are divided by the product of
both, in float32, which is what `StoredWeight.scales` holds.
"""

from __future__ import annotations

import torch

from mpq.core.formats import Format
from mpq.nn.quantizers.family import Factor
from mpq.nn.quantizers.grid import OnGrid, Scales
from mpq.nn.quantizers.minifloat import MinifloatElements
from mpq.nn.quantizers.rows import largest_of
from mpq.nn.quantizers.stored import StoredWeight

_LARGEST_ELEMENT = 6.0
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-9, 448.0  # of e4m3
_SMALLEST_TENSOR_SCALE = 2.0**-100  # its product with a block's is a normal float32


class TwoScales(MinifloatElements):
    """The grid of family "nvfp4"."""

    def scales(self, rows: torch.Tensor, fmt: Format, factor: Factor = 1.0) -> Scales:
        """Return the products of both scales; `factor` shrinks the range of blocks only."""
        largest = largest_of(rows)
        shared = tensor_scale(largest.max())
        return Scales(block_scale(largest * factor, shared) * shared, shared=shared)

    def pack_scales(self, stored: StoredWeight) -> dict[str, torch.Tensor]:
        """Return the bytes of the blocks' scales and the scale of the tensor."""
        shared = stored.extra["tensor_scale"]
        scale = _as_e4m3(stored.scales.reshape(-1) / shared)
        return {"scales": scale.view(torch.uint8), "tensor_scale": shared.reshape(1)}

    def unpack_scales(self, arrays: dict[str, torch.Tensor], fmt: Format) -> Scales:
        """Return the products of both scales."""
        shared = arrays["tensor_scale"].float().reshape(())
        scale = arrays["scales"].view(torch.float8_e4m3fn).float().reshape(-1, 1)
        return Scales(scale * shared, shared=shared)


NVFP4 = OnGrid(TwoScales(), rows_share=True)


def tensor_scale(largest: torch.Tensor) -> torch.Tensor:
    """Return the scale of tensors of these largest magnitudes."""
    scale = largest / (_LARGEST_SCALE * _LARGEST_ELEMENT)
    return scale.clamp_min(_SMALLEST_TENSOR_SCALE)


def block_scale(largest: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Return the scales, exact in e4m3, of blocks of these largest magnitudes."""
    return _as_e4m3(largest / _LARGEST_ELEMENT / shared).to(largest.dtype)


def _as_e4m3(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float8_e4m3fn)
