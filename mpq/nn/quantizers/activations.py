"""Activations as kernels see them: each sample in its own range, or all in a calibrated one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mpq.core.errors import InvalidInputError
from mpq.core.formats import Format, PerGroup
from mpq.nn.quantizers.bfp import BLOCK_FLOATING_POINT
from mpq.nn.quantizers.bipolar import BIPOLAR
from mpq.nn.quantizers.exponents import power_of_two
from mpq.nn.quantizers.fixed import FIXED, covering_exponent
from mpq.nn.quantizers.grid import Grid
from mpq.nn.quantizers.integer import UNSIGNED
from mpq.nn.quantizers.log import log2, logsqrt2
from mpq.nn.quantizers.minifloat import MINIFLOATS, largest_level
from mpq.nn.quantizers.mx import MICROSCALING
from mpq.nn.quantizers.nvfp4 import NVFP4, block_scale, tensor_scale
from mpq.nn.quantizers.rows import largest_of
from mpq.nn.quantizers.twin import twin

Limits = tuple[float, float] | None
OfActivations = Callable[[torch.Tensor, Format, Limits], torch.Tensor]

_SMALLEST_SCALE = 2.0**-126  # of what is all zeros; the smallest normal float32


def fake_quantize_activation(
    values: torch.Tensor, fmt: Format, limits: tuple[float, float] | None = None
) -> torch.Tensor:
    """Return activations as a kernel of the format sees them.

    `limits` is a calibrated range (static); without it each sample (first axis) takes its own
    range, as dynamic kernels do at batch one. The range always holds zero. Formats of blocks
    (mx, nvfp4, bfp) have their scales along the last axis, always of the values themselves; only
    the second scale of nvfp4 is that of the range. Computed in float32 or wider, as kernels do;
    the result has the dtype of `values`, which are left as they are.
    Raises InvalidInputError (`group_size`) where blocks do not divide the last axis.
    """
    if fmt.is_native:
        return values
    wide = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    return OF_ACTIVATIONS[fmt.family](wide, fmt, limits).to(values.dtype)


def range_of(values: torch.Tensor, limits: Limits) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lowest and highest value of each sample, zero between, to broadcast; or limits."""
    if limits is not None:
        return values.new_tensor(limits[0]), values.new_tensor(limits[1])
    flat = _samples(values)
    shape = (-1,) + (1,) * (values.ndim - 1)
    low = flat.amin(1).clamp_max(0.0).reshape(shape)
    return low, flat.amax(1).clamp_min(0.0).reshape(shape)


def _integers(values: torch.Tensor, fmt: Format, limits: Limits) -> torch.Tensor:
    low, high = range_of(values, limits)
    if fmt.symmetric:
        largest = torch.maximum(-low, high)
        top = max(2 ** (fmt.bits - 1) - 1, 1)
        scale = (largest / top).clamp_min(1e-12)
        rounded = (values / scale).round().clamp(-top - 1, top)
        return torch.mul(rounded, scale)
    steps = 2**fmt.bits - 1
    scale = ((high - low) / steps).clamp_min(1e-12)
    zero = (-low / scale).round()
    rounded = (values / scale + zero).round().clamp(0, steps)
    return torch.mul(rounded - zero, scale)


def _unsigned(values: torch.Tensor, fmt: Format, limits: Limits) -> torch.Tensor:
    _, high = range_of(values, limits)
    return _on_grid(values, UNSIGNED.grid, fmt, high / (2**fmt.bits - 1))


def _floats(values: torch.Tensor, fmt: Format, limits: Limits) -> torch.Tensor:
    low, high = range_of(values, limits)
    largest = torch.maximum(-low, high)
    return _on_grid(values, MINIFLOATS.grid, fmt, largest / largest_level(fmt))


def _bipolar(values: torch.Tensor, fmt: Format, limits: Limits) -> torch.Tensor:
    low, high = range_of(values, limits)
    largest = torch.maximum(-low, high)
    return _on_grid(values, BIPOLAR.grid, fmt, largest / (2**fmt.bits - 1))


def _fixed(values: torch.Tensor, fmt: Format, limits: Limits) -> torch.Tensor:
    """Round; an exponent to search is of the sample's least error, or covers the limits."""
    if fmt.variant and limits is not None:
        largest = values.new_tensor(max(-limits[0], limits[1]))
        scale = power_of_two(covering_exponent(largest, fmt))
    else:
        shape = (-1,) + (1,) * (values.ndim - 1)
        scale = FIXED.grid.scales(_samples(values), fmt).scale.reshape(shape)
    return _on_grid(values, FIXED.grid, fmt, scale)


def _microscaling(values: torch.Tensor, fmt: Format, limits: Limits) -> torch.Tensor:
    return _in_blocks(values, MICROSCALING.grid, fmt)


def _block_floating_point(values: torch.Tensor, fmt: Format, limits: Limits) -> torch.Tensor:
    return _in_blocks(values, BLOCK_FLOATING_POINT.grid, fmt)


def _two_scales(values: torch.Tensor, fmt: Format, limits: Limits) -> torch.Tensor:
    low, high = range_of(values, limits)
    rows = _blocks(values, fmt)
    shared = tensor_scale(torch.maximum(-low, high)).reshape(-1, 1)
    if shared.shape[0] > 1:
        shared = shared.repeat_interleave(len(rows) // len(shared), 0)
    scale = block_scale(largest_of(rows), shared) * shared
    return _on_grid(rows, NVFP4.grid, fmt, scale).reshape(values.shape)


OF_ACTIVATIONS: dict[str, OfActivations] = {
    "int": _integers,
    "uint": _unsigned,
    "float": _floats,
    "bipolar": _bipolar,
    "fixed": _fixed,
    "mx": _microscaling,
    "nvfp4": _two_scales,
    "bfp": _block_floating_point,
    "log2": log2,
    "logsqrt2": logsqrt2,
    "twin": twin,
}


def _on_grid(values: torch.Tensor, grid: Grid, fmt: Format, scale: torch.Tensor) -> torch.Tensor:
    scale = scale.clamp_min(_SMALLEST_SCALE)
    return grid.nearest(values / scale, None, fmt).mul_(scale)


def _in_blocks(values: torch.Tensor, grid: Grid, fmt: Format) -> torch.Tensor:
    rows = _blocks(values, fmt)
    scale = grid.scales(rows, fmt).scale
    return grid.nearest(rows / scale, None, fmt).mul_(scale).reshape(values.shape)


def _blocks(values: torch.Tensor, fmt: Format) -> torch.Tensor:
    assert isinstance(fmt.granularity, PerGroup)
    size, last = fmt.granularity.size, values.shape[-1] if values.ndim else 1
    if last % size:
        raise InvalidInputError(
            "group_size",
            f"blocks of {size} ({fmt.text('activations')}) do not divide the {last} activations of "
            f"the last axis (shape {list(values.shape)})",
        )
    return values.reshape(-1, size)


def _samples(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(1) if values.ndim > 1 else values.reshape(1, -1)
