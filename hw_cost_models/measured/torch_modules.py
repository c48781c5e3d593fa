"""Kernels of torch's quantized engine as modules that TorchScript compiles, stores and loads.

What is timed and what is deployed are the same modules. A stored one holds codes in one byte and
scales in two; weights are packed for the processor's kernels when it is made and when it is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from mpq.core.formats import Format
from mpq.core.layers import Convolution

ENGINE = "x86"
REDUCED_BITS = 7  # of activations that meet signed 8-bit weights in a saturating multiply-add
_SMALLEST = 1e-12  # scale


class Steps(NamedTuple):
    """A static range of activations: x ~ scale * (code - zero), code in [0, top]."""

    scale: float
    zero: int
    top: int

    @classmethod
    def over(cls, limits: tuple[float, float], fmt: Format) -> Steps:
        """Return the steps that `mpq.nn.quantizers.fake_quantize_activation` rounds to.

        A symmetric code is stored with half of its levels added, as kernels count from zero.
        """
        low, high = torch.tensor(limits[0]), torch.tensor(limits[1])
        top = 2**fmt.bits - 1
        if fmt.symmetric:
            scale = (torch.maximum(-low, high) / (top // 2)).clamp_min(_SMALLEST)
            return cls(float(scale), (top + 1) // 2, top)
        scale = ((high - low) / top).clamp_min(_SMALLEST)
        return cls(float(scale), int((-low / scale).round()), top)


@contextmanager
def engine() -> Iterator[None]:
    """Pack weights for the engine; which one runs them is a part of the packed weights."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = ENGINE
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


@contextmanager
def quiet() -> Iterator[None]:
    """Hide that torch will drop quantized tensors and TorchScript: this release has both."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*(quantized tensor|torch\.jit\.).*deprecated")
        yield


def _quantized(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return a weight w ~ scale * code of int8 codes, one scale per output channel or one."""
    if scales.numel() == 1:
        return torch._make_per_tensor_quantized_tensor(codes, float(scales), 0)
    zeros = torch.zeros(scales.shape, dtype=torch.int64)
    return torch._make_per_channel_quantized_tensor(codes, scales.double(), zeros, 0)


_LinearState = tuple[
    tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],  # codes, scales, bias
    tuple[float, float, int, bool],
]


class DynamicLinear(nn.Module):
    """quantized::linear_dynamic: activations of the whole tensor in 7 bits, found at run time."""

    def __init__(
        self, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.scales = scales.half()
        self.packed = torch.ops.quantized.linear_prepack(_quantized(codes, scales), bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product of float32 activations (..., inputs)."""
        y: torch.Tensor = torch.ops.quantized.linear_dynamic(x, self.packed, reduce_range=True)
        return y

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, bool]:
        weight, bias = torch.ops.quantized.linear_unpack(self.packed)
        return weight.int_repr(), self.scales, bias, self.training

    @torch.jit.export
    def __setstate__(
        self, state: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, bool]
    ) -> None:
        self.scales = state[1]
        self.packed = torch.ops.quantized.linear_prepack(_quantized(state[0], state[1]), state[2])
        self.training = state[3]


class StaticLinear(nn.Module):
    """quantized::linear_with_input_q_dq_qweight_dq_output_fp32: activations in a static range.

    Nothing of the output is rounded.
    """

    __constants__ = ("clamped",)

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        inputs: Steps,
    ) -> None:
        super().__init__()
        self.clamped = inputs.top < 255  # as in StaticConvolution
        self.scale, self.zero = inputs.scale, inputs.zero
        self.largest = inputs.scale * (inputs.top - inputs.zero)
        self.scales = scales.half()
        self.packed = torch.ops.quantized.linear_prepack(_quantized(codes, scales), bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product of float32 activations (..., inputs)."""
        if self.clamped:
            x = torch.clamp(x, -self.scale * self.zero, self.largest)
        y: torch.Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x, self.scale, self.zero, self.packed
        )
        return y

    @torch.jit.export
    def __getstate__(self) -> _LinearState:
        weight, bias = torch.ops.quantized.linear_unpack(self.packed)
        steps = (self.scale, self.largest, self.zero, self.training)
        return (weight.int_repr(), self.scales, bias), steps

    @torch.jit.export
    def __setstate__(self, state: _LinearState) -> None:
        codes, self.scales, bias = state[0]
        self.scale, self.largest, self.zero, self.training = state[1]
        self.packed = torch.ops.quantized.linear_prepack(_quantized(codes, self.scales), bias)


class HalfLinear(nn.Module):
    """quantized::linear_dynamic_fp16: weights in fp16, all else in fp32."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product of float32 activations (..., inputs)."""
        y: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return y

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
        weight, bias = torch.ops.quantized.linear_unpack_fp16(self.packed)
        return weight.half(), bias, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, torch.Tensor | None, bool]) -> None:
        self.packed = torch.ops.quantized.linear_prepack_fp16(state[0].float(), state[1])
        self.training = state[2]


