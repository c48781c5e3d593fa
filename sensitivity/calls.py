"""What every searched layer sees and gives during one forward pass, and how outputs depend on it.

A calibration batch is worked on in parts, so that the memory held is bounded whatever the batch:
a part is as many samples as keep all layer inputs, outputs and their gradients under a limit, at
most as many as the workload takes at once, or one sample where layers do not keep samples apart.
Random signs belong to the sample, by its place in the calibration data: results are the same
however the samples are cut into batches or parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mpq.core.errors import InvalidInputError
from mpq.core.layers import LayerName
from mpq.nn.batches import Batch, cut, num_samples, portions, position_mask
from mpq.nn.patch import evaluating
from mpq.nn.weights import CacheOf, ExpertWeight, layer_modules
from mpq.nn.workload import Workload

_HELD_BYTES = 2**30  # of a part: layer inputs, outputs and gradients together

Call = tuple[torch.Tensor, torch.Tensor]  # the input and the output of one call of a layer
Gradients = dict[LayerName, list[torch.Tensor | None]]  # per call, rows first; None: no effect


@dataclass(frozen=True, slots=True)
class Part:
    """Some samples of calibration batch `number`; `first` counts from the first batch on."""

    number: int
    batch: Batch
    first: int
    samples: int


def parts(workload: Workload, number: int, rows: int) -> Iterator[Part]:
    """Yield the parts of a batch for work that holds `rows` gradients of every layer's output."""
    batch = workload.calibration[number]
    first = sum(num_samples(earlier) for earlier in workload.calibration[:number])
    total = num_samples(batch)
    most = min(total, workload.at_once or total)
    step = min(most, _samples_at_once(workload, number, batch, rows, most))
    for start in range(0, total, step):
        stop = min(start + step, total)
        part = batch if step == total else cut(batch, start, stop)
        yield Part(number, part, first + start, stop - start)


def loss_parts(workload: Workload, number: int) -> Iterator[Part]:
    """Yield the parts of a batch over which the loss of the batch is a mean, by their samples.

    A user's loss is of the whole batch; the divergence is a mean over samples.
    """
    batch = workload.calibration[number]
    first = sum(num_samples(earlier) for earlier in workload.calibration[:number])
    for portion in portions(batch, workload.at_once if workload.loss is None else None):
        yield Part(number, portion, first, num_samples(portion))
        first += num_samples(portion)


def _samples_at_once(workload: Workload, number: int, batch: Batch, rows: int, most: int) -> int:
    """Return how many samples fit, 1 where a layer's rows are not those of sample 0, then 1, ...

    Compares what layers see of the first sample alone with what they see of the first two: a
    layer may read another axis first (time), or something that all samples share (positions; what
    stands for the input of experts, whose gradient is a sum over samples).
    """
    if most == 1:
        return 1
    seen = []
    for count in (1, 2):
        with evaluating(workload.model), Calls(workload) as calls, torch.no_grad():
            output = workload.output(number, cut(batch, 0, count))
        seen.append(calls)
    one, two = (calls.inputs() for calls in seen)
    if len(one) != len(two) or not all(
        len(b) == 2 * len(a) and _close(a, b[: len(a)]) for a, b in zip(one, two, strict=True)
    ):
        return 1
    held = seen[0].input_bytes + (2 + rows) * seen[0].output_bytes
    held += (4 + rows) * output.nbytes // 2  # the output of two samples, softmax, signs, seeds
    return max(1, _HELD_BYTES // max(1, held))


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    largest = float(one.abs().max()) if one.numel() else 0.0
    return torch.allclose(one.double(), other.double(), rtol=1e-2, atol=1e-2 * largest)


_Hook = Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]


