"""The network as the search sees it: layers, the units that share a scheme, and the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mpq.core.formats import ChannelAxis, Format

LayerName = str
UnitName = str


@dataclass(frozen=True, slots=True, kw_only=True)
class Convolution:
    """The geometry of a convolution; tuples have one entry per spatial dimension.

    `padding_end` is the padding after the last element where it is not that before the first.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    output_padding: tuple[int, ...] = ()
    padding_end: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One module that holds a weight, or one 3-D parameter that holds those of experts.

    Shapes are those of its first call on the sample, batch dimension included; `macs` counts
    the multiply-accumulates of all its calls on the whole sample. `order` is the place of the
    first call in the forward pass (-1: never called). `weight_id` is the name of the parameter
    that holds the weight: layers with the same one are tied and stored once. `input_range` is the
    smallest and largest input on calibration data, where a kernel needs a static one.
    `native_family` is the native format that the weight is in.

    Experts have the name of their parameter. It is a matrix whose rows are all its leading axes:
    one scale for each row of each expert, groups along the last axis. A call is one matrix product
    that reads it, `macs` are those that were run (with routing, for the tokens sent to an expert),
    and the shapes of its input and output are unknown: ().
    """

    name: LayerName
    kind: str  # "linear" | "conv1d" | "conv2d" | "conv_transpose2d" | "embedding" | "experts"
    weight_shape: tuple[int, ...]
    weight_id: str
    weight_bytes: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    calls: int
    order: int
    convolution: Convolution | None = None
    input_range: tuple[float, float] | None = None
    native_family: str = "fp32"

    def static_range(self, activations: Format) -> tuple[float, float] | None:
        """Return the input range that activations of a format have, None where each sample's own.

        Integer kernels of convolutions have static ranges alone.
        """
        is_static = activations.static or self.kind.startswith("conv")
        return self.input_range if is_static else None

    @property
    def channel_axis(self) -> ChannelAxis:
        """The axis of the weight that counts output channels; of experts all but the last."""
        if self.kind == "experts":
            return tuple(range(len(self.weight_shape) - 1))
        return 1 if self.kind == "conv_transpose2d" else 0

    @property
    def why_weights_only(self) -> str:
        """Why nothing that enters the layer can be quantized, "" where it can."""
        if self.kind == "embedding":
            return "reads indices"
        return "has no input of its own" if self.kind == "experts" else ""

    @property
    def num_weights(self) -> int:
        """Elements of the weight."""
        return math.prod(self.weight_shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Layers that must take one scheme, and why."""

    name: UnitName
    layers: tuple[LayerName, ...]
    reason: str = "single layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsearched:
    """A parameter or buffer that no unit covers, counted once, with the reason."""

    name: str
    elements: int
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGraph:
    """Everything about the network that a search needs when the network is gone.

    `layers` are in execution order; `units` partition the searched ones; `unsearched` lists all
    other stored tensors, so that searched weights + unsearched = the whole network, once.
    `sample` describes the batch the shapes belong to.
    """

    layers: tuple[Layer, ...]
    units: tuple[Unit, ...]
    unsearched: tuple[Unsearched, ...]
    sample: str

    @property
    def by_name(self) -> Mapping[LayerName, Layer]:
        """Layers by name."""
        return {layer.name: layer for layer in self.layers}

    @property
    def input_ranges(self) -> Mapping[LayerName, tuple[float, float]]:
        """Calibrated input ranges of the layers that have one."""
        ranges = {layer.name: layer.input_range for layer in self.layers}
        return {name: limits for name, limits in ranges.items() if limits is not None}

    def stored_layers(self, unit: Unit) -> tuple[Layer, ...]:
        """Return the layers of a unit, one for each weight that is really stored."""
        return _stored(unit, self.by_name)

    @property
    def searched_weights(self) -> int:
        """Weights under search, tied ones once."""
        named = self.by_name
        return sum(layer.num_weights for unit in self.units for layer in _stored(unit, named))

    @property
    def fixed_bytes(self) -> int:
        """Bytes that no choice changes: every tensor outside the search."""
        return sum(part.bytes for part in self.unsearched)

    @property
    def native_bytes(self) -> int:
        """Bytes of the network as it is."""
        searched = sum(layer.weight_bytes for u in self.units for layer in self.stored_layers(u))
        return self.fixed_bytes + searched

    @property
    def coverage(self) -> float:
        """Share of all parameters and buffers that is searched, in [0, 1]."""
        total = self.searched_weights + sum(part.elements for part in self.unsearched)
        return self.searched_weights / total if total else 0.0


def _stored(unit: Unit, named: Mapping[LayerName, Layer]) -> tuple[Layer, ...]:
    return tuple({named[n].weight_id: named[n] for n in reversed(unit.layers)}.values())[::-1]
