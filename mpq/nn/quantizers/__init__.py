"""Quantize and dequantize tensors, one family of formats per file."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mpq.core.formats import ChannelAxis, Format
from mpq.core.jobs import Clip
from mpq.nn.quantizers.integer import (
    IntegerWeight,
    Range,
    clip_range,
    fake_quantize_activation,
    quantize_weight,
)

QUANTIZER_VERSION = 2  # part of every content key: raise it when a format stores other values

_NATIVE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class WeightQuantizer:
    """Stores the weights of one network in any format; searches each clipping range once.

    `ranges` holds what was searched, by the name of the parameter and the format, and travels
    with the quantizer, so that workers do not search again.
    """

    clip: Clip = "minmax"
    ranges: dict[tuple[str, Format], Range] = field(default_factory=dict)

    def store(
        self, name: str, weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis = 0
    ) -> IntegerWeight:
        """Return codes and scales of the parameter `name` in an integer format."""
        key = (name, fmt)
        if self.clip == "mse" and key not in self.ranges:
            self.ranges[key] = clip_range(weight, fmt, channel_axis)
        return quantize_weight(weight, fmt, channel_axis, self.ranges.get(key))

    def fake_quantize(
        self, name: str, weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis = 0
    ) -> torch.Tensor:
        """Return the parameter `name` as it reads back from `fmt`, in its own dtype."""
        if fmt.is_native:
            return weight.to(_NATIVE[fmt.family]).to(weight.dtype)
        return self.store(name, weight, fmt, channel_axis).dequantize().to(weight.dtype)


__all__ = [
    "IntegerWeight",
    "WeightQuantizer",
    "clip_range",
    "fake_quantize_activation",
    "quantize_weight",
]
