"""Per-layer Hessian traces against exact Hessians, and PyHessian on the same batch."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_scheme
from mpq.core.tables import SensitivityTable
from mpq.nn.quantizers import WeightQuantizer, fake_quantize_activation
from mpq.nn.workload import Workload
from sensitivity.hessian_trace import HessianTrace
from tests.builders import Recurrent
from tests.oracles import exact_hessian
from tests.test_gauss_newton import make_workload

SCHEMES = (parse_scheme("int2"), parse_scheme("int4"))


def loss(output: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(output, batch[1])


def small_workload(probes: int = 2, with_loss: bool = True) -> Workload:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batches = [(torch.randn(6, 4).double(), torch.randint(0, 3, (6,))) for _ in range(2)]
    workload = make_workload(model, batches, probes=probes, schemes=SCHEMES)
    return replace(workload, loss=loss) if with_loss else workload


def exact_traces(workload: Workload) -> list[float]:
    """Return Tr(H_l) of the mean loss of each layer's weight by the full Hessian."""
    model = workload.model
    found = []
    for name in ("0.weight", "2.weight"):
        total = 0.0
        for batch in workload.calibration:

            def of(weight: torch.Tensor) -> torch.Tensor:
                output = functional_call(model, {name: weight}, (batch[0],))  # noqa: B023
                if workload.loss is not None:
                    return workload.loss(output, batch)  # noqa: B023
                return workload.divergence.between(model(batch[0]).detach(), output).mean()  # noqa: B023

            weight = dict(model.named_parameters())[name].detach()
            matrix = torch.autograd.functional.hessian(of, weight).reshape(
                weight.numel(), weight.numel()
            )
            total += float(matrix.trace())
        found.append(total / len(workload.calibration))
    return found


def run(workload: Workload) -> tuple[np.ndarray, np.ndarray, list[float]]:
    metric = HessianTrace()
    partials = [metric.run(workload, task) for task in metric.tasks(workload)]
    table = metric.combine(workload.cells, partials).sensitivity
    squared = []
    parameters = dict(workload.model.named_parameters())
    for layer in ("0.weight", "2.weight"):
        weight = parameters[layer].detach()
        for scheme in SCHEMES:
            stored = WeightQuantizer().fake_quantize(layer, weight, scheme.weights)
            squared.append(float((stored - weight).square().sum()))
    return table.values, table.stderr, squared


@pytest.mark.parametrize("with_loss", [True, False])
def test_omega_is_the_mean_trace_times_the_squared_perturbation(with_loss: bool) -> None:
    workload = small_workload(probes=100, with_loss=with_loss)
    values, stderr, squared = run(workload)
    traces = np.repeat(exact_traces(workload), 2)
    sizes = np.repeat([20, 15], 2)
    assert (np.abs(values - traces / sizes * squared) <= 5 * stderr).all()
    assert (stderr < 0.2 * np.abs(values)).all()


def test_error_bars_cover_as_often_as_they_say() -> None:
    truth = None
    inside = []
    for seed in range(60):
        workload = replace(small_workload(probes=4), seed=seed)
        values, stderr, squared = run(workload)
        truth = truth or exact_traces(workload)
        expected = np.repeat(truth, 2) / np.repeat([20, 15], 2) * squared
        inside += list(np.abs(values - expected)[::2] <= 1.96 * stderr[::2])
    share = float(np.mean(inside))
    assert abs(share - 0.95) <= 4 * math.sqrt(0.95 * 0.05 / len(inside))


def test_agrees_with_pyhessian_on_the_same_batch() -> None:
    from pyhessian import hessian as PyHessian

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))
    batch = (torch.randn(6, 4), torch.randint(0, 3, (6,)))
    workload = replace(make_workload(model, [batch], probes=100, schemes=SCHEMES), loss=loss)
    metric = HessianTrace()
    tasks = [task for task in metric.tasks(workload) if task.round == 2]
    partials = [metric.run(workload, task) for task in tasks]
    ours = sum(float(p["traces"].mean()) for p in partials)
    error = math.sqrt(sum(float(p["traces"].std(ddof=1)) ** 2 / p["traces"].size for p in partials))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its constructor keeps a graph alive
        draws = PyHessian(model, nn.CrossEntropyLoss(), data=batch, cuda=False).trace(
            maxIter=400, tol=0.0
        )
    theirs, their_error = np.mean(draws), np.std(draws, ddof=1) / math.sqrt(len(draws))
    assert abs(ours - theirs) <= 4 * math.hypot(error, their_error)


