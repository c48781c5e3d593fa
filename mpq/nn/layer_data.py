"""What calibration data say of layers, in one streamed pass: Grams, gradients, squared gradients.

For a layer with inputs X (a row for each position) and outputs Y = X W^T

    gram     X^T X, summed over every position of every sample
    outputs  mean over positions, samples and probes of g_c^2,       g = J^T S r at the output
    fisher   mean over samples and probes of (sum_t g_t x_t^T)^2, element-wise

where J is the Jacobian from the layer's output to the network's, S a square root of the output
divergence's curvature and r a random sign vector (mpq.nn.divergence): the expectation of `fisher`
is the diagonal of the Gauss-Newton matrix, for which SqueezeLLM (2306.07629) takes the squared
gradients of the loss. A convolution's X are its patches (im2col), of each of its groups alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from mpq.core.errors import InvalidInputError
from mpq.core.layers import Layer, LayerName
from mpq.nn.batches import Batch, num_samples, portions, position_mask
from mpq.nn.patch import ParameterName, frozen
from mpq.nn.quantizers.stored import LayerData
from mpq.nn.weights import layer_module, weight_of
from mpq.nn.workload import Workload

Want = Literal["gram", "outputs", "fisher"]

_HELD_BYTES = 2**30  # of sums held at once; more layers take another pass
_WIDE = 2048  # inputs up to which sums over batches are float64
KINDS = ("linear", "conv1d", "conv2d")  # of layers that data are gathered of


def why_no_data(layer: Layer) -> str:
    """Return why no Gram of a layer is gathered, "" where it is."""
    match layer.kind:
        case "embedding":
            return "reads indices: nearest is the best rounding already"
        case "experts":
            return "has no input of its own"
        case "conv_transpose2d":
            return "is a transposed convolution, whose Gram is not gathered"
    return "" if layer.kind in KINDS else f"is a {layer.kind}, whose Gram is not gathered"


def layer_data(
    workload: Workload, wanted: Mapping[ParameterName, Collection[Want]]
) -> Iterator[tuple[ParameterName, LayerData]]:
    """Yield what was asked for of each weight, by the name of its parameter.

    `gram` is (n, n), float32, n the weights of an output channel; of a convolution in G > 1 groups
    it is (G, n, n), as a channel sees the inputs of its own group alone. Layers that are tied add
    up. Positions that the batch's attention mask (samples, positions) leaves out count for
    nothing in layers whose input is (samples, positions, features). Sums over batches are float64
    up to 2048 inputs, float32 above; a tensor that several layers read in a row is multiplied once.

    Costs one forward pass and a product of n^2 a position for each GiB of Grams held; with
    `outputs` or `fisher` one forward and K backward passes for each sample alone, whose weight
    gradients `fisher` squares. The model is only borrowed, random signs are of `workload.seed`.
    Raises InvalidInputError (`no_layer_data`) for a kind of layer without them.
    """
    layers = _layers(workload, wanted)
    for some in _batched(layers, wanted):
        sums = {name: _Sums() for name in some}
        grams = {n for n in some if "gram" in wanted[n]}
        gradients = {n: wanted[n] for n in some if {"outputs", "fisher"} & set(wanted[n])}
        if grams:
            _gather_grams(workload, {n: layers[n] for n in grams}, sums)
        if gradients:
            _gather_gradients(workload, {n: layers[n] for n in gradients}, sums, gradients)
        for name in some:
            yield name, sums.pop(name).mean()


@dataclass(slots=True)
class _Sums:
    """What is added up of one weight."""

    gram: torch.Tensor | None = None
    outputs: torch.Tensor | None = None
    fisher: torch.Tensor | None = None
    rows: int = 0
    draws: int = 0

    def add_gram(self, gram: torch.Tensor) -> None:
        wide = torch.float64 if gram.shape[-1] <= _WIDE else torch.float32
        if self.gram is None:
            self.gram = gram.to(wide, copy=True)
        else:
            self.gram += gram

    def mean(self) -> LayerData:
        return LayerData(
            gram=None if self.gram is None else self.gram.float(),
            outputs=None if self.outputs is None else (self.outputs / max(self.rows, 1)).float(),
            fisher=None if self.fisher is None else (self.fisher / max(self.draws, 1)).float(),
        )


def _layers(
    workload: Workload, wanted: Mapping[ParameterName, Collection[Want]]
) -> dict[ParameterName, list[Layer]]:
    named = workload.graph.by_name
    found: dict[ParameterName, list[Layer]] = {name: [] for name in wanted}
    for unit in workload.graph.units:
        for layer in (named[n] for n in unit.layers):
            if layer.weight_id not in wanted:
                continue
            if why := why_no_data(layer):
                raise InvalidInputError("no_layer_data", f"{layer.kind} {layer.name!r} {why}")
            found[layer.weight_id].append(layer)
    return found


def _batched(
    layers: Mapping[ParameterName, list[Layer]], wanted: Mapping[ParameterName, Collection[Want]]
) -> Iterator[list[ParameterName]]:
    """Yield weights whose sums fit in memory together, in order."""
    some: list[ParameterName] = []
    held = 0
    for name, owners in layers.items():
        shape = owners[0].weight_shape
        inputs, groups = _inputs(owners[0]), _groups(owners[0])
        sizes = {
            "gram": groups * inputs**2 * (8 if inputs <= _WIDE else 4),
            "fisher": 8 * shape[0] * inputs,
            "outputs": 8 * shape[0],
        }
        own = sum(sizes[want] for want in wanted[name])
        if some and held + own > _HELD_BYTES:
            yield some
            some, held = [], 0
        some.append(name)
        held += own
    if some:
        yield some


def _inputs(layer: Layer) -> int:
    return layer.num_weights // layer.weight_shape[0]


def _groups(layer: Layer) -> int:
    return layer.convolution.groups if layer.convolution else 1


def rows_seen(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return the rows that a layer multiplies by its weights, (groups, samples, positions, n).

    Of a linear layer positions are all axes between the first and the last; of a convolution the
    places of its output, padded as the layer pads.
    """
    if isinstance(module, nn.Linear):
        return inputs.reshape(1, inputs.shape[0] if inputs.ndim > 1 else 1, -1, inputs.shape[-1])
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    dims = len(module.kernel_size)
    if inputs.ndim == dims + 1:
        inputs = inputs.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padding: list[int] = list(module._reversed_padding_repeated_twice)
    inputs = F.pad(inputs, padding, mode=mode)
    one = dims == 1  # a convolution along one axis is one of a single row
    if one:
        inputs = inputs.unsqueeze(2)
    kernel, dilation, stride = (
        ((1, *sizes) if one else sizes)
        for sizes in (module.kernel_size, module.dilation, module.stride)
    )
    patches = F.unfold(inputs, kernel, dilation, 0, stride)  # (samples, channels x kernel, places)
    grouped = patches.reshape(len(patches), module.groups, -1, patches.shape[2])
    return grouped.permute(1, 0, 3, 2)


