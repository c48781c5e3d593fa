"""A layer as a module of torch: its own in fp32, or one of the quantized engine's."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from hw_cost_models.measured.capability import linear_rows
from hw_cost_models.measured.torch_modules import (
    DynamicLinear,
    HalfLinear,
    StaticConvolution,
    StaticLinear,
    Steps,
    engine,
    quiet,
)
from mpq.core.formats import FP32, Format, PerTensor, Scheme
from mpq.core.layers import Layer

OUTPUT = Format(family="int", bits=8, granularity=PerTensor(), symmetric=False)  # of a convolution
Limits = tuple[float, float]
_OUTLIER = 4.0  # standard deviations that a static range covers


def kernel_input(layer: Layer, generator: torch.Generator) -> torch.Tensor:
    """Return standard normal inputs, or indices, of the shape that the kernel takes."""
    if layer.kind == "embedding":
        rows = (linear_rows(layer),)
        return torch.randint(0, layer.weight_shape[0], rows, generator=generator)
    linear = layer.kind == "linear"
    shape = (linear_rows(layer), layer.weight_shape[1]) if linear else layer.input_shape
    return torch.randn(shape, generator=generator)


def make_kernel(layer: Layer, scheme: Scheme, weight: torch.Tensor) -> nn.Module:
    """Return the layer as a module without bias, on packed weights of its own.

    Static ranges are those of standard normal inputs. `scheme` must have a kernel.
    """
    if scheme == Scheme(FP32):
        return native_module(layer, weight.clone())
    if scheme.weights.is_native:
        return packed_kernel(layer, scheme, weight)
    spread = _OUTLIER * float(weight[0].numel() ** 0.5 * weight.square().mean().sqrt())
    limits = (-_OUTLIER, _OUTLIER), (-spread, spread)
    codes, scales = _rounded(weight, scheme)
    return packed_kernel(layer, scheme, codes, scales, limits=limits)


def packed_kernel(
    layer: Layer,
    scheme: Scheme,
    weight: torch.Tensor,
    scales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    limits: tuple[Limits, Limits | None] | None = None,
) -> nn.Module:
    """Return the quantized layer as a module that TorchScript compiles and stores.

    `weight` has the layer's shape: int8 codes with `scales`, (channels,) or (1,), or float32
    values of a native format. `limits` are the static ranges of the input and, of convolutions,
    the output (with bias).
    `scheme` must have a kernel and not be fp32.
    """
    with engine(), quiet():
        if scales is None:
            return HalfLinear(weight, bias)
        if layer.kind == "linear" and not scheme.activations.static:
            return DynamicLinear(weight, scales, bias)
        assert limits is not None, layer.name
        inputs = Steps.over(limits[0], scheme.activations)
        if layer.kind == "linear":
            return StaticLinear(weight, scales, bias, inputs)
        assert layer.convolution is not None, layer.name
        assert limits[1] is not None, layer.name
        outputs = Steps.over(limits[1], OUTPUT)
        return StaticConvolution(weight, scales, bias, layer.convolution, inputs, outputs)


def native_module(layer: Layer, weight: torch.Tensor) -> nn.Module:
    """Return torch's own module of the layer, without bias."""
    outputs, inputs = weight.shape[:2]
    with torch.device("meta"):  # nothing is drawn
        if layer.kind == "linear":
            module: Any = nn.Linear(inputs, outputs, bias=False)
        elif layer.kind == "embedding":
            module = nn.Embedding(outputs, inputs)
        else:
            module = _native_convolution(layer)
    module.weight = nn.Parameter(weight, requires_grad=False)
    conv = layer.convolution
    if conv is None or not conv.padding_end:
        return cast(nn.Module, module)
    ends = zip(reversed(conv.padding), reversed(conv.padding_end), strict=True)
    return nn.Sequential(_Padding([side for pair in ends for side in pair]), module)


def _native_convolution(layer: Layer) -> nn.Module:
    conv = layer.convolution
    assert conv is not None, layer.name
    turned = layer.kind == "conv_transpose2d"
    first, second = layer.weight_shape[0], layer.weight_shape[1] * conv.groups
    given: dict[str, Any] = {
        "kernel_size": conv.kernel,
        "stride": conv.stride,
        "padding": 0 if conv.padding_end else conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "bias": False,
    }
    if turned:
        return nn.ConvTranspose2d(first, second, **given | {"output_padding": conv.output_padding})
    return (nn.Conv1d if layer.kind == "conv1d" else nn.Conv2d)(second, first, **given)


class _Padding(nn.Module):
    def __init__(self, sides: list[int]) -> None:
        super().__init__()
        self.sides = sides

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, self.sides)


def _rounded(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales of a symmetric signed 8-bit weight, w ~ scale * code."""
    per_tensor = isinstance(scheme.weights.granularity, PerTensor)
    rows = weight.reshape(1 if per_tensor else len(weight), -1)
    scales = (rows.abs().amax(1) / 127).clamp(min=1e-12)
    codes = (rows / scales[:, None]).round().to(torch.int8)
    return codes.reshape(weight.shape), scales
