"""What metrics say of expert weights, against gradients and Jacobians at the parameters."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpq
from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_scheme
from mpq.core.problem import Allocation
from mpq.nn.divergence import OutputDivergence
from mpq.nn.fingerprint import model_digest
from mpq.nn.graph import build_graph
from mpq.nn.patch import quantized
from mpq.nn.shipping import ship
from mpq.nn.workload import Workload
from sensitivity import METRICS, get_metric
from sensitivity.calls import parts
from sensitivity.responses import responses_of_batch
from tests.builders import workload
from tests.contracts import metric_contract
from tests.mixtures import (
    Mixture,
    Network,
    batches,
    mixtral,
    moe_workload,
    network,
    words,
)

REFUSED = {"autoquantize", "mixllm", "lrp", "lrp_importance"}


def on_parameters(of: Workload, head: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the change of head(output) to first order for each cell and sample of batch 0.

    By forward differentiation at the parameters, one sample and cell at a time.
    """
    rows = []
    for unit, scheme in of.cells:
        layer = of.graph.by_name[unit]
        own = of.model.get_parameter(layer.weight_id).detach()
        flat = own.flatten(0, -2)
        delta = of.quantizer.fake_quantize("", flat, scheme.weights).reshape(own.shape) - own
        changes = []
        for sample in of.calibration[0]:

            def output(weight: torch.Tensor) -> torch.Tensor:
                given = {layer.weight_id: weight}  # noqa: B023
                return head(torch.func.functional_call(of.model, given, (sample[None],)))  # noqa: B023

            changes.append(torch.autograd.functional.jvp(output, (own,), (delta,))[1].flatten())
        rows.append(torch.stack(changes))
    return torch.stack(rows).detach().double()


def fisher_root(output: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return S^T of the KL divergence at one sample's output."""
    p = output.softmax(-1)
    return lambda change: p.sqrt() * (change - (p * change).sum(-1, keepdim=True))


def exact_changes(of: Workload) -> torch.Tensor:
    """Return S^T J dW of every cell and sample of batch 0, (cells, samples, outputs)."""
    moved = on_parameters(of, lambda z: z)
    with torch.no_grad():
        roots = [fisher_root(of.model(x[None])) for x in of.calibration[0]]
    return torch.stack([root(moved[:, n]) for n, root in enumerate(roots)], 1).double()


def test_scores_and_pairs_agree_with_explicit_jacobians() -> None:
    of = moe_workload(network(), batches(1), num_probes=600)
    u = responses_of_batch(of, 0).u.astype(np.float64)
    exact = exact_changes(of)
    for n in range(u.shape[1]):
        products = np.einsum("ik,jk->ijk", u[:, n], u[:, n])
        truth = (exact[:, n] @ exact[:, n].T).numpy()
        error = products.std(axis=2, ddof=1) / math.sqrt(u.shape[2])
        assert (np.abs(products.mean(axis=2) - truth) <= 5 * error + 1e-9).all()
    of_experts = [i for i, (unit, s) in enumerate(of.cells) if "." in unit and str(s) != "fp32"]
    assert np.square(u[of_experts]).mean(axis=2).min() > 0


def test_experts_are_scored_one_sample_at_a_time_however_batches_are_cut() -> None:
    model, (data,) = network(), batches(1, 6)
    whole = moe_workload(model, [data])
    assert [part.samples for part in parts(whole, 0, 2)] == [1] * 6
    u = responses_of_batch(whole, 0).u
    cut = moe_workload(model, [data[:2], data[2:]])
    together = np.concatenate([responses_of_batch(cut, n).u for n in range(2)], axis=1)
    np.testing.assert_allclose(together, u, rtol=1e-4, atol=1e-7)


def test_one_parameter_in_two_modules_is_one_layer_that_counts_both_uses() -> None:
    class Tied(Network):
        def __init__(self) -> None:
            super().__init__()
            self.second = Mixture()
            self.second.up = self.moe.up

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.second(self.moe(self.stem(x))))

    torch.manual_seed(3)
    model = Tied().eval()
    of = moe_workload(model, batches(1), num_probes=400)
    assert of.graph.by_name["moe.up"].calls == 2
    assert "second.up" not in of.graph.by_name
    squares = np.square(responses_of_batch(of, 0).u.astype(np.float64))
    error = squares.std(axis=2, ddof=1) / math.sqrt(squares.shape[2])
    truth = exact_changes(of).square().sum(2).numpy()
    assert (np.abs(squares.mean(axis=2) - truth) <= 5 * error + 1e-9).all()
    with quantized(model, {"moe.up": parse_scheme("int2")}):
        assert model.second.up is model.moe.up


