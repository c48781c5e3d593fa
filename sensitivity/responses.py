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

Experts' weights, one 3-D parameter W that a module uses in its own way, stand for their own output:
J is the Jacobian from W to the network's output, through all its uses, and d = Q_c(W) - W. Its
gradient is a sum over samples, so a network with such layers takes one sample at a time and
quantizes weights again for each.

What is searched apart is a layer too: of a layer's input d = f(Q_c(x)) - f(x), of a KV cache
d = Q_c(y) - y at the output y of its projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mpq.core.problem import Allocation
from mpq.nn.batches import position_mask
from mpq.nn.patch import frozen
from mpq.nn.weights import layer_modules
from mpq.nn.workload import Workload
from sensitivity.calls import Calls, Part, parts, probe_seeds
from sensitivity.changes import Change

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
    rows = workload.num_probes + (base is not None)
    with workload.evaluating(number), frozen(workload.model):
        found = [_responses(workload, part, base) for part in parts(workload, number, rows)]
    together = np.concatenate(found, axis=1)
    probes = workload.num_probes
    return BatchResponses(together[:, :, :probes].copy(), together[:, :, probes:].sum(axis=2))


def _responses(workload: Workload, part: Part, base: Allocation | None) -> Floats32:
    """Return (cells, samples, rows): a row for each probe, and one for grad D around a base."""
    schemes = {} if base is None else workload.layer_schemes(base)
    original: torch.Tensor | None = None
    if base is not None:
        with torch.no_grad():
            original = workload.divergence.head(workload.output(part.number, part.batch))
    with (
        workload.quantized_as(base or Allocation({})),
        Calls(workload) as calls,
        torch.enable_grad(),
    ):
        head = workload.divergence.head(workload.output(part.number, part.batch))
        gradients = calls.gradients(head, _seeds(workload, part, original, head))
    rows = workload.num_probes + (base is not None)
    found = np.zeros((len(workload.cells), part.samples, rows), np.float32)
    modules = layer_modules(workload.model, workload.graph)
    layers = workload.graph.by_name
    with torch.no_grad():
        for unit, choices, offset in zip(
            workload.graph.units, workload.cells.schemes, workload.cells.offsets[:-1], strict=True
        ):
            for name in unit.layers:
                tried, now = workload.tried(layers[name], choices, schemes)
                change = Change(workload, layers[name], modules[name], tried, now)
                for (inputs, _), gradient in zip(calls.of(name), gradients[name], strict=True):
                    if gradient is not None:  # the output depends on this call
                        inner = change.inner(inputs, gradient, part.samples)
                        found[offset : offset + len(choices)] += inner.numpy()
    return found


def _seeds(
    workload: Workload,
    part: Part,
    original: torch.Tensor | None,
    head: torch.Tensor,
) -> Iterator[torch.Tensor]:
    """Yield S r of each probe, then grad D at the head around a base."""
    yield from probe_seeds(workload, part, head)
    if original is not None:
        moved = head.detach().double().requires_grad_()
        mask = position_mask(part.batch, moved)
        total = workload.divergence.between_heads(original.double(), moved, mask).sum()
        (slope,) = torch.autograd.grad(total, moved)
        yield slope.to(head)
