"""The network as the search sees it: layers, the units that share a scheme, and the rest."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

from mpq.core.formats import FP32, ChannelAxis, Format, Scheme, native_scheme

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

    What is searched apart from a weight is a layer too, of which `source` names the layer that
    computes with it; it stores nothing in the file. "fc.input", of the kind of fc, is the tensor
    that enters fc: only the activations of its scheme count. "attn.k_cache", of kind "kv_cache",
    is what the cache keeps of the keys: the weight format of its scheme is that of a matrix with
    one row for each token and head, `weight_shape`, and `weight_bytes` is its size in 16 bits.
    """

    name: LayerName
    # "linear" | "conv1d" | "conv2d" | "conv_transpose2d" | "embedding" | "experts" | "kv_cache"
    kind: str
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
    source: LayerName = ""

    @property
    def is_cache(self) -> bool:
        """Whether this is a cache of keys or values."""
        return self.kind == "kv_cache"

    @property
    def is_input(self) -> bool:
        """Whether this is the input of another layer, searched apart from its weight."""
        return bool(self.source) and not self.is_cache

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
        if self.is_cache:
            return "is stored, not multiplied"
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
    `sample` describes the batch the shapes belong to. `apart` are caches and inputs that are
    searched beside the weights (see `Layer`); a cache that no unit holds stays as it is.
    """

    layers: tuple[Layer, ...]
    units: tuple[Unit, ...]
    unsearched: tuple[Unsearched, ...]
    sample: str
    apart: tuple[Layer, ...] = ()

    @property
    def by_name(self) -> Mapping[LayerName, Layer]:
        """Layers by name, those apart too."""
        return {layer.name: layer for layer in (*self.layers, *self.apart)}

    @property
    def kernels(self) -> Mapping[UnitName, tuple[Layer, ...]]:
        """The layers of each unit that run a kernel of their own: those that hold a weight."""
        named = self.by_name
        return {
            unit.name: tuple(named[n] for n in unit.layers if not named[n].source)
            for unit in self.units
        }

    def only(self, names: Container[LayerName]) -> LayerGraph:
        """Return the graph in which these alone are searched, others of `apart` are gone."""
        kept = (replace(u, layers=tuple(n for n in u.layers if n in names)) for u in self.units)
        return replace(
            self,
            units=tuple(unit for unit in kept if unit.layers),
            apart=tuple(part for part in self.apart if part.name in names),
        )

    @property
    def without_apart(self) -> LayerGraph:
        """The graph in which layers alone are searched, whatever their input."""
        return self.only({layer.name for layer in self.layers})

    def merged(self, schemes: Mapping[LayerName, Scheme]) -> dict[LayerName, Scheme]:
        """Return the schemes that layers and caches run in: inputs go into their layer's scheme.

        A layer of which only the input is given keeps its weight as it is.
        """
        found = dict(schemes)
        for part in self.apart:
            if part.is_input and part.name in found:
                own = found.get(part.source) or native_scheme(part.native_family)
                found[part.source] = Scheme(own.weights, found.pop(part.name).activations)
        return found

    def expanded(self, schemes: Mapping[LayerName, Scheme]) -> dict[LayerName, Scheme]:
        """Return the schemes of every layer with those of inputs apart, inverse of `merged`."""
        found = dict(schemes)
        for part in self.apart:
            if part.is_input and part.source in found:
                own = found[part.source]
                found[part.source] = Scheme(own.weights)
                found[part.name] = Scheme(FP32, own.activations)
        return found

    @property
    def input_ranges(self) -> Mapping[LayerName, tuple[float, float]]:
        """Calibrated input ranges of the layers that have one."""
        ranges = {layer.name: layer.input_range for layer in self.layers}
        return {name: limits for name, limits in ranges.items() if limits is not None}

    def stored_layers(self, unit: Unit) -> tuple[Layer, ...]:
        """Return the layers of a unit, one for each weight that is really stored in the file."""
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
    held = [named[name] for name in reversed(unit.layers) if not named[name].source]
    return tuple({layer.weight_id: layer for layer in held}.values())[::-1]
