"""Rounding learned block by block: the outputs of a block stay those of the original network.

For a block f with inputs x of the original network on the calibration data and weights W, all
layers of it that take a format are rounded together to lessen mean |f(x; W_q) - f(x; W)|^2
(block reconstruction: Li et al. 2021, BRECQ, 2102.05426; AdaRound: Nagel et al. 2020, 2004.10568).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.func import functional_call

from mpq.core.formats import Format
from mpq.core.granularity import ChannelAxis
from mpq.core.layers import Layer, LayerName
from mpq.nn.batches import output_tensor, portions, position_mask
from mpq.nn.patch import ParameterName, evaluating, frozen
from mpq.nn.quantizers import quantize_weight
from mpq.nn.quantizers.family import Factor
from mpq.nn.quantizers.stored import StoredWeight
from mpq.nn.rounding.blocks import Block, blocks_of
from mpq.nn.workload import Workload

ITERATIONS = 100
_SAMPLES = 8  # of a step
_CHECK = 50  # steps between looks at the error of all calibration data
_PATIENCE = 2  # looks without a gain after which learning stops


class Learned(Protocol):
    """The rounding of one weight while it is learned."""

    learning_rate: float
    anneals: bool  # runs through a schedule to its end

    def parameters(self) -> list[torch.Tensor]:
        """Return what is learned."""

    def weight(self) -> torch.Tensor:
        """Return the weight now, differentiable, in its own shape."""

    def penalty(self, done: float) -> torch.Tensor:
        """Return what is added to the relative error of the block after a share of the steps."""

    def stored(self) -> StoredWeight:
        """Return the weight as it is rounded now."""


Make = Callable[[torch.Tensor, Format, ChannelAxis, Factor], Learned]


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a block in the original network, and which positions of its output are real."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: torch.Tensor
    mask: torch.Tensor | None

    def error(self, output: torch.Tensor) -> torch.Tensor:
        """Return the sum of squared differences over real positions."""
        squared = (output - self.output).square()
        return squared.sum() if self.mask is None else squared[self.mask].sum()

    @property
    def numbers(self) -> int:
        """How many numbers `error` sums."""
        kept = self.output if self.mask is None else self.output[self.mask]
        return kept.numel()


@dataclass(slots=True)
class _Reconstruction:
    """A block, what it saw, and the layers in it that are rounded in one format."""

    block: nn.Module
    calls: Sequence[_Call]
    names: Mapping[ParameterName, str]  # of a weight, inside the block

    def output(self, call: _Call, weights: Mapping[ParameterName, torch.Tensor]) -> torch.Tensor:
        own = {self.names[name]: weight for name, weight in weights.items()}
        return output_tensor(functional_call(self.block, own, call.args, dict(call.kwargs)))

    def error(self, stored: Mapping[ParameterName, StoredWeight]) -> float:
        """Return the mean squared error of the block's outputs over all that it saw."""
        with torch.no_grad():
            dtype = next(iter(self.block.parameters())).dtype
            weights = {name: one.dequantize().to(dtype) for name, one in stored.items()}
            total = sum(float(call.error(self.output(call, weights))) for call in self.calls)
        return total / max(1, sum(call.numbers for call in self.calls))


def learned(
    workload: Workload,
    wanted: Mapping[ParameterName, tuple[Layer, Sequence[Format]]],
    make: Make,
    iterations: int = ITERATIONS,
) -> Iterator[tuple[ParameterName, Format, StoredWeight]]:
    """Yield each weight in each of its formats, learned block by block.

    Inputs and outputs of a block are those of the original network, keyword arguments included;
    output positions that the attention mask leaves out do not count. Steps of Adam on 8 samples,
    drawn by the workload's seed; every 50 the error of all calibration data is looked at, and
    what was best stays, nearest included: no block is ever worse than rounded to nearest. Costs a
    forward pass of the network for each block, whose calls are held, and for each block and
    format `iterations` forward and backward passes of the block.
    """
    graph = workload.graph
    owners: dict[ParameterName, LayerName] = {name: one.name for name, (one, _) in wanted.items()}
    names = [n for unit in graph.units for n in unit.layers if n in set(owners.values())]
    everything = [layer for unit in graph.units for layer in unit.layers]
    whole = {
        layer: block.name
        for block in blocks_of(workload.model, everything)
        for layer in block.layers
    }
    inside: dict[str, list[LayerName]] = {}
    for name in names:
        inside.setdefault(whole[name], []).append(name)
    with frozen(workload.model):
        for block, layers in inside.items():
            own = {k: v for k, v in wanted.items() if owners[k] in layers}
            yield from _of_block(workload, Block(block, tuple(layers)), own, make, iterations)


