"""What a layer is deployed as: its stored weight, its bias and the ranges its kernel needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hw_cost_models.measured.capability import why_no_kernel
from mpq.core.errors import InvalidInputError
from mpq.core.formats import FP32, Scheme
from mpq.core.layers import Layer, LayerGraph, LayerName
from mpq.deploy.tails import Tail
from mpq.nn.batches import Batch
from mpq.nn.calibrate import run_observed
from mpq.nn.quantizers import StoredWeight, WeightQuantizer
from mpq.nn.weights import layer_module, weight_of

Limits = tuple[float, float]
WhyNot = Callable[[Layer, Scheme], str]
_NATIVE = Scheme(FP32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A searched layer and the scheme its kernel runs.

    `weight` is codes and scales, or the float32 array where the scheme is native. A convolution
    in integers has its tail and the static ranges of its input and of what is behind the tail.
    """

    layer: Layer
    scheme: Scheme
    weight: StoredWeight | npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32] | None
    input_limits: Limits | None = None
    output_limits: Limits | None = None
    tail: Tail | None = None


def markable(model: nn.Module, graph: LayerGraph) -> list[LayerName]:
    """Return the searched layers that can be put in the place of a node.

    Experts are no module, and padding with anything but zeros is outside of a convolution node.
    """
    names = [name for unit in graph.units for name in unit.layers]
    modules = {name: layer_module(model, name) for name in names}
    kinds = graph.by_name
    return [
        name
        for name, module in modules.items()
        if kinds[name].kind != "experts" and getattr(module, "padding_mode", "zeros") == "zeros"
    ]


def place(
    model: nn.Module,
    graph: LayerGraph,
    schemes: Mapping[LayerName, Scheme],
    quantizer: WeightQuantizer,
    output_limits: Mapping[LayerName, Limits] | None = None,
    *,
    tails: Mapping[LayerName, Tail] | None = None,
    why_not: WhyNot = why_no_kernel,
    runtime: str = "ONNX Runtime",
) -> dict[LayerName, Placed]:
    """Return what each searched layer is deployed as, by a runtime whose kernels `why_not` tells.

    A tail is taken where the kernel's integers hold it. Raises InvalidInputError naming the layer
    that no kernel runs in its scheme (`no_kernel`), or whose static range is missing (`no_range`);
    `output_limits` of None are found afterwards.
    """
    nodes, layers = set(markable(model, graph)), graph.by_name
    parameters = dict(model.named_parameters())
    stored: dict[str, StoredWeight | npt.NDArray[np.float32]] = {}  # tied weights once
    placed = {}
    for name, scheme in schemes.items():
        layer = layers[name]
        if name not in nodes and scheme.is_native:
            continue  # stays what the exporter makes of it
        limits = graph.input_ranges.get(name), (output_limits or {}).get(name)
        reason = why_not(layer, scheme)
        if name not in nodes:
            reason = reason or f"{scheme}: no kernel pads otherwise than by zeros"
        _check(layer, scheme, reason, runtime)
        needed = (is_static, writes_codes)[: 1 if output_limits is None else 2]
        if any(needs(layer, scheme) and limits[i] is None for i, needs in enumerate(needed)):
            raise no_range(name, scheme)
        if layer.weight_id not in stored:
            weight = parameters[layer.weight_id].detach()
            stored[layer.weight_id] = (
                weight.numpy()
                if scheme.weights.is_native
                else quantizer.store(layer.weight_id, weight, scheme.weights, layer.channel_axis)
            )
        bias = layer_module(model, name)._parameters.get("bias")
        alone = Placed(
            layer=layer,
            scheme=scheme,
            weight=stored[layer.weight_id],
            bias=None if bias is None else bias.detach().numpy(),
            input_limits=limits[0],
            output_limits=limits[1],
        )
        tail = (tails or {}).get(name)
        placed[name] = replace(alone, tail=None if tail is None else _folded(tail, alone))
    return placed