def test_around_a_quantized_network_slopes_are_those_of_the_divergence() -> None:
    model = network().double()
    data = [batch.double() for batch in batches(1)]
    near = workload(model, data, ("int3", "int8t", "int8"))
    fine, moved = near.cells.schemes[0][2], near.cells.schemes[0][1]
    base = Allocation(dict.fromkeys(near.cells.units, fine))
    found = responses_of_batch(near, 0, base)
    with torch.no_grad():
        original = model(data[0])

        def divergence(allocation: Allocation) -> torch.Tensor:
            with quantized(model, near.layer_schemes(allocation)):
                return near.divergence.between(original, model(data[0]))

        for unit in ("moe.up", "moe.down"):
            number = near.cells.index((unit, moved))
            change = (divergence(Allocation({**base, unit: moved})) - divergence(base)).numpy()
            curved = 0.5 * np.square(found.u[number]).mean(axis=1)
            np.testing.assert_allclose(
                found.g[number] + curved, change, atol=3 * curved.max() + 1e-9
            )
            assert not found.g[near.cells.index((unit, fine))].any()


def loss(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, batch[:, :3].argmax(1))


@pytest.mark.filterwarnings("ignore:hessian_.* is negative")  # so is this network's curvature
@pytest.mark.parametrize("name", METRICS)
def test_every_metric_scores_experts_or_says_what_to_use(name: str) -> None:
    model = network()
    model.moe.down.requires_grad_(False)  # must come back so
    of = moe_workload(model, batches(), loss=loss)
    scores = metric_contract(get_metric(name), of)
    assert (scores is None) == (name in REFUSED)
    if scores is None:
        with pytest.raises(InvalidInputError, match=r"'moe.up' are a parameter .* 'kl', or leave"):
            get_metric(name).tasks(of)
        outside = build_graph(of.model, of.calibration[0], skip=["moe.up", "moe.down"])
        names = tuple(unit.name for unit in outside.units)
        cells = mpq.Cells(units=names, schemes=of.cells.schemes[: len(names)])
        assert (
            metric_contract(
                get_metric(name),
                moe_workload(of.model, batches(), loss=loss, graph=outside, cells=cells),
            )
            is not None
        )
        return
    lossy = [i for i, (_, scheme) in enumerate(of.cells) if str(scheme) != "fp32"]
    assert (scores.sensitivity.values[lossy] != 0).all()


def of_metric(name: str, of: Workload) -> np.ndarray:
    metric = get_metric(name)
    partials = [metric.run(of, task) for task in metric.tasks(of)]
    return metric.combine(of.cells, partials).sensitivity.values


def sample_gradients(of: Workload, unit: str) -> torch.Tensor:
    """Return the gradient of each sample's loss with respect to a weight."""
    weight = of.model.get_parameter(of.graph.by_name[unit].weight_id)
    found = [
        torch.autograd.grad(loss(of.model(x[None]), x[None]), weight)[0]
        for batch in of.calibration
        for x in batch
    ]
    return torch.stack(found).double()


def test_first_order_metrics_equal_gradients_sample_by_sample() -> None:
    of = moe_workload(network(), batches(), loss=loss)
    taylor, fisher = of_metric("taylor", of), of_metric("fisher", of)
    for number, (unit, scheme) in enumerate(of.cells):
        gradients = sample_gradients(of, unit)
        own = of.model.get_parameter(of.graph.by_name[unit].weight_id).detach()
        flat = of.quantizer.fake_quantize("", own.flatten(0, -2), scheme.weights)
        delta = (flat.reshape(own.shape) - own).double()
        inner = (gradients * delta).flatten(1).sum(1).abs().mean()
        weighed = (gradients.square().mean(0) * delta.square()).sum()
        assert taylor[number] == pytest.approx(float(inner), rel=1e-4, abs=1e-9)
        assert fisher[number] == pytest.approx(float(weighed), rel=1e-4, abs=1e-9)