def _of_block(
    workload: Workload,
    block: Block,
    wanted: Mapping[ParameterName, tuple[Layer, Sequence[Format]]],
    make: Make,
    iterations: int,
) -> Iterator[tuple[ParameterName, Format, StoredWeight]]:
    module = workload.model.get_submodule(block.name)
    calls = seen_calls(workload, module)
    parameters = dict(workload.model.named_parameters())
    inner = {id(parameter): name for name, parameter in module.named_parameters()}
    for fmt in dict.fromkeys(fmt for _, formats in wanted.values() for fmt in formats):
        some = {name: layer for name, (layer, formats) in wanted.items() if fmt in formats}
        names = {name: inner[id(parameters[name])] for name in some}
        roundings, nearest = {}, {}
        for name, layer in some.items():
            weight, axis = parameters[name].detach(), layer.channel_axis
            factor = workload.quantizer.factor(name, weight, plain(fmt), axis)
            roundings[name] = make(weight, fmt, axis, factor)
            nearest[name] = quantize_weight(weight, fmt, axis, factor)
        if calls:
            reconstruction = _Reconstruction(module, calls, names)
            with evaluating(workload.model, workload.seed):
                nearest = _learn(reconstruction, roundings, nearest, iterations, workload.seed)
        for name, stored in nearest.items():
            yield name, fmt, stored


def plain(fmt: Format) -> Format:
    """Return the format rounded to nearest."""
    from dataclasses import replace

    return replace(fmt, rounding="nearest")


def seen_calls(workload: Workload, module: nn.Module, split: str = "calibration") -> list[_Call]:
    """Return the calls of a module by the original network on all batches of a split.

    They are cut into parts of 8 samples of a batch.
    """
    calls: list[_Call] = []
    now: list[Any] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now.append((_copied(args), _copied(kwargs)))

    def after(_: nn.Module, __: object, output: Any) -> None:
        args, kwargs = now.pop()
        found = output_tensor(output).detach().clone()
        mask = position_mask(current[0], found)
        calls.append(_Call(args, kwargs, found, None if mask is None else mask.bool()))

    current: list[Any] = []
    hooks = (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    )
    batches = workload.calibration if split == "calibration" else workload.held_out
    try:
        for number, batch in enumerate(batches):
            with workload.evaluating(number, split), torch.no_grad():
                for portion in portions(batch, _SAMPLES):
                    current[:] = [portion]
                    workload.output(number, portion)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(_copied(part) for part in value)
    return {k: _copied(v) for k, v in value.items()} if type(value) is dict else value


def _learn(
    of: _Reconstruction,
    roundings: Mapping[ParameterName, Learned],
    nearest: dict[ParameterName, StoredWeight],
    iterations: int,
    seed: int,
) -> dict[ParameterName, StoredWeight]:
    """Return the stored weights that had the least error on all that the block saw."""
    best, least = nearest, of.error(nearest)
    if least == 0:
        return best
    parameters = [
        {"params": one.parameters(), "lr": one.learning_rate} for one in roundings.values()
    ]
    optimiser = torch.optim.Adam(parameters)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    worse = 0
    anneals = any(one.anneals for one in roundings.values())
    for step in range(iterations):
        if not order:
            order = torch.randperm(len(of.calls), generator=generator).tolist()
        call = of.calls[order.pop()]
        if call.numbers:
            with torch.enable_grad():
                weights = {
                    name: one.weight().to(call.output.dtype) for name, one in roundings.items()
                }
                loss = call.error(of.output(call, weights)) / call.numbers / least
                for one in roundings.values():
                    loss = loss + one.penalty(step / iterations)
                optimiser.zero_grad()
                torch.autograd.backward(loss)
            optimiser.step()
        if (step + 1) % _CHECK == 0 or step + 1 == iterations:
            found = {name: one.stored() for name, one in roundings.items()}
            error = of.error(found)
            worse = 0 if error < least else worse + 1
            if error < least:
                best, least = found, error
            if worse == _PATIENCE and not anneals:
                break
    return best