def deep_workload(probes: int, texts: tuple[str, ...], samples: int = 5) -> Workload:
    """Return a network in which each layer's input has curvature, with a loss per sample."""
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()
    batches = [
        (torch.randn(n, 3).double(), torch.randint(0, 3, (n,))) for n in (samples, samples - 2)
    ]
    chosen = tuple(map(parse_scheme, texts))
    return replace(make_workload(model, batches, probes=probes, schemes=chosen), loss=loss)


def exact_input_terms(workload: Workload) -> list[float]:
    """Return mean_x Tr(H_a(x)) / n_a |Q(a) - a|^2 of each cell, one sample at a time."""
    found = []
    modules = dict(workload.model.named_modules())
    for unit, scheme in workload.cells:
        terms = []
        for inputs, labels in workload.calibration:
            for n in range(len(inputs)):
                seen: list[torch.Tensor] = []
                handle = modules[unit].register_forward_pre_hook(lambda _, a: seen.append(a[0]))  # noqa: B023
                workload.model(inputs[n : n + 1])
                handle.remove()
                seen[0] = seen[0].detach()

                def of(a: torch.Tensor) -> torch.Tensor:
                    handle = modules[unit].register_forward_pre_hook(lambda _, __: (a,))  # noqa: B023
                    output = workload.model(inputs[n : n + 1])  # noqa: B023
                    handle.remove()
                    return nn.functional.cross_entropy(output, labels[n : n + 1])  # noqa: B023

                changed = fake_quantize_activation(seen[0], scheme.activations)
                trace = exact_hessian(of, seen[0]).trace() / seen[0].numel()
                terms.append(float(trace * (changed - seen[0]).square().sum()))
        found.append(sum(terms) / len(terms))
    return found


def scores(workload: Workload, rounds: int = 3) -> SensitivityTable:
    metric = HessianTrace()
    tasks = [task for task in metric.tasks(workload) if task.round < rounds]
    partials = [metric.run(workload, task) for task in tasks]
    return metric.combine(workload.cells, partials).sensitivity


@pytest.mark.filterwarnings("ignore::mpq.core.errors.MpqWarning")  # an untrained network
def test_activations_have_the_traces_of_each_sample_alone() -> None:
    workload = deep_workload(probes=50, texts=("fp32:int3", "fp32:int5", "fp32"))
    only_weights = replace(workload, cells=deep_workload(50, ("fp32",)).cells)
    table, weights = scores(workload), scores(only_weights)
    exact = exact_input_terms(workload)
    assert np.linalg.norm(table.stderr) < 0.2 * np.linalg.norm(exact)
    for number, (unit, _) in enumerate(workload.cells):
        alone = weights.cells.unit_number(unit)
        off = table.values[number] - weights.values[alone] - exact[number]
        error = math.hypot(table.stderr[number], weights.stderr[alone])
        assert abs(off) <= 4 * error