_State = tuple[
    tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],  # codes, scales, bias
    tuple[float, float, float],
    tuple[int, int, int, bool],
    tuple[list[int], list[int], list[int], list[int]],
]


class StaticConvolution(nn.Module):
    """quantize_per_tensor, quantized::conv1d or conv2d, and dequantize.

    The output, with the bias, is rounded to 8 bits of a static range and returned in the layout
    of torch's own convolutions: it fits in their place, whatever the neighbours are.
    """

    __constants__ = ("clamped", "flat", "padded")

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        conv: Convolution,
        inputs: Steps,
        outputs: Steps,
    ) -> None:
        super().__init__()
        self.flat, self.padded = len(conv.kernel) == 1, bool(conv.padding_end)
        # A byte holds more than reduced codes, and values outside of the range would reach them.
        self.clamped = inputs.top < 255
        self.scale, self.zero = inputs.scale, inputs.zero
        self.largest = inputs.scale * (inputs.top - inputs.zero)
        self.out_scale, self.out_zero = outputs.scale, outputs.zero
        self.stride, self.dilation, self.groups = (
            list(conv.stride),
            list(conv.dilation),
            conv.groups,
        )
        ends = zip(reversed(conv.padding), reversed(conv.padding_end or conv.padding), strict=True)
        self.sides = [side for pair in ends for side in pair]
        self.padding = [0] * len(conv.padding) if self.padded else list(conv.padding)
        self.scales = scales.half()
        self.packed = self._packed(_quantized(codes, scales), bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the convolution of float32 activations."""
        if self.padded:
            x = nn.functional.pad(x, self.sides)
        codes = torch.quantize_per_tensor(x, self.scale, self.zero, torch.quint8)
        if self.clamped:
            codes = torch.clamp(codes, -self.scale * self.zero, self.largest)
        if self.flat:
            y = torch.ops.quantized.conv1d(codes, self.packed, self.out_scale, self.out_zero)
        else:
            y = torch.ops.quantized.conv2d(codes, self.packed, self.out_scale, self.out_zero)
        found: torch.Tensor = torch.dequantize(y.contiguous())
        return found

    def _packed(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        spans = self.stride, self.padding, self.dilation, self.groups
        if self.flat:
            return torch.ops.quantized.conv1d_prepack(weight, bias, *spans)
        return torch.ops.quantized.conv2d_prepack(weight, bias, *spans)

    @torch.jit.export
    def __getstate__(self) -> _State:
        if self.flat:
            weight, bias = torch.ops.quantized.conv1d_unpack(self.packed)
        else:
            weight, bias = torch.ops.quantized.conv2d_unpack(self.packed)
        return (
            (weight.int_repr().contiguous(), self.scales, bias),
            (self.scale, self.largest, self.out_scale),
            (self.zero, self.out_zero, self.groups, self.training),
            (self.stride, self.padding, self.dilation, self.sides),
        )

    @torch.jit.export
    def __setstate__(self, state: _State) -> None:
        codes, self.scales, bias = state[0]
        self.scale, self.largest, self.out_scale = state[1]
        self.zero, self.out_zero, self.groups, self.training = state[2]
        self.stride, self.padding, self.dilation, self.sides = state[3]
        weight = _quantized(codes, self.scales)
        if self.flat:
            self.packed = torch.ops.quantized.conv1d_prepack(
                weight, bias, self.stride, self.padding, self.dilation, self.groups
            )
        else:
            self.packed = torch.ops.quantized.conv2d_prepack(
                weight, bias, self.stride, self.padding, self.dilation, self.groups
            )
