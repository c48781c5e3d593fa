"""The response sketch: every cell's effect on the output, and all pairs of cells, in one sweep.

For unit l in scheme c let d(x) = (layer with quantized weights and inputs) - (layer) on the
original network's own input of that layer, J the Jacobian from the layer's output to the
network's output and S a square root of the output divergence's curvature
(mpq.nn.divergence). With random sign vectors r,

    u_lc[x, k] = < J^T S r_k , d_lc(x) >,      E_k u_lc u_me = d_lc^T J^T S S^T J d_me,

so 1/2 mean u_lc^2 is the second-order divergence of the cell alone and 1/2 mean (sum_l u_l)^2
that of a whole allocation, cross terms included, without bias over the probes.

Cost for each batch: one forward pass, K backward passes to all layer outputs at once, and one
local replay of each layer for each scheme. Gauss-Newton: Schraudolph 2002; random output probes
of the curvature: Hutchinson 1990.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mpq.core.formats import Scheme
from mpq.core.layers import LayerName
from mpq.core.protocols import Partial, Scores, Task
from mpq.core.tables import Cells, Responses, SensitivityTable
from mpq.nn.batches import cut, num_samples, position_mask
from mpq.nn.fingerprint import digest
from mpq.nn.patch import evaluating, frozen
from mpq.nn.quantizers import fake_quantize_activation
from mpq.nn.replay import replay
from mpq.nn.workload import Workload

_Hook = Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]

_VERSION = 1  # part of every content key: raise it when results change


class GaussNewton:
    """The metric `gauss_newton`: one task for each calibration batch."""

    name = "gauss_newton"

    def tasks(self, workload: Workload) -> Sequence[Task]:
        """Return one task per batch; its key holds model, data, cells, probes and seed."""
        cells = [(unit, str(scheme)) for unit, scheme in workload.cells]
        setting = (self.name, _VERSION, workload.key, cells, workload.num_probes, workload.seed)
        return [
            Task(digest(setting, batch_key, number), (number,))
            for number, batch_key in enumerate(workload.batch_keys)
        ]

    def run(self, workload: Workload, task: Task) -> Partial:
        """Return the responses of every cell to one batch: "u" of (cells, samples, probes)."""
        (number,) = task.part
        batch = workload.calibration[number]
        generator = torch.Generator().manual_seed(workload.seed * 1_000_003 + number)
        with evaluating(workload.model), frozen(workload.model):
            whole = _responses(workload, number, batch, generator)
            if whole is None:  # some layer mixes the samples of a batch: one at a time
                parts = [cut(batch, i, i + 1) for i in range(num_samples(batch))]
                found = [_responses(workload, number, part, generator) for part in parts]
                whole = np.concatenate([u for u in found if u is not None], axis=1)
        return {"u": whole}

    def combine(self, cells: Cells, partials: Sequence[Partial]) -> Scores:
        """Return the table of own scores with their standard error, and the responses."""
        vectors = np.concatenate([p["u"] for p in partials], axis=1).astype(np.float32)
        responses = Responses(cells=cells, vectors=vectors)
        values, stderr = responses.own_scores()
        table = SensitivityTable(metric=self.name, cells=cells, values=values, stderr=stderr)
        return Scores(sensitivity=table, responses=responses)


def _responses(
    workload: Workload, number: int, batch: object, generator: torch.Generator
) -> np.ndarray | None:
    """Return u of (cells, samples, probes); None where a layer's first axis is not samples."""
    samples = num_samples(batch)
    calls = _Calls(workload)
    with calls, torch.enable_grad():
        output = workload.output(number, batch)
        head = workload.divergence.head(output)
    if samples > 1 and any(inputs.shape[0] % samples for inputs, _ in calls.all()):
        return None
    gradients = _output_gradients(workload, batch, head, calls, generator)
    u = np.zeros((len(workload.cells), samples, workload.num_probes), np.float32)
    modules = dict(workload.model.named_modules())
    with torch.no_grad():
        for unit, schemes, offset in zip(
            workload.graph.units,
            workload.cells.schemes,
            workload.cells.offsets[:-1],
            strict=True,
        ):
            for layer in unit.layers:
                changes = _Changes(modules[layer], schemes, workload, layer)
                for (inputs, _), gradient in zip(
                    calls.of(layer), gradients.get(layer, []), strict=True
                ):
                    if gradient is None:  # the output does not depend on this call
                        continue
                    for place, change in enumerate(changes.of(inputs)):
                        if change is None:
                            continue
                        inner = (gradient * change).reshape(len(gradient), samples, -1).sum(-1)
                        u[offset + place] += inner.T.numpy()
    return u


