"""What every implementation of a protocol must do, whatever else it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hw_cost_models.measured.backend import KernelBackend
from mpq.core.chosen import Chosen
from mpq.core.errors import InvalidInputError
from mpq.core.formats import Scheme
from mpq.core.latency import KernelCase
from mpq.core.layers import Layer
from mpq.core.problem import Problem, Solution, Status
from mpq.core.protocols import Exporter, Metric, Scores, Solver, Task
from mpq.core.synthetic import Synthetic
from mpq.core.tables import Cells
from mpq.export.rules import check_runs
from mpq.nn.batches import Batch, checked_call, describe, num_samples
from mpq.nn.fingerprint import batches_digest
from mpq.nn.patch import evaluating
from mpq.nn.synthetic import Made, synthesise
from mpq.nn.workload import Workload
from solvers.check import check

# --- solvers ---------------------------------------------------------------------------------


def solver_contract(solver: Solver, problem: Problem) -> Solution:
    """Solve twice and return the solution, which is consistent, repeatable and in order."""
    solution = solver.solve(problem)
    check(problem, solution)
    assert solution.solver == solver.name
    assert solution.budgets == problem.budgets
    assert solution.seconds >= 0
    again = solver.solve(problem)
    assert (again.status, again.allocation) == (solution.status, solution.allocation)
    if solution.allocation is not None:
        assert tuple(solution.allocation) == problem.cells.units
        assert problem.fits(solution.allocation)
        assert solution.bound <= solution.score
        assert solution.gap >= 0
        assert solution.infeasibility is None
    if solution.status is Status.INFEASIBLE:
        assert solution.infeasibility is not None
        assert set(solution.infeasibility.names) <= {b.cost for b in problem.budgets}
        assert "\n" not in solution.infeasibility.message
    return solution


# --- measured kernels --------------------------------------------------------------------------


def kernel_contract(
    backend: KernelBackend, layers: Sequence[Layer], schemes: Sequence[Scheme]
) -> set[KernelCase]:
    """Return the cases of all layers and schemes; whatever has none is refused with its reason."""
    found = set()
    for layer in layers:
        offered = list(backend.schemes(layer))
        assert len(set(offered)) == len(offered)
        assert not any(backend.why_not(layer, scheme) for scheme in offered)
        for scheme in {*offered, *schemes}:
            reason = backend.why_not(layer, scheme)
            assert "\n" not in reason
            if not reason:
                found.add(backend.case(layer, scheme))
                continue
            for refused in (backend.case, backend.op):
                with pytest.raises(InvalidInputError) as caught:
                    refused(layer, scheme)
                assert (caught.value.code, str(caught.value)) == ("no_kernel", reason)
    reference = backend.reference()
    assert reference.case.kernel.endswith("fp32")
    for op in (reference, backend.op(layers[0], backend.schemes(layers[0])[0])):
        for _ in range(op.rotation + 1):
            took = op.run()
            assert not op.returns_ns or took >= 0  # type: ignore[operator]
    assert {case.backend for case in found} == {reference.case.backend}
    return found


# --- exporters -------------------------------------------------------------------------------


def exporter_contract(exporter: Exporter, chosen: Chosen) -> str | None:
    """Write and read back an allocation; return the file, or None where it is refused."""
    try:
        check_runs(exporter, chosen)
        text = exporter.text(chosen)
    except InvalidInputError as error:
        refusal = str(error)
        assert "\n" not in refusal
        assert any(repr(layer.name) in refusal for layer, _ in chosen.searched)
        assert "nearest: " in refusal or "leave the layer out" in refusal
        return None
    assert text.endswith("\n")
    assert exporter.text(chosen) == text
    found = exporter.read(text, chosen.graph)
    assert set(found) <= {layer.name for layer in chosen.graph.layers}
    for layer, scheme in chosen.searched:
        read = found.get(layer.name)
        assert read == scheme or (read is None and str(scheme) == layer.native_family)
        stored = exporter.stored_bytes(layer, scheme)
        assert stored is None or 0 < stored <= layer.weight_bytes + 64
    for name in set(found) - set(chosen.schemes):  # not searched: left as it is
        assert str(found[name]) == chosen.graph.by_name[name].native_family
    return text


# --- metrics ---------------------------------------------------------------------------------


def metric_contract(metric: Metric, workload: Workload) -> Scores | None:
    """Score twice and return the scores, or None where the metric refuses in one clear line."""
    before = borrowed_state(workload.model)
    refusal = ""
    try:
        tasks = metric.tasks(workload)
        partials = [metric.run(workload, task) for task in tasks]
    except InvalidInputError as error:
        refusal = str(error)
    assert same_state(before, borrowed_state(workload.model))
    if refusal:
        assert "\n" not in refusal
        return None
    _check_keys(metric, workload, tasks)
    scores = metric.combine(workload.cells, partials)
    table = scores.sensitivity
    assert table.metric == metric.name
    assert table.cells == workload.cells
    assert np.isfinite(table.values).all()
    assert np.isfinite(table.stderr).all()
    assert (table.stderr >= 0).all()
    for number, (_, scheme) in enumerate(workload.cells):
        if str(scheme) == "fp32":
            assert table.values[number] == 0
            assert table.stderr[number] == 0
    again = [metric.run(workload, task) for task in tasks]
    for one, other in zip(partials, again, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
    if min(torch.finfo(p.dtype).bits for p in workload.model.parameters()) >= 32:
        for task, partial in zip(tasks, partials, strict=True):
            portions = metric.run(replace(workload, at_once=1 if task.samples else None), task)
            assert partial.keys() == portions.keys()
            for name in partial.keys() - {"operations"}:
                largest = np.abs(partial[name]).max(initial=1e-6)
                np.testing.assert_allclose(portions[name], partial[name], atol=1e-3 * largest)
    for last in {task.round for task in tasks}:
        some = [p for task, p in zip(tasks, partials, strict=True) if task.round <= last]
        early = metric.combine(workload.cells, some).sensitivity
        assert early.cells == workload.cells
    return scores


def _check_keys(metric: Metric, workload: Workload, tasks: Sequence[Task]) -> None:
    keys = [task.key for task in tasks]
    assert keys
    assert len(set(keys)) == len(keys)
    assert [task.key for task in metric.tasks(workload)] == keys
    cells = workload.cells
    fewer = Cells(units=cells.units, schemes=tuple(schemes[1:] for schemes in cells.schemes))
    others = (
        replace(workload, seed=workload.seed + 1),
        replace(workload, key=workload.key + " changed"),
        replace(workload, cells=fewer),
    )
    for other in others:
        assert not set(keys) & {task.key for task in metric.tasks(other)}


def borrowed_state(model: nn.Module) -> list[tuple[object, ...]]:
    """Return everything about a model that a borrower has to give back, and the generator."""
    state: list[tuple[object, ...]] = [("generator", torch.get_rng_state())]
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        own = module.__dict__.get("forward")
        state.append((name, module.training, own, *(tuple(h.values()) for h in hooks)))
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                content = tensor.detach().clone()
                grad = None if tensor.grad is None else tensor.grad.clone()
                state.append((key, id(tensor), tensor.requires_grad, grad, content))
    return state


def same_state(one: list[tuple[object, ...]], other: list[tuple[object, ...]]) -> bool:
    """Tell whether two states are the same bit for bit."""

    def same(a: object, b: object) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return torch.equal(a, b)
        return bool(a == b)

    return len(one) == len(other) and all(
        len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(one, other, strict=True)
    )


# --- synthetic data ----------------------------------------------------------------------------


def synthetic_contract(asked: Synthetic, model: nn.Module, sample: Batch | None) -> Made:
    """Make data twice: borrowed, repeatable whatever else was drawn, of the sample's shape."""
    before = borrowed_state(model)
    made = synthesise(asked, model, sample, seed=3)
    assert same_state(before, borrowed_state(model))
    torch.manual_seed(1234)
    model.train(not model.training)
    assert batches_digest(synthesise(asked, model, sample, seed=3).batches) == batches_digest(
        made.batches
    )
    model.train(not model.training)
    assert batches_digest(synthesise(asked, model, sample, seed=4).batches) != batches_digest(
        made.batches
    )
    trial = synthesise(asked, model, sample, seed=3, trial=True)
    assert [describe(b) for b in trial.batches] == [describe(b) for b in made.batches]
    sizes = [num_samples(batch) for batch in made.batches]
    assert sum(sizes) == asked.options["samples"]
    assert max(sizes) <= (asked.options["batch"] or 0)
    for batch in made.batches:
        with evaluating(model), torch.no_grad():
            assert torch.isfinite(checked_call(model, batch, "made")).all()
    assert made.told
    assert "\n" not in made.told
    return made