def test_gauss_newton_traces_are_those_of_explicit_jacobians() -> None:
    of = moe_workload(network(), batches(1))
    found = of_metric("gauss_newton_trace", of)
    for number, (unit, scheme) in enumerate(of.cells):
        layer = of.graph.by_name[unit]
        own = of.model.get_parameter(layer.weight_id).detach()
        traces = []
        for x in of.calibration[0]:

            def output(weight: torch.Tensor) -> torch.Tensor:
                given = {layer.weight_id: weight}  # noqa: B023
                return torch.func.functional_call(of.model, given, (x[None],))[0]  # noqa: B023

            jacobian = torch.func.jacrev(output)(own).detach().flatten(1)
            root = fisher_root(output(own).detach())
            traces.append(sum(float(root(column).square().sum()) for column in jacobian.T))
        flat = own.flatten(0, -2)
        squared = (of.quantizer.fake_quantize("", flat, scheme.weights) - flat).square().sum()
        expected = np.mean(traces) / own.numel() * float(squared)
        assert found[number] == pytest.approx(expected, rel=1e-4, abs=1e-12)


class Elsewhere(nn.Module):
    """Reads the experts of a module that it never calls, after one that it does call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.holder, self.last = nn.Linear(6, 4), Mixture(), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.linear(self.first(x), self.holder.up[1]))


@pytest.mark.parametrize("make", [network, Elsewhere])
def test_one_cell_at_a_time_is_what_whole_passes_measure(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    of = moe_workload(make().eval(), batches())
    found = of_metric("kl", of)
    with torch.no_grad():
        for number, (unit, scheme) in enumerate(of.cells):
            per_sample = []
            for batch in of.calibration:
                original = of.model(batch)
                with quantized(of.model, {unit: scheme}):
                    changed = of.model(batch)
                per_sample.append(OutputDivergence("kl").between(original, changed))
            mean = float(torch.cat(per_sample).mean())
            assert found[number] == pytest.approx(mean, rel=1e-12)


def test_what_precedes_the_experts_is_not_run_again_for_them() -> None:
    runs: list[int] = []

    class Counted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            runs.append(len(x))
            return super().forward(x)

    model = network()
    model.stem = Counted(6, 4)
    of = moe_workload(model, batches(1))
    runs.clear()
    of_metric("kl", of)
    lossy_stem = sum(scheme.weights.bits < 32 for scheme in of.cells.schemes[0])
    others = sum(str(scheme) != "fp32" for _, scheme in of.cells) - lossy_stem
    assert lossy_stem < sum(size > 1 for size in runs) < lossy_stem + others


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_routed_experts_of_transformers_are_scored(implementation: str) -> None:
    """Scores of 8-bit cells are the divergences that they really cause, to second order."""
    model = mixtral(implementation)
    data = words(1, 2)
    of = workload(model, data, ("int8", "int7"), num_probes=200, batch_keys=("a",))
    u = responses_of_batch(of, 0).u.astype(np.float64)
    predicted = 0.5 * np.square(u).mean(axis=2)
    error = 0.5 * np.square(u).std(axis=2, ddof=1) / math.sqrt(u.shape[2])
    model.set_experts_implementation("eager")  # the others take no float64
    double = model.double()
    with torch.no_grad():
        original = double(**data[0]).logits
        for number, (unit, scheme) in enumerate(of.cells):
            if "experts" in unit:
                with quantized(double, {unit: scheme}):
                    changed = double(**data[0]).logits
                measured = of.divergence.between(original, changed).numpy()
                off = np.abs(predicted[number] - measured)
                assert (off <= 5 * error[number] + 0.1 * measured + 1e-9).all()


def test_workers_get_experts_and_find_the_same() -> None:
    of = moe_workload(network(), batches())
    travelled = pickle.loads(pickle.dumps(ship(of))).unpack()
    assert model_digest(travelled.model) == model_digest(of.model)
    for n in range(2):
        found, own = responses_of_batch(travelled, n), responses_of_batch(of, n)
        assert np.array_equal(found.u, own.u)


def test_changed_experts_change_the_keys() -> None:
    model = network()
    keys = [model_digest(model)]
    with torch.no_grad():
        model.moe.up[2, 0, 0] += 1e-3
    assert model_digest(model) not in keys