def _folded(tail: Tail, placed: Placed) -> Tail | None:
    """Return the tail as a static kernel computes it, None where it does not.

    A negative factor turns codes around zero, where -128 has no place.
    """
    stored, limits = placed.weight, placed.input_limits
    if not writes_codes(placed.layer, placed.scheme) or limits is None:
        return None
    assert isinstance(stored, StoredWeight)
    turns = (tail.factor < 0).any()
    if turns and (stored.zero_points is not None or int(stored.codes.min()) < -127):
        return None
    step = static_step(limits, symmetric=placed.scheme.activations.symmetric)
    return tail.within(stored.scales.numpy().reshape(-1) * step)


def static_step(limits: Limits, *, symmetric: bool) -> np.float32:
    """Return the scale of 8-bit codes of a range, as the search computes it."""
    low, high = np.float32(limits[0]), np.float32(limits[1])
    step = max(-low, high) / np.float32(127) if symmetric else (high - low) / np.float32(255)
    return np.float32(max(step, np.float32(1e-12)))


def _check(layer: Layer, scheme: Scheme, reason: str, runtime: str) -> None:
    if layer.native_family != "fp32":
        raise InvalidInputError(
            "no_kernel",
            f"layer {layer.name!r} is in {layer.native_family}: {runtime} computes in fp32 on "
            "this CPU, so deploy model.float()",
        )
    if reason:
        raise InvalidInputError(
            "no_kernel", f"layer {layer.name!r} cannot be deployed in {scheme}: {reason}"
        )


def no_range(layer: LayerName, scheme: Scheme) -> InvalidInputError:
    """Return what is said of a kernel with static ranges that no calibration batch showed."""
    return InvalidInputError(
        "no_range",
        f"layer {layer!r} in {scheme} needs the calibrated range of its input and output",
    )


def is_static(layer: Layer, scheme: Scheme) -> bool:
    """Tell whether the kernel takes a static range of its input: integer convolutions do."""
    return writes_codes(layer, scheme) or scheme.activations.static


def writes_codes(layer: Layer, scheme: Scheme) -> bool:
    """Tell whether the kernel rounds its output to a static range, too."""
    return layer.kind.startswith("conv") and not scheme.activations.is_native


def with_output_limits(
    model: nn.Module, placed: Mapping[LayerName, Placed], batches: Sequence[Batch]
) -> dict[LayerName, Placed]:
    """Return the layers with the range of what each kernel writes in 8 bits; zero is always inside.

    Where another static kernel reads it and rounds it to codes of the same kind, the range is that
    of its input: then what one writes is what the other reads. Costs one forward pass over the
    batches. Raises InvalidInputError (`no_range`) without batches.
    """
    static = {name: p for name, p in placed.items() if is_static(p.layer, p.scheme)}
    writing = {name: p for name, p in static.items() if writes_codes(p.layer, p.scheme)}
    limits: dict[LayerName, Limits] = {}

    def observe(name: LayerName, tail: Tail | None) -> RemovableHandle:
        def hook(module: nn.Module, _: object, output: torch.Tensor) -> None:
            written = without_bias(module, output)
            written = written if tail is None else tail.applied(written)
            low, high = limits.get(name, (0.0, 0.0))
            limits[name] = (min(low, float(written.min())), max(high, float(written.max())))

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [observe(name, p.tail) for name, p in writing.items()]
    run_observed(model, batches, handles)
    for name, p in writing.items():
        if name not in limits:
            raise no_range(name, p.scheme)
    ranges = limits | {name: found for name, p in writing.items() if (found := _read(p, static))}
    return {n: replace(p, output_limits=ranges.get(n)) for n, p in placed.items()}


def _read(placed: Placed, static: Mapping[LayerName, Placed]) -> Limits | None:
    """Return the input range of a static kernel that reads codes as this one can write them."""
    tail = placed.tail
    if tail is None:
        return None
    for name in tail.readers:
        reader = static.get(name)
        if reader is None or reader.input_limits is None or reader.scheme.activations.symmetric:
            continue
        if reader.input_limits[0] == 0 or not tail.relu:
            return reader.input_limits
    return None


def without_bias(module: nn.Module, output: torch.Tensor) -> torch.Tensor:
    """Return a convolution's output before its bias is added."""
    bias = module._parameters.get("bias")
    if bias is None:
        return output
    spatial = (1,) * (weight_of(module).ndim - 2)
    return output - bias.reshape(-1, *spatial)
