"""Means of layer inputs over the calibration batches, for bias correction."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mpq.core.layers import LayerGraph, LayerName, Unsearched
from mpq.nn.batches import Batch, position_mask
from mpq.nn.calibrate import run_observed
from mpq.nn.correction import InputMeans
from mpq.nn.replay import replay
from mpq.nn.weights import channel_axis_of, layer_modules, weight_of


class _Mean:
    """A weighted mean, summed in float64."""

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None
        self.weight = 0

    def add(self, mean: torch.Tensor, weight: int) -> None:
        added = mean.double() * weight
        self.total = added if self.total is None else self.total + added
        self.weight += weight


def input_means(
    model: nn.Module, graph: LayerGraph, batches: tuple[Batch, ...]
) -> tuple[dict[LayerName, torch.Tensor], dict[LayerName, str]]:
    """Return the mean input of every searched layer that has a bias or can get one.

    The mean is over samples and output positions of all calls, borders included: for a convolution
    the mean patch that one output element reads. Positions that an attention mask leaves out do not
    count. Beside it why the other layers have none. Costs one forward pass over the batches.
    """
    modules = _weight_modules(model, graph)
    why_not = {name: reason for name, module in modules.items() if (reason := _why_no_bias(module))}
    means = {name: _Mean() for name in modules if name not in why_not}
    mask: list[torch.Tensor | None] = [None]

    def hook(name: LayerName) -> RemovableHandle:
        def observe(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            mean, weight = _mean_of(module, args[0].detach(), mask[0])
            if weight:
                means[name].add(mean, weight)

        return modules[name].register_forward_pre_hook(observe)

    def begins(batch: Batch) -> None:
        given = batch.get("attention_mask") if isinstance(batch, dict) else None
        mask[0] = given if isinstance(given, torch.Tensor) else None

    run_observed(model, batches, [hook(name) for name in means], begins)
    found = {}
    for name, mean in means.items():
        if mean.total is None:
            why_not[name] = "not called on the calibration batches"
        else:
            found[name] = (mean.total / mean.weight).float()
    return found, why_not


def with_added_biases(model: nn.Module, graph: LayerGraph, means: InputMeans) -> LayerGraph:
    """Return the graph with the biases that layers without one get, so that their bytes count."""
    modules = _weight_modules(model, graph)
    added = tuple(
        Unsearched(
            name=f"{name}.bias",
            elements=channels,
            bytes=channels * weight_of(module).element_size(),
            reason="added to take the bias correction",
        )
        for name, module in modules.items()
        if name in means and module._parameters["bias"] is None
        for channels in [_output_channels(module)]
    )
    return replace(graph, unsearched=(*graph.unsearched, *added))


def _weight_modules(model: nn.Module, graph: LayerGraph) -> dict[LayerName, nn.Module]:
    """Return the modules of searched layers, but for inputs and caches that are searched apart."""
    layers = graph.by_name
    modules = layer_modules(model, graph)
    return {name: module for name, module in modules.items() if not layers[name].source}


def _why_no_bias(module: nn.Module) -> str:
    if "bias" not in module._parameters:
        return "it has no bias and can get none"
    if isinstance(module, nn.ConvTranspose2d) and module.groups > 1:
        return "a transposed convolution in groups"
    return ""


def _output_channels(module: nn.Module) -> int:
    axis = channel_axis_of(module)
    assert isinstance(axis, int)
    return weight_of(module).shape[axis]


def _mean_of(
    module: nn.Module, inputs: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, int]:
    """Return the mean of what an output position reads, and the number of positions."""
    if isinstance(module, nn.Linear):
        real = position_mask({"attention_mask": mask}, inputs)
        rows = inputs.reshape(-1, inputs.shape[-1]) if real is None else inputs[real.bool()]
        return rows.double().mean(0, keepdim=True), len(rows)
    weight = weight_of(module).detach()
    images = inputs if inputs.ndim == weight.ndim else inputs.unsqueeze(0)
    one = weight
    if getattr(module, "groups", 1) == 1:  # all output channels read the same
        one = weight[:, :1] if isinstance(module, nn.ConvTranspose2d) else weight[:1]
    with torch.enable_grad():  # the mean output is linear in the weight: its gradient is the mean
        probe = one.clone().requires_grad_()
        output = replay(module, images.mean(0, keepdim=True), probe, None)
        positions = output[0, 0].numel()
        (patch,) = torch.autograd.grad(output.sum() / positions, probe)
    return patch, positions * len(images)