class Calls:
    """A context that remembers inputs and differentiable outputs of every searched layer.

    Experts' weights stand for the output of one call: their gradient is that of all their uses. A
    KV cache reads and gives what its projection does.
    """

    def __init__(self, workload: Workload) -> None:
        self._modules = layer_modules(workload.model, workload.graph)
        self._inputs: dict[LayerName, list[torch.Tensor]] = {name: [] for name in self._modules}
        self._outputs: dict[LayerName, list[torch.Tensor]] = {name: [] for name in self._modules}
        self._handles = ExitStack()
        self.output_bytes = 0

    def __enter__(self) -> Calls:
        for name, module in self._modules.items():
            if isinstance(module, ExpertWeight):
                self._stand_for(name, module.weight)
                continue
            if isinstance(module, CacheOf):
                self._remember_kept(name, module.projection)
                continue
            # before any hook that quantizes the input: schemes are tried on what arrives
            handle: RemovableHandle = module.register_forward_pre_hook(
                lambda _, args, name=name: self._inputs[name].append(args[0].detach()),
                prepend=True,
            )
            self._handles.callback(handle.remove)
            self._handles.callback(module.register_forward_hook(self._hook(name)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._handles.close()

    def _remember_kept(self, name: LayerName, projection: nn.Module) -> None:
        """Take a projection's output for what a cache reads, and what is kept of it for its own."""

        def arrives(_: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            self._inputs[name].append(output.detach())

        # before any hook that quantizes what is kept
        handle = projection.register_forward_hook(arrives, prepend=True)
        self._handles.callback(handle.remove)
        self._handles.callback(projection.register_forward_hook(self._hook(name)).remove)

    def _stand_for(self, name: LayerName, weight: torch.Tensor) -> None:
        """Take a parameter for the output of its one call, with gradients for as long."""
        self._handles.callback(weight.requires_grad_, weight.requires_grad)
        weight.requires_grad_(True)
        self._inputs[name].append(weight.new_ones(()).expand(weight.shape))
        self._outputs[name].append(weight)

    def _hook(self, name: LayerName) -> _Hook:
        def remember(
            _: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> torch.Tensor:
            self.output_bytes += output.nbytes
            if not torch.is_grad_enabled():
                return output
            if not output.requires_grad:  # nothing before it is differentiable: start here
                output.requires_grad_()
            self._outputs[name].append(output)
            return output.clone()  # so that in-place operations leave the handle differentiable

        return remember

    def of(self, name: LayerName) -> list[Call]:
        """Return the calls of one layer, in order; refuses those made with gradients off."""
        if len(self._outputs[name]) < len(self._inputs[name]):
            raise InvalidInputError(
                "no_gradient",
                f"layer {name!r} runs with gradients off (torch.no_grad() or inference_mode() in "
                f"the model), so what it does to the output has no derivative: take that out, "
                f"leave the layer out with skip=[{name!r}], or use metric='kl', which needs none",
            )
        return list(zip(self._inputs[name], self._outputs[name], strict=True))

    def inputs(self) -> list[torch.Tensor]:
        """Return the inputs of all calls, layer by layer."""
        return [tensor for name in self._modules for tensor in self._inputs[name]]

    @property
    def input_bytes(self) -> int:
        """Bytes of all inputs; one that several layers read counts once."""
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in self.inputs()}.values())

    def gradients(
        self, head: torch.Tensor, seeds: Iterator[torch.Tensor], *, keep: bool = False
    ) -> Gradients:
        """Return the gradient of <seed, head> at every call's output, one row for each seed.

        The graph is freed with the last one unless `keep`. Raises InvalidInputError where a
        layer ran with gradients off.
        """
        outputs = [output for name in self._modules for _, output in self.of(name)]
        if not outputs:
            return {name: [] for name in self._modules}
        rows, seed = [], next(seeds, None)
        while seed is not None:
            following = next(seeds, None)
            rows.append(
                torch.autograd.grad(
                    head,
                    outputs,
                    seed,
                    retain_graph=keep or following is not None,
                    allow_unused=True,
                )
            )
            seed = following
        known = [[g for g in of_call if g is not None] for of_call in zip(*rows, strict=True)]
        stacked = iter([torch.stack(gradients) if gradients else None for gradients in known])
        return {name: [next(stacked) for _ in self._outputs[name]] for name in self._modules}


def probe_seeds(workload: Workload, part: Part, head: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield S r of each random probe (see mpq.nn.divergence), ready to be back-propagated."""
    mask = position_mask(part.batch, head)
    generators = [
        torch.Generator().manual_seed(workload.seed * 1_000_000_007 + part.first + n)
        for n in range(part.samples)
    ]
    for _ in range(workload.num_probes):
        bits = torch.stack(
            [torch.randint(0, 2, head.shape[1:], generator=g, dtype=torch.int8) for g in generators]
        )
        yield workload.divergence.seeds(head.detach(), bits.to(head) * 2 - 1, mask)


def loss_of(workload: Workload, part: Part, output: torch.Tensor) -> torch.Tensor:
    """Return the user's loss on a part; raises InvalidInputError where it is no finite number."""
    assert workload.loss is not None
    loss = workload.loss(output, part.batch)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        got = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise InvalidInputError(
            "loss", f"the loss must return one number, on batch {part.number} it returned {got}"
        )
    if not torch.isfinite(loss):
        raise InvalidInputError(
            "loss", f"the loss is {float(loss.detach())} on batch {part.number}"
        )
    return loss
