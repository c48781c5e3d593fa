"""Activations as kernels see them: each sample in its own range, or all in a calibrated one."""

from __future__ import annotations

import torch

from mpq.core.formats import Format
from mpq.nn.quantizers.log import log2, logsqrt2
from mpq.nn.quantizers.twin import twin

_OTHERS = {"log2": log2, "logsqrt2": logsqrt2, "twin": twin}


def fake_quantize_activation(
    values: torch.Tensor, fmt: Format, limits: tuple[float, float] | None = None
) -> torch.Tensor:
    """Return activations as an integer kernel sees them.

    `limits` is a calibrated range (static); without it each sample (first axis) takes its own
    range, as dynamic kernels do at batch one. The range always holds zero. Computed in float32
    or wider, as kernels do; the result has the dtype of `values`.
    """
    if fmt.is_native:
        return values
    dtype = values.dtype
    values = values.to(torch.promote_types(dtype, torch.float32))
    if fmt.family in _OTHERS:
        return _OTHERS[fmt.family](values, fmt, limits).to(dtype)
    if limits is None:
        flat = values.flatten(1) if values.ndim > 1 else values.reshape(1, -1)
        shape = (-1,) + (1,) * (values.ndim - 1)
        low = flat.amin(1).clamp_max(0.0).reshape(shape)
        high = flat.amax(1).clamp_min(0.0).reshape(shape)
    else:
        low, high = values.new_tensor(limits[0]), values.new_tensor(limits[1])
    if fmt.symmetric:
        largest = torch.maximum(-low, high)
        top = max(2 ** (fmt.bits - 1) - 1, 1)
        scale = (largest / top).clamp_min(1e-12)
        rounded = (values / scale).round().clamp(-top - 1, top)
        return torch.mul(rounded, scale).to(dtype)
    steps = 2**fmt.bits - 1
    scale = ((high - low) / steps).clamp_min(1e-12)
    zero = (-low / scale).round()
    rounded = (values / scale + zero).round().clamp(0, steps)
    return torch.mul(rounded - zero, scale).to(dtype)