def _gather_grams(
    workload: Workload,
    layers: Mapping[ParameterName, list[Layer]],
    sums: Mapping[ParameterName, _Sums],
) -> None:
    last: list[tuple[torch.Tensor, int, object, torch.Tensor]] = []  # input, version, geometry
    batch_seen: list[Batch] = []

    def product(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        geometry = _geometry(module)
        if last and last[0][0] is inputs and last[0][1:3] == (inputs._version, geometry):
            return last[0][3]
        rows = _real_rows(batch_seen[0], module, inputs)
        gram = torch.matmul(rows.transpose(1, 2), rows)
        last[:] = [(inputs, inputs._version, geometry, gram)]
        return gram

    with ExitStack() as hooks:
        for name, owners in layers.items():
            for layer in owners:
                module = layer_module(workload.model, layer.name)

                def hook(
                    module: nn.Module, args: tuple[torch.Tensor, ...], name: ParameterName = name
                ) -> None:
                    gram = product(module, args[0])
                    sums[name].add_gram(gram[0] if len(gram) == 1 else gram)

                hooks.callback(module.register_forward_pre_hook(hook).remove)
        for number, batch in enumerate(workload.calibration):
            with workload.evaluating(number), torch.no_grad():
                for portion in portions(batch, workload.at_once):
                    batch_seen[:] = [portion]
                    workload.output(number, portion)
                    last.clear()


def _geometry(module: nn.Module) -> object:
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
        return (*sizes, module.groups, module.padding_mode)
    return "linear"


def _real_rows(batch: Batch, module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return (groups, rows, n) in float32 or wider, without the positions that are masked out."""
    inputs = inputs.detach()
    inputs = inputs if inputs.dtype == torch.float64 else inputs.float()
    mask = position_mask(batch, inputs) if isinstance(module, nn.Linear) else None
    if mask is not None:
        return inputs[mask.bool()].unsqueeze(0)
    return rows_seen(module, inputs).flatten(1, 2)


@dataclass(slots=True)
class _SampleCalls:
    """The inputs and differentiable outputs of one weight's layers for one sample."""

    name: LayerName
    calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def hook(
        self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        if not torch.is_grad_enabled():
            raise InvalidInputError(
                "no_gradient",
                f"layer {self.name!r} runs with gradients off (torch.no_grad() or inference_mode() "
                f"in the model): take that out, leave the layer out with skip=[{self.name!r}], or "
                f"use formats that need none, such as int4@gptq",
            )
        if not output.requires_grad:  # nothing before it is differentiable: start here
            output.requires_grad_()
        self.calls.append((module, args[0].detach(), output))
        return output.clone()  # so that in-place operations leave the handle differentiable


def _gather_gradients(
    workload: Workload,
    layers: Mapping[ParameterName, list[Layer]],
    sums: Mapping[ParameterName, _Sums],
    wanted: Mapping[ParameterName, Collection[Want]],
) -> None:
    first = 0
    for number, batch in enumerate(workload.calibration):
        with workload.evaluating(number), frozen(workload.model):
            for place, sample in enumerate(portions(batch, 1)):
                _add_sample(workload, number, sample, first + place, layers, sums, wanted)
        first += num_samples(batch)


def _add_sample(
    workload: Workload,
    number: int,
    sample: Batch,
    place: int,
    layers: Mapping[ParameterName, list[Layer]],
    sums: Mapping[ParameterName, _Sums],
    wanted: Mapping[ParameterName, Collection[Want]],
) -> None:
    seen = {name: _SampleCalls(owners[0].name) for name, owners in layers.items()}
    with ExitStack() as hooks, torch.enable_grad():
        for name, owners in layers.items():
            for layer in owners:
                module = layer_module(workload.model, layer.name)
                hooks.callback(module.register_forward_hook(seen[name].hook).remove)
        head = workload.divergence.head(workload.output(number, sample))
    outputs = [output for calls in seen.values() for _, _, output in calls.calls]
    mask = position_mask(sample, head)
    generator = torch.Generator().manual_seed(workload.seed * 1_000_000_007 + place)
    for probe in range(workload.num_probes):
        bits = torch.randint(0, 2, head.shape[1:], generator=generator, dtype=torch.int8)
        signs = (bits.to(head) * 2 - 1).unsqueeze(0)
        seed = workload.divergence.seeds(head.detach(), signs, mask)
        more = probe + 1 < workload.num_probes
        gradients: Iterator[torch.Tensor | None] = iter([None] * len(outputs))
        if head.requires_grad:  # some layer reaches the output
            found = torch.autograd.grad(head, outputs, seed, retain_graph=more, allow_unused=True)
            gradients = iter(found)
        for name, calls in seen.items():
            own = [(*call[:2], next(gradients)) for call in calls.calls]
            _add_draw(sums[name], own, sample, wanted[name])


def _add_draw(
    sums: _Sums,
    calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor | None]],
    sample: Batch,
    wanted: Collection[Want],
) -> None:
    of_weight: torch.Tensor | None = None
    for module, inputs, gradient in calls:
        channels = weight_of(module).shape[0]
        if gradient is None:
            gradient = inputs.new_zeros(0)
        groups = 1 if isinstance(module, nn.Linear) else _groups_of(module)
        g = _by_channel(module, gradient, channels)  # (rows, channels)
        if "outputs" in wanted:
            real = g
            mask = position_mask(sample, inputs) if isinstance(module, nn.Linear) else None
            if mask is not None and len(g):
                real = g[mask.bool().flatten()]
            squares = real.double().square().sum(0)
            sums.outputs = squares if sums.outputs is None else sums.outputs + squares
            sums.rows += len(real)
        if "fisher" in wanted and len(g):
            rows = rows_seen(module, inputs).flatten(1, 2)  # (groups, rows, n)
            grouped = g.reshape(len(g), groups, -1).permute(1, 2, 0)
            own = torch.matmul(grouped, rows.to(g.dtype)).reshape(weight_of(module).shape)
            of_weight = own if of_weight is None else of_weight + own
    if "fisher" in wanted:
        sums.draws += 1
        shape = weight_of(calls[0][0]).shape if calls else ()
        squares = torch.zeros(shape) if of_weight is None else of_weight.double().square()
        sums.fisher = squares.double() if sums.fisher is None else sums.fisher + squares


def _groups_of(module: nn.Module) -> int:
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    return module.groups


def _by_channel(module: nn.Module, gradient: torch.Tensor, channels: int) -> torch.Tensor:
    """Return gradients at outputs as (rows, channels)."""
    if gradient.numel() == 0:
        return gradient.new_zeros(0, channels)
    if isinstance(module, nn.Linear):
        return gradient.reshape(-1, channels)
    return gradient.reshape(-1, channels, gradient[0, 0].numel()).transpose(1, 2).flatten(0, 1)
