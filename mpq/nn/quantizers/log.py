"""Logarithmic activations: each code is a power of two, or of its root, below the largest value.

- "log2" (FQ-ViT, Lin et al., 2022): q = round(-log2(x / d)), read as d 2^-q.
- "logsqrt2" (RepQ-ViT, Li et al., ICCV 2023; RepQuant): q = round(-2 log2(x / d)), read as
  d 2^-ceil(q / 2), times the root of two where q is odd.

d is the largest value: of the sample, or of the calibration data (values above it are read as d).
Our reading: the last code, 2^b - 1, stands for zero and takes all values that small, all zeros and
all that is negative, so that b bits hold the zeros of masks and paddings exactly.
"""

from __future__ import annotations

import torch

from mpq.core.formats import Format

_SMALLEST = 1e-30  # a sample of zeros needs some largest value


def log2(
    values: torch.Tensor, fmt: Format, limits: tuple[float, float] | None = None
) -> torch.Tensor:
    """Return values (samples first; float32 or wider) rounded to powers of two below d."""
    levels = [2.0**-q for q in range(2**fmt.bits - 1)]
    return _rounded(values, limits, 1.0, levels)


def logsqrt2(
    values: torch.Tensor, fmt: Format, limits: tuple[float, float] | None = None
) -> torch.Tensor:
    """Return values (samples first; float32 or wider) rounded to powers of the root of two."""
    levels = [2.0 ** -((q + 1) // 2) * 2.0 ** (q % 2 / 2) for q in range(2**fmt.bits - 1)]
    return _rounded(values, limits, 2.0, levels)


def _rounded(
    values: torch.Tensor, limits: tuple[float, float] | None, steps: float, levels: list[float]
) -> torch.Tensor:
    """Return the level of -steps log2(x / d), times d; past the last level zero."""
    if limits is None:
        flat = values.flatten(1) if values.ndim > 1 else values.reshape(1, -1)
        largest = flat.amax(1).reshape((-1,) + (1,) * (values.ndim - 1))
    else:
        largest = values.new_tensor(limits[1])
    largest = largest.clamp_min(_SMALLEST)
    places = (values / largest).clamp_(0.0, 1.0).log2_().mul_(-steps).round_()
    places = places.clamp_max_(len(levels)).to(torch.int32).clamp_(0, len(levels))
    table = values.new_tensor([*levels, 0.0])
    return table.index_select(0, places.reshape(-1)).reshape(values.shape).mul_(largest)
