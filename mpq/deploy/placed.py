"""What a layer is deployed as: its stored weight, its bias and the ranges its kernel needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hw_cost_models.measured.capability import why_no_kernel
from mpq.core.errors import InvalidInputError
from mpq.core.formats import FP32, Scheme
from mpq.core.layers import Layer, LayerGraph, LayerName
from mpq.nn.batches import Batch
from mpq.nn.calibrate import run_observed
from mpq.nn.quantizers import IntegerWeight, WeightQuantizer
from mpq.nn.weights import layer_module, weight_of

Limits = tuple[float, float]
WhyNot = Callable[[Layer, Scheme], str]
_NATIVE = Scheme(FP32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A searched layer and the scheme its kernel runs.

    `weight` is codes and scales, or the float32 array where the scheme is native. A convolution
    in integers has the static ranges of its input and of its output without bias.
    """

    layer: Layer
    scheme: Scheme
    weight: IntegerWeight | npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32] | None
    input_limits: Limits | None = None
    output_limits: Limits | None = None


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
    output_limits: Mapping[LayerName, Limits],
    *,
    why_not: WhyNot = why_no_kernel,
    runtime: str = "ONNX Runtime",
) -> dict[LayerName, Placed]:
    """Return what each searched layer is deployed as, by a runtime whose kernels `why_not` tells.

    Raises InvalidInputError (`no_kernel`) naming the layer that no kernel runs in its scheme.
    """
    nodes, layers = set(markable(model, graph)), graph.by_name
    parameters = dict(model.named_parameters())
    stored: dict[str, IntegerWeight | npt.NDArray[np.float32]] = {}  # tied weights once
    placed = {}
    for name, scheme in schemes.items():
        layer = layers[name]
        if name not in nodes and scheme.is_native:
            continue  # stays what the exporter makes of it
        limits = graph.input_ranges.get(name), output_limits.get(name)
        reason = why_not(layer, scheme)
        if name not in nodes:
            reason = reason or f"{scheme}: no kernel pads otherwise than by zeros"
        _check(layer, scheme, limits, reason, runtime)
        if layer.weight_id not in stored:
            weight = parameters[layer.weight_id].detach()
            stored[layer.weight_id] = (
                weight.numpy()
                if scheme.weights.is_native
                else quantizer.store(layer.weight_id, weight, scheme.weights, layer.channel_axis)
            )
        bias = layer_module(model, name)._parameters.get("bias")
        placed[name] = Placed(
            layer=layer,
            scheme=scheme,
            weight=stored[layer.weight_id],
            bias=None if bias is None else bias.detach().numpy(),
            input_limits=limits[0],
            output_limits=limits[1],
        )
    return placed


def _check(
    layer: Layer,
    scheme: Scheme,
    limits: tuple[Limits | None, Limits | None],
    reason: str,
    runtime: str,
) -> None:
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
    if is_static(layer, scheme) and None in limits:
        raise InvalidInputError(
            "no_range",
            f"layer {layer.name!r} in {scheme} needs the calibrated range of its input and output",
        )


def is_static(layer: Layer, scheme: Scheme) -> bool:
    """Tell whether the kernel takes static activation ranges: integer convolutions do."""
    return layer.kind.startswith("conv") and not scheme.activations.is_native


def output_limits(
    model: nn.Module, names: Sequence[LayerName], batches: Sequence[Batch]
) -> dict[LayerName, Limits]:
    """Return the smallest and largest output, without bias, of layers; zero is always inside.

    Costs one forward pass over the batches.
    """
    limits: dict[LayerName, Limits] = {}

    def observe(name: LayerName) -> RemovableHandle:
        module = model.get_submodule(name)

        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            bare = without_bias(module, output)
            low, high = limits.get(name, (0.0, 0.0))
            limits[name] = (min(low, float(bare.min())), max(high, float(bare.max())))

        return module.register_forward_hook(hook)

    handles = [observe(name) for name in names]
    run_observed(model, batches, handles)
    return limits


def without_bias(module: nn.Module, output: torch.Tensor) -> torch.Tensor:
    """Return a convolution's output before its bias is added."""
    bias = module._parameters.get("bias")
    if bias is None:
        return output
    spatial = (1,) * (weight_of(module).ndim - 2)
    return output - bias.reshape(-1, *spatial)
