"""Responses of the output to every cell, around the original or around a quantized network.

Let the network run in a base allocation (none: as it is). For unit l in scheme c let d(x) be what
the layer's output becomes in scheme c minus what it is in the base, on the base network's own
input of the layer; J the Jacobian from that output to the network's output; S a square root of
the output divergence's curvature (mpq.nn.divergence) and r_k random sign vectors. Then

    u_lc[x, k] = < J^T S r_k , d_lc(x) >,      E_k u_lc u_me = d_lc^T J^T S S^T J d_me
    g_lc[x]    = < J^T grad D(x)  , d_lc(x) >,  D the divergence from the original's output

and to second order an allocation a changes D(x) by  sum_l g_l,a(l) + 1/2 E_k (sum_l u_l,a(l))^2.
Around the original network g is zero. Gauss-Newton: Schraudolph 2002; random probes of the output
curvature: Hutchinson 1990.

Cost for each batch: one forward pass, K backward passes to all layer outputs at once (one more
where the base is quantized), and for each layer either one replay for each scheme or, where it is
cheaper, the gradient of its weight for each sample and probe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mpq.core.formats import Scheme
from mpq.core.layers import Layer, LayerName
from mpq.core.problem import Allocation
from mpq.nn.batches import Batch, cut, num_samples, position_mask
from mpq.nn.patch import evaluating, frozen
from mpq.nn.quantizers import fake_quantize_activation
from mpq.nn.replay import replay
from mpq.nn.workload import Workload

_GHOST_ELEMENTS = 2**25  # of weight gradients held at once

Floats32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BatchResponses:
    """What one batch says of every cell: u of (cells, samples, probes), g of (cells, samples)."""

    u: Floats32
    g: Floats32


def responses_of_batch(
    workload: Workload, number: int, base: Allocation | None = None
) -> BatchResponses:
    """Return the responses of every cell to calibration batch `number`; the model is borrowed."""
    batch = workload.calibration[number]
    generator = torch.Generator().manual_seed(workload.seed * 1_000_003 + number)
    with evaluating(workload.model), frozen(workload.model):
        parts = [batch]
        if not _samples_come_first(workload, number, batch):
            parts = [cut(batch, i, i + 1) for i in range(num_samples(batch))]
        found = [_responses(workload, number, part, base, generator) for part in parts]
    return BatchResponses(
        np.concatenate([part.u for part in found], axis=1),
        np.concatenate([part.g for part in found], axis=1),
    )


def _samples_come_first(workload: Workload, number: int, batch: Batch) -> bool:
    """Tell whether the rows of every layer's input are those of sample 0, then sample 1, ...

    Compares what layers see of the first sample alone with what they see of the first two: a
    layer may read another axis first (time), or something that all samples share (positions).
    """
    if num_samples(batch) == 1:
        return True
    seen = []
    for count in (1, 2):
        calls = _Calls(workload)
        with calls, torch.no_grad():
            workload.output(number, cut(batch, 0, count))
        seen.append(calls.inputs())
    return len(seen[0]) == len(seen[1]) and all(
        len(two) == 2 * len(one) and _close(one, two[: len(one)])
        for one, two in zip(*seen, strict=True)
    )


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    largest = float(one.abs().max()) if one.numel() else 0.0
    return torch.allclose(one.double(), other.double(), rtol=1e-2, atol=1e-2 * largest)


def _responses(
    workload: Workload,
    number: int,
    batch: Batch,
    base: Allocation | None,
    generator: torch.Generator,
) -> BatchResponses:
    samples = num_samples(batch)
    schemes = {} if base is None else workload.layer_schemes(base)
    original: torch.Tensor | None = None
    if base is not None:
        with torch.no_grad():
            original = workload.output(number, batch)
    calls = _Calls(workload)
    with (
        workload.quantized_as(base or Allocation({})),
        calls,
        torch.enable_grad(),
    ):
        output = workload.output(number, batch)
        head = workload.divergence.head(output)
        gradients = _output_gradients(workload, batch, original, output, head, calls, generator)
    rows = workload.num_probes + (base is not None)
    found = np.zeros((len(workload.cells), samples, rows), np.float32)
    modules = dict(workload.model.named_modules())
    layers = workload.graph.by_name
    with torch.no_grad():
        for unit, choices, offset in zip(
            workload.graph.units, workload.cells.schemes, workload.cells.offsets[:-1], strict=True
        ):
            for name in unit.layers:
                change = _Change(workload, layers[name], modules[name], choices, schemes.get(name))
                for (inputs, _), gradient in zip(calls.of(name), gradients[name], strict=True):
                    if gradient is not None:  # the output depends on this call
                        inner = change.inner(inputs, gradient, samples)
                        found[offset : offset + len(choices)] += inner.numpy()
    u, g = found[:, :, : workload.num_probes], found[:, :, workload.num_probes :].sum(axis=2)
    return BatchResponses(u.copy(), g)


_Hook = Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]


class _Calls:
    """Inputs and differentiable outputs of every searched layer during one forward pass."""

    def __init__(self, workload: Workload) -> None:
        modules = dict(workload.model.named_modules())
        names = [name for unit in workload.graph.units for name in unit.layers]
        self._modules = {name: modules[name] for name in names}
        self._inputs: dict[LayerName, list[torch.Tensor]] = {name: [] for name in names}
        self._outputs: dict[LayerName, list[torch.Tensor]] = {name: [] for name in names}
        self._handles = ExitStack()

    def __enter__(self) -> _Calls:
        for name, module in self._modules.items():
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

    def _hook(self, name: LayerName) -> _Hook:
        def remember(
            _: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> torch.Tensor:
            if not torch.is_grad_enabled():
                return output
            if not output.requires_grad:  # nothing before it is differentiable: start here
                output.requires_grad_()
            self._outputs[name].append(output)
            return output.clone()  # so that in-place operations leave the handle differentiable

        return remember

    def of(self, name: LayerName) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self._inputs[name], self._outputs[name], strict=True))

    def inputs(self) -> list[torch.Tensor]:
        return [tensor for name in self._modules for tensor in self._inputs[name]]

    def all(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [call for name in self._modules for call in self.of(name)]


def _output_gradients(
    workload: Workload,
    batch: Batch,
    original: torch.Tensor | None,
    output: torch.Tensor,
    head: torch.Tensor,
    calls: _Calls,
    generator: torch.Generator,
) -> dict[LayerName, list[torch.Tensor | None]]:
    """Return J^T S r_k of each probe, then J^T grad D around a base, stacked, for every call."""
    outputs = [call_output for _, call_output in calls.all()]
    mask = position_mask(batch, head)
    found: list[tuple[torch.Tensor | None, ...]] = []
    for _ in range(workload.num_probes):
        bits = torch.randint(0, 2, head.shape, generator=generator)
        seeds = workload.divergence.seeds(head.detach(), bits.to(head) * 2 - 1, mask)
        found.append(
            torch.autograd.grad(head, outputs, seeds, retain_graph=True, allow_unused=True)
        )
    if original is not None:
        total = workload.divergence.between(original, output, position_mask(batch, output)).sum()
        found.append(torch.autograd.grad(total, outputs, allow_unused=True))
    known = [[g for g in of_call if g is not None] for of_call in zip(*found, strict=True)]
    stacked = [torch.stack(gradients) if gradients else None for gradients in known]
    following = iter(stacked)
    return {
        name: [next(following) for _ in calls.of(name)]
        for unit in workload.graph.units
        for name in unit.layers
    }


class _Change:
    """How a layer's output changes from its base scheme to each of its choices."""

    def __init__(
        self,
        workload: Workload,
        layer: Layer,
        module: nn.Module,
        choices: Sequence[Scheme],
        base: Scheme | None,
    ) -> None:
        self._module = module
        self._choices = choices
        self._base = base
        self._limit = layer.input_range
        weight = module._parameters["weight"]
        assert weight is not None
        own = weight.detach()

        def stored(scheme: Scheme) -> torch.Tensor:
            return workload.quantizer.fake_quantize(
                layer.weight_id, own, scheme.weights, layer.channel_axis
            )

        self._weight = own if base is None else stored(base)
        self._stored = [self._weight if s == base else stored(s) for s in choices]

    def inner(self, inputs: torch.Tensor, gradient: torch.Tensor, samples: int) -> torch.Tensor:
        """Return <gradient_k, change_c> for each sample: (choices, samples, len(gradient))."""
        found = torch.zeros(len(self._choices), samples, len(gradient))
        only_weights = [i for i, scheme in enumerate(self._choices) if self._same_inputs(scheme)]
        changed = [i for i in only_weights if self._stored[i] is not self._weight]
        seen = self._seen(inputs, self._base)
        if not changed:
            pass
        elif self._ghost_is_cheaper(seen, gradient, samples, len(changed)):
            found[changed] = self._ghost(seen, gradient, samples, changed).float()
        else:
            found[changed] = _inner(gradient, self._replayed(seen, changed), samples)
        others = [i for i in range(len(self._choices)) if i not in only_weights]
        if others:
            before = replay(self._module, seen, self._weight, None)
            for i in others:
                inputs_seen = self._seen(inputs, self._choices[i])
                after = replay(self._module, inputs_seen, self._stored[i], None)
                found[i] = _inner(gradient, (after - before).unsqueeze(0), samples)[0]
        return found

    def _same_inputs(self, scheme: Scheme) -> bool:
        if self._base is None:
            return scheme.activations.is_native
        return scheme.activations == self._base.activations

    def _seen(self, inputs: torch.Tensor, scheme: Scheme | None) -> torch.Tensor:
        if scheme is None:
            return inputs
        return fake_quantize_activation(inputs, scheme.activations, self._limit)

    def _replayed(self, inputs: torch.Tensor, changed: list[int]) -> torch.Tensor:
        """Return the change of the output for each change of the weight, in which it is linear."""
        deltas = [self._stored[i] - self._weight for i in changed]
        if not self._has_free_channels():
            return torch.stack([replay(self._module, inputs, delta, None) for delta in deltas])
        together = replay(self._module, inputs, torch.cat(deltas), None)  # one larger call
        if isinstance(self._module, nn.Linear):
            return together.reshape(*together.shape[:-1], len(deltas), -1).movedim(-2, 0)
        shape = (len(together), len(deltas), -1, *together.shape[2:])
        return together.reshape(shape).movedim(1, 0)

    def _has_free_channels(self) -> bool:
        """Tell whether output channels are independent, so that more can be added."""
        if isinstance(self._module, nn.Conv1d | nn.Conv2d):
            return self._module.groups == 1
        return isinstance(self._module, nn.Linear)

    def _ghost_is_cheaper(
        self, inputs: torch.Tensor, gradient: torch.Tensor, samples: int, choices: int
    ) -> bool:
        """Compare multiplications: weight gradients of all probes against one replay a choice."""
        if not isinstance(self._module, nn.Linear):
            return False
        positions = inputs[..., 0].numel() // samples
        return len(gradient) * (positions + choices) < choices * positions

    def _ghost(
        self, inputs: torch.Tensor, gradient: torch.Tensor, samples: int, changed: list[int]
    ) -> torch.Tensor:
        """Return the inner products through the weight's gradient of each sample and probe."""
        deltas = torch.stack([(self._stored[i] - self._weight).flatten() for i in changed])
        x = inputs.reshape(samples, -1, inputs.shape[-1])
        g = gradient.reshape(len(gradient), samples, -1, gradient.shape[-1])
        step = max(1, _GHOST_ELEMENTS // (len(gradient) * deltas.shape[1]))
        parts = []
        for first in range(0, samples, step):
            part = slice(first, first + step)
            of_weight = torch.matmul(g[:, part].transpose(-1, -2), x[part])  # (K, s, out, in)
            parts.append(torch.matmul(of_weight.flatten(2), deltas.T))
        return torch.cat(parts, dim=1).permute(2, 1, 0)


def _inner(gradient: torch.Tensor, changes: torch.Tensor, samples: int) -> torch.Tensor:
    """Return <gradient_k, change_c> of each sample as (choices, samples, K)."""
    g = gradient.reshape(len(gradient), samples, -1).permute(1, 2, 0)
    c = changes.reshape(len(changes), samples, -1).transpose(0, 1)
    return torch.bmm(c, g).transpose(0, 1).float()
