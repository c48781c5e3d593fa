"""HAWQ-V2's score: the mean Hessian trace of a layer times its squared perturbation.

    omega_l(c) = Tr(H_W) / n_W * |Q_c(W_l) - W_l|^2 + mean_x Tr(H_a(x)) / n_a * |Q_c(a) - a|^2

(Dong et al. 2020, eq. 6 and sec. 3.2; the term of activations, sec. 3.4, is our reading). H_W is
the Hessian of the mean loss with respect to the layer's weight, H_a(x) that of sample x's loss with
respect to the layer's input a; n_W and n_a are their numbers of elements. Without a loss it is the
output divergence, of which the Hessian is the Gauss-Newton matrix.

Traces are estimated by Hutchinson's E[v^T H v] with sign vectors v, one layer at a time: one sweep
for all layers would need L times fewer products but its cross-layer blocks raise the variance by
more than that. Hessian-vector products are PyHessian's; its stopping rule is not used (it can stop
after two draws): probes come in rounds of a quarter, a quarter and half of their number, scoring
may stop after any of them, and the error is reported.

Cost for each stored weight and batch: in each round one forward pass and one backward pass that can
be differentiated again, then one product, about two backward passes, a probe; the same again for
each layer whose input may be quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from mpq.core.formats import Scheme
from mpq.core.layers import Layer
from mpq.core.protocols import Partial, Scores, Task
from mpq.core.tables import Cells, Floats, SensitivityTable
from mpq.nn.batches import num_samples
from mpq.nn.fingerprint import digest, function_digest
from mpq.nn.weights import layer_module
from mpq.nn.workload import Workload
from sensitivity.calls import loss_parts, parts
from sensitivity.estimators.hutchinson import quadratic_forms, sign_vector
from sensitivity.hessian_products import HessianProducts, loss_on, twice_differentiable
from sensitivity.input_changes import squared_input_changes
from sensitivity.negative import warn_of_negative
from sensitivity.tasks import refuse_apart, unit_tasks
from sensitivity.weight_calls import stored_weights

_VERSION = 3
_PROBES_FACTOR = 8  # probes per batch: this many times the job's `num_probes`
_ROUNDS = (2, 2, 4)  # of them, in each round
_ROWS = 4  # what the graph of a second derivative holds, in gradients of every layer's output


class HessianTrace:
    """The metric `hessian_trace`: one task for each round of probes and unit."""

    name = "hessian_trace"

    def tasks(self, workload: Workload) -> Sequence[Task]:
        """Return all units' tasks of the first round, then those of the next.

        The key holds model, data, cells, probes, loss and seed. Raises InvalidInputError where KV
        caches are searched.
        """
        refuse_apart(self.name, workload, inputs=False)
        units = unit_tasks(workload, self.name, _VERSION, function_digest(workload.loss))
        return [
            replace(task, key=digest(task.key, number), part=(*task.part, number), round=number)
            for number in range(len(_ROUNDS))
            for task in units
        ]

    def run(self, workload: Workload, task: Task) -> Partial:
        """Return draws of one unit: layers are its stored weights, P the probes of the round.

        "traces" of (layers, batches, P) and "squared" of (layers, schemes) are the two factors of
        the weights' term, "sizes" and "samples" the elements of each layer and the samples of each
        batch; "inputs" of (schemes, P) is the term of activations.
        """
        number, turn = task.part
        unit, schemes = workload.graph.units[number], workload.cells.schemes[number]
        probes = _ROUNDS[turn] * workload.num_probes
        seed = (workload.seed * 1_000_003 + number) * len(_ROUNDS) + turn
        generator = torch.Generator().manual_seed(seed)
        weights = list(stored_weights(workload, unit, schemes))
        traces = [
            _weight_draws(workload, weight.parameter, probes, generator)
            if any(delta is not None for delta in weight.deltas)
            else [[0.0] * probes for _ in workload.calibration]
            for weight in weights
        ]
        inputs = np.zeros((len(schemes), probes))
        if not all(scheme.activations.is_native for scheme in schemes):
            for name in unit.layers:
                layer = workload.graph.by_name[name]
                inputs += _input_draws(workload, layer, schemes, probes, seed)
        return {
            "traces": np.array(traces).reshape(len(weights), len(workload.calibration), probes),
            "squared": np.array([weight.squared for weight in weights]).reshape(-1, len(schemes)),
            "sizes": np.array([weight.layer.num_weights for weight in weights], np.int64),
            "samples": np.array([num_samples(batch) for batch in workload.calibration]),
            "inputs": inputs,
        }

    def combine(self, cells: Cells, partials: Sequence[Partial]) -> Scores:
        """Return omega of every cell; the error bar is that of the traces, over probes."""
        values, errors = [], []
        count = len(cells.units)
        for number in range(count):
            value, error = _omega(partials[number::count])
            values.append(value)
            errors.append(error)
        table = SensitivityTable(
            metric=self.name,
            cells=cells,
            values=np.concatenate(values),
            stderr=np.concatenate(errors),
        )
        warn_of_negative(table)
        return Scores(sensitivity=table)


def _omega(rounds: Sequence[Partial]) -> tuple[Floats, Floats]:
    """Return omega of each scheme of a unit and its standard error."""
    squared, sizes, samples = (
        np.asarray(rounds[0][part], np.float64) for part in ("squared", "sizes", "samples")
    )
    traces = np.concatenate([p["traces"] for p in rounds], axis=2)
    draws = np.average(traces, axis=1, weights=samples) / sizes[:, None]
    inputs = np.concatenate([p["inputs"] for p in rounds], axis=1)
    variance = draws.var(axis=1, ddof=1) @ squared**2 + inputs.var(axis=1, ddof=1)
    value = draws.mean(axis=1) @ squared + inputs.mean(axis=1)
    return value, np.sqrt(variance / draws.shape[1])


def _weight_draws(
    workload: Workload, weight: nn.Parameter, probes: int, generator: torch.Generator
) -> list[list[float]]:
    """Return v^T H v of one weight for each batch and probe; H is that of the batch's mean loss.

    All batches meet the same vectors, so that their mean is the draw of all samples together,
    however these are cut into batches.
    """
    found = []
    start = generator.get_state()
    with twice_differentiable(workload, weight):
        for number, batch in enumerate(workload.calibration):
            draws = np.zeros(probes)
            for part in loss_parts(workload, number):
                generator.set_state(start)
                products = HessianProducts(loss_on(workload, part), [weight])

                def flat(v: torch.Tensor, products: HessianProducts = products) -> torch.Tensor:
                    return products([v.reshape(weight.shape).to(weight)])[0].flatten().cpu()

                forms = quadratic_forms(flat, weight.numel(), probes, generator, weight.dtype)
                draws += np.array(list(forms)) * (part.samples / num_samples(batch))
            found.append(draws.tolist())
    return found


def _input_draws(
    workload: Workload,
    layer: Layer,
    schemes: Sequence[Scheme],
    probes: int,
    seed: int,
) -> Floats:
    """Return mean_x v^T H_a(x) v / n_a * |Q(a) - a|^2 of each scheme and probe.

    The loss is a mean over samples that do not see each other, so that one product with the input
    of all of them holds v^T H_a(x) v of each, without terms between samples. Of a layer that is
    called several times each call's input is quantized, and has its own term. Vectors belong to
    samples, by their place in the calibration data.
    """
    found = np.zeros((len(schemes), probes))
    total = sum(num_samples(batch) for batch in workload.calibration)
    for number in range(len(workload.calibration)):
        for part in parts(workload, number, _ROWS):
            with twice_differentiable(workload), _moved_inputs(workload, layer) as seen:
                products = HessianProducts(loss_on(workload, part), [move for _, move in seen])
            changes = [
                squared_input_changes(inputs, layer, schemes, part.samples)
                * (part.samples / (inputs.numel() / part.samples))
                for inputs, _ in seen
            ]
            generators = [
                torch.Generator().manual_seed(seed * 1_000_003 + part.first + n)
                for n in range(part.samples)
            ]
            for probe in range(probes):
                vectors = [_signs_like(move, generators) for _, move in seen]
                for v, hv, change in zip(vectors, products(vectors), changes, strict=True):
                    of_sample = (v * hv).reshape(part.samples, -1).double().sum(1).cpu()
                    found[:, probe] += (change @ of_sample).numpy() / total
    return found


def _signs_like(values: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    each = values.numel() // len(generators)
    signs = [sign_vector(each, generator, values.dtype) for generator in generators]
    return torch.cat(signs).reshape(values.shape).to(values)


@contextmanager
def _moved_inputs(
    workload: Workload, layer: Layer
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Add a differentiable zero to the layer's input; yields (input, zero) of each call so far."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        values, *rest = args
        zero = torch.zeros_like(values.detach()).requires_grad_()
        seen.append((values.detach(), zero))
        return (values + zero, *rest)

    handle = layer_module(workload.model, layer.name).register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
