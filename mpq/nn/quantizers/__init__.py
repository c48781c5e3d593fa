"""Quantize and dequantize tensors, one family of formats per file.

Every family stores a weight (codes, scales and what else it needs), reads it back, and packs it
into the arrays of a file, which are as many bits as `Format.parts` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from mpq.core.errors import InvalidInputError
from mpq.core.formats import Format
from mpq.core.granularity import ChannelAxis
from mpq.core.jobs import Clip
from mpq.nn.quantizers.activations import fake_quantize_activation
from mpq.nn.quantizers.bfp import BLOCK_FLOATING_POINT
from mpq.nn.quantizers.binary import BINARY, DUAL_BINARY, RESIDUAL_BINARY
from mpq.nn.quantizers.bipolar import BIPOLAR
from mpq.nn.quantizers.codebook import BITSANDBYTES_FLOATS, NORMAL_FLOATS
from mpq.nn.quantizers.family import Factor, Family
from mpq.nn.quantizers.fixed import FIXED
from mpq.nn.quantizers.grid import OnGrid
from mpq.nn.quantizers.integer import INTEGERS, UNSIGNED
from mpq.nn.quantizers.kmeans import KMEANS
from mpq.nn.quantizers.low_rank import LowRankBranch
from mpq.nn.quantizers.minifloat import MINIFLOATS
from mpq.nn.quantizers.mixed import MixedChannels
from mpq.nn.quantizers.mx import MICROSCALING
from mpq.nn.quantizers.nvfp4 import NVFP4
from mpq.nn.quantizers.partial_binary import PARTIAL_BINARY
from mpq.nn.quantizers.reordered import Reordered
from mpq.nn.quantizers.stored import LayerData, StoredWeight
from mpq.nn.quantizers.ternary import TERNARY

QUANTIZER_VERSION = 2  # part of every content key: raise it when a format stores other values

_NATIVE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


FAMILIES: Mapping[str, Family] = {  # by family, or family and variant
    "int": INTEGERS,
    "uint": UNSIGNED,
    "fixed": FIXED,
    "bipolar": BIPOLAR,
    "float": MINIFLOATS,
    "mx": MICROSCALING,
    "nvfp4": NVFP4,
    "bfp": BLOCK_FLOATING_POINT,
    "bfp reordered": Reordered(BLOCK_FLOATING_POINT),
    "nf": NORMAL_FLOATS,
    "bnb": BITSANDBYTES_FLOATS,
    "kmeans": KMEANS,
    "ternary": TERNARY,
    "binary": BINARY,
    "binary residual": RESIDUAL_BINARY,
    "binary dual": DUAL_BINARY,
    "binary partial": PARTIAL_BINARY,
}


def family_of(fmt: Format) -> Family:
    """Return what stores weights in a format."""
    if fmt.high is not None:
        return MixedChannels(family_of)
    family = FAMILIES.get(f"{fmt.family} {fmt.variant}") or FAMILIES[fmt.family]
    return LowRankBranch(family) if fmt.rank else family


def grid_of(fmt: Format) -> OnGrid | None:
    """Return the family of a format if its weights are on one grid, None otherwise."""
    family = family_of(fmt)
    plain = not fmt.rank and fmt.high is None
    return family if plain and isinstance(family, OnGrid) else None


def quantize_weight(
    weight: torch.Tensor,
    fmt: Format,
    channel_axis: ChannelAxis = 0,
    factor: Factor = 1.0,
    data: LayerData | None = None,
) -> StoredWeight:
    """Store `weight` in `fmt`, rounded to nearest, the range of each row shrunk by `factor`.

    Raises InvalidInputError where groups do not divide the weights of a channel.
    """
    return family_of(fmt).store(weight, fmt, channel_axis, factor, data)


def clip_factor(weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis = 0) -> Factor:
    """Return the factors of the rows' ranges with the least squared error, 1 if not on a grid."""
    grid = grid_of(fmt)
    return 1.0 if grid is None else grid.clip_factor(weight, fmt, channel_axis)


@dataclass(frozen=True, slots=True)
class WeightQuantizer:
    """Stores the weights of one network in any format; does what takes long once.

    `factors` holds the clipping that was searched, `made` the packed arrays of weights whose
    formats take calibration data or a search (`Format.made_ahead`), both by the name of the
    parameter and the format; they travel with the quantizer, so that workers do neither again.
    """

    clip: Clip = "minmax"
    factors: dict[tuple[str, Format], Factor] = field(default_factory=dict)
    made: dict[tuple[str, Format], dict[str, torch.Tensor]] = field(default_factory=dict)

    def store(
        self, name: str, weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis = 0
    ) -> StoredWeight:
        """Return codes and scales of the parameter `name`.

        Raises InvalidInputError (`no_rounding`) for a rounding that was not made ahead.
        """
        key = (name, fmt)
        if key in self.made:
            shape = tuple(weight.shape)
            return family_of(fmt).unpack(dict(self.made[key]), fmt, shape, channel_axis)
        if fmt.rounding != "nearest":
            raise InvalidInputError(
                "no_rounding",
                f"parameter {name!r} in {fmt.text('weights')} was not rounded ahead: "
                f"{fmt.rounding} needs calibration data",
            )
        factor = self.factor(name, weight, fmt, channel_axis)
        return quantize_weight(weight, fmt, channel_axis, factor)

    def factor(
        self, name: str, weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis = 0
    ) -> Factor:
        """Return the clipping of the parameter `name`, searched where that was not done yet."""
        if self.clip == "minmax":
            return 1.0
        key = (name, fmt)
        if key not in self.factors:
            self.factors[key] = clip_factor(weight, fmt, channel_axis)
        return self.factors[key]

    def fake_quantize(
        self, name: str, weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis = 0
    ) -> torch.Tensor:
        """Return the parameter `name` as it reads back from `fmt`, in its own dtype."""
        if fmt.is_native:
            return weight.to(_NATIVE[fmt.family]).to(weight.dtype)
        if (name, fmt) in self.made or fmt.rounding != "nearest":
            return self.store(name, weight, fmt, channel_axis).dequantize().to(weight.dtype)
        factor = self.factor(name, weight, fmt, channel_axis)
        return family_of(fmt).fake_quantize(weight, fmt, channel_axis, factor).to(weight.dtype)


__all__ = [
    "FAMILIES",
    "Family",
    "LayerData",
    "StoredWeight",
    "WeightQuantizer",
    "clip_factor",
    "fake_quantize_activation",
    "family_of",
    "grid_of",
    "quantize_weight",
]