class _Calls:
    """Inputs and differentiable outputs of every searched layer during one forward pass."""

    def __init__(self, workload: Workload) -> None:
        modules = dict(workload.model.named_modules())
        names = [name for unit in workload.graph.units for name in unit.layers]
        self._modules = {name: modules[name] for name in names}
        self._calls: dict[LayerName, list[tuple[torch.Tensor, torch.Tensor]]] = {
            name: [] for name in names
        }
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> _Calls:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: LayerName) -> _Hook:
        def remember(
            _: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> torch.Tensor:
            if not output.requires_grad:  # nothing before it is differentiable: start here
                output.requires_grad_()
            inputs = args[0].detach()
            self._calls[name].append((inputs, output))
            return output.clone()  # so that in-place operations leave the handle differentiable

        return remember

    def of(self, name: LayerName) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return self._calls[name]

    def all(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [call for calls in self._calls.values() for call in calls]


def _output_gradients(
    workload: Workload,
    batch: object,
    head: torch.Tensor,
    calls: _Calls,
    generator: torch.Generator,
) -> dict[LayerName, list[torch.Tensor | None]]:
    """Return J^T S r of every call for every probe, stacked over probes in front."""
    outputs = [output for _, output in calls.all()]
    mask = position_mask(batch, head)
    found: list[tuple[torch.Tensor | None, ...]] = []
    for probe in range(workload.num_probes):
        bits = torch.randint(0, 2, head.shape, generator=generator)
        seeds = workload.divergence.seeds(head.detach(), bits.to(head) * 2 - 1, mask)
        last = probe == workload.num_probes - 1
        found.append(
            torch.autograd.grad(head, outputs, seeds, retain_graph=not last, allow_unused=True)
        )
    known = [[g for g in probes if g is not None] for probes in zip(*found, strict=True)]
    stacked = iter([torch.stack(probes) if probes else None for probes in known])
    return {
        name: [next(stacked) for _ in calls.of(name)]
        for unit in workload.graph.units
        for name in unit.layers
    }


class _Changes:
    """The change of a layer's output under each scheme: quantized weights and inputs."""

    def __init__(
        self, module: nn.Module, schemes: Sequence[Scheme], workload: Workload, layer: LayerName
    ) -> None:
        self._module = module
        self._schemes = schemes
        self._limit = workload.limits.get(layer)
        weight = module._parameters["weight"]
        assert weight is not None
        self._weight = weight.detach()
        facts = workload.graph.by_name[layer]
        self._stored = [
            workload.quantizer.fake_quantize(
                facts.weight_id, self._weight, scheme.weights, facts.channel_axis
            )
            for scheme in schemes
        ]

    def of(self, inputs: torch.Tensor) -> list[torch.Tensor | None]:
        """Return the change in each scheme on remembered inputs; None where nothing changes."""
        original: torch.Tensor | None = None
        changes: list[torch.Tensor | None] = []
        for scheme, stored in zip(self._schemes, self._stored, strict=True):
            change: torch.Tensor | None = None
            if not scheme.activations.is_native:
                if original is None:
                    original = replay(self._module, inputs, self._weight, None)
                seen = fake_quantize_activation(inputs, scheme.activations, self._limit)
                change = replay(self._module, seen, stored, None) - original
            elif stored is not self._weight:  # linear in the weight: one replay of its change
                change = replay(self._module, inputs, stored - self._weight, None)
            changes.append(change)
        return changes