def test_activations_of_a_layer_that_is_called_twice_count_twice() -> None:
    torch.manual_seed(0)
    model = Recurrent(width=3).double()
    batch = torch.randn(6, 3).double()
    workload = make_workload(model, [batch], probes=60, schemes=(parse_scheme("fp32:int4"),))
    unit = next(name for name in workload.cells.units if "cell" in name)
    (scheme,) = workload.cells.schemes[0]
    found = scores(workload)
    called: list[tuple[str, torch.Tensor]] = []
    for name in ("cell", "twin"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, a, name=name: called.append((name, a[0].detach()))
        )
    model(batch)
    calls, exact = list(called), 0.0
    for place, (_, inputs) in enumerate(calls):
        squares = (fake_quantize_activation(inputs, scheme.activations) - inputs).square().sum(1)
        for n in range(6):

            def of(move: torch.Tensor) -> torch.Tensor:
                counter = [0]

                def add(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
                    counter[0] += 1
                    return (args[0] + move,) if counter[0] == place + 1 else args  # noqa: B023

                handles = [
                    model.get_submodule(m).register_forward_pre_hook(add) for m in ("cell", "twin")
                ]
                x = batch[n : n + 1]  # noqa: B023
                output = model(x)
                for handle in handles:
                    handle.remove()
                return workload.divergence.between(model(x).detach(), output).mean()

            trace = exact_hessian(of, torch.zeros(1, 3, dtype=torch.float64)).trace()
            exact += float(trace / 3 * squares[n]) / 6
    assert len(calls) == 3
    number = workload.cells.index((unit, scheme))
    assert abs(found.values[number] - exact) <= 4 * found.stderr[number]
    assert found.stderr[number] < 0.2 * exact


def test_scoring_may_stop_after_any_round_and_the_error_falls() -> None:
    workload = small_workload(probes=20)
    metric = HessianTrace()
    tasks = metric.tasks(workload)
    assert [task.round for task in tasks] == sorted(task.round for task in tasks)
    assert len({task.key for task in tasks}) == len(tasks)
    tables = [scores(workload, rounds) for rounds in (1, 2, 3)]
    for table in tables:
        expected = np.repeat(exact_traces(workload), 2) / np.repeat([20, 15], 2)
        expected = expected * run(workload)[2]
        assert (np.abs(table.values - expected) <= 5 * table.stderr).all()
    # 40, 80 and 160 probes
    assert (tables[2].stderr < 0.8 * tables[0].stderr).all()
    np.testing.assert_allclose(tables[2].stderr, tables[0].stderr / 2, rtol=0.5)


def test_batches_count_by_their_samples() -> None:
    workload = deep_workload(probes=200, texts=("int3",), samples=20)
    table = scores(workload)
    one_batch = tuple(torch.cat(parts) for parts in zip(*workload.calibration, strict=True))
    together = scores(replace(workload, calibration=(one_batch,), seed=1))
    error = np.hypot(table.stderr, together.stderr)
    assert (np.abs(table.values - together.values) <= 4 * error).all()
    assert (error < 0.1 * np.abs(table.values)).all()


def test_a_loss_that_is_not_one_number_names_the_batch() -> None:
    workload = replace(small_workload(), loss=lambda output, batch: output)
    metric = HessianTrace()
    with pytest.raises(InvalidInputError, match=r"batch 0 .*\[6, 3\]"):
        metric.run(workload, metric.tasks(workload)[0])


def test_a_loss_that_is_nan_names_the_batch() -> None:
    workload = replace(small_workload(), loss=lambda output, batch: output.sum() * float("nan"))
    metric = HessianTrace()
    with pytest.raises(InvalidInputError, match="loss is nan on batch 0"):
        metric.run(workload, metric.tasks(workload)[0])


def test_fused_attention_is_differentiated_twice() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.project(x).unsqueeze(1)
            return self.head(nn.functional.scaled_dot_product_attention(q, q, q).mean((1, 2)))

    workload = make_workload(Attention(), [torch.randn(2, 3, 4)], schemes=SCHEMES)
    metric = HessianTrace()
    traces = metric.run(workload, metric.tasks(workload)[0])["traces"]
    assert np.isfinite(traces).all()
    assert traces.any()


def test_a_model_that_cannot_be_differentiated_twice_is_told_what_to_use() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * 1

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(Once.apply(self.first(x)).tanh())

    workload = make_workload(Model(), [torch.randn(4, 3)], schemes=SCHEMES)
    metric = HessianTrace()
    with pytest.raises(InvalidInputError, match="gauss_newton"):
        metric.run(workload, metric.tasks(workload)[0])


@pytest.mark.parametrize("text", ["int3", "int3:int4"])
def test_however_the_samples_are_cut_into_batches_the_numbers_are_the_same(text: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    samples = torch.randn(12, 4).double()
    found = []
    for sizes in ([12], [3, 9], [5, 4, 3]):
        given = make_workload(model, torch.split(samples, sizes), schemes=(parse_scheme(text),))
        metric = HessianTrace()
        partials = [metric.run(given, task) for task in metric.tasks(given)]
        found.append(metric.combine(given.cells, partials).sensitivity)
    for other in found[1:]:
        np.testing.assert_allclose(other.values, found[0].values, rtol=1e-6)
        np.testing.assert_allclose(other.stderr, found[0].stderr, rtol=1e-6)
