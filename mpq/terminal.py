"""Runs and solutions as terminal tables or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpq.additivity import additivity
from mpq.along import along, along_table, given_problem
from mpq.console import new_console as _console
from mpq.core.budgets import Budget
from mpq.core.errors import InfeasibleError, RunFailedError
from mpq.core.evaluation import CHOSEN, DIVERGENCE_NAMES, Evaluation, in_order, without_trials
from mpq.core.frontier import Frontier, Surface
from mpq.core.joint import joint_lines
from mpq.core.layers import LayerGraph
from mpq.core.least_cost import LeastCost
from mpq.core.problem import Allocation, Problem, Solution
from mpq.core.provenance import cost_label, modelled_note, sources
from mpq.core.quantities import quantity, with_error
from mpq.core.risk import quantile
from mpq.format_shares import format_shares
from mpq.result import SearchResult
from mpq.stability import stability_lines, stability_view, usual_draws
from mpq.store.store import Store
from mpq.worth import worth_lines, worth_view


def print_run(store: Store, run_id: str, as_json: bool = False) -> None:
    """Print everything a person wants to know of one run."""
    view = run_view(store, run_id)
    if as_json:
        print(json.dumps(view, indent=2))
        return
    console = _console()
    console.print(Text.assemble("run ", (view["id"], "bold"), f"  {view['name']}  {view['state']}"))
    if view["error"]:
        console.print(Text(view["error"], "red"))
    if view["graph"]:
        console.print(_coverage_line(store.graph(run_id)))
    for split, told in view["data"].items():
        console.print(Text(f"{split.replace('_', '-')} data {told}"))
    if not view["chosen"]:
        return
    result = SearchResult(store, run_id)
    problem, allocation = result.problem, result.unit_allocation
    console.print(_units_table(result.graph, problem, allocation))
    console.print(_budget_table(problem, result.solution))
    _print_pairs(console, problem, allocation)
    told = without_trials(result.evaluation)
    console.print(_measured_table(given_problem(result), told))
    if rows := along(store.run(run_id).spec, problem, result.evaluation, allocation):
        console.print(along_table(rows))
    lines = [one.told() for one in format_shares(result.graph, allocation)]
    lines += worth_lines(problem, result.solution)
    lines += additivity(problem, allocation, told, strongest=3).told()
    deployed = [line for made in result.deployments for line in made.lines()]
    for line in [*lines, *stability_lines(view["stability"]), *deployed]:
        console.print(Text(line))
    for line in view["notes"]:
        console.print(Text(line, "dim"))


def run_view(store: Store, run_id: str) -> dict[str, Any]:
    """Return a run as plain data."""
    record = store.run(run_id)
    chosen = CHOSEN in dict(store.solutions(run_id))
    result = SearchResult(store, run_id) if chosen else None
    stability = result.stability() if result and usual_draws(result.problem) else None
    graph = store.graph(run_id) if record.has_graph else None
    return {
        "id": record.id,
        "name": record.name,
        "state": str(record.state),
        "error": record.error_message,
        "device": record.device,
        "data": record.data,
        "graph": None
        if graph is None
        else {"units": len(graph.units), "coverage": graph.coverage, "bytes": graph.native_bytes},
        "chosen": None if result is None else solution_view(result.solution),
        "formats": None
        if result is None
        else [
            {**asdict(one), "scheme": str(one.scheme)}
            for one in format_shares(result.graph, result.unit_allocation)
        ],
        "costs_from": None if result is None else sources(result.problem.costs),
        "shadow_prices": None if result is None else worth_view(result.problem, result.solution),
        "additivity": None if result is None else result.additivity().view(),
        "stability": None if stability is None else stability_view(stability),
        "evaluations": [_evaluation_view(e) for e in store.evaluations(run_id)],
        "deployments": [deployed.view() for deployed in store.deployments(run_id)],
        "notes": store.notes(run_id),
    }


def solution_view(solution: Solution) -> dict[str, Any]:
    """Return a solution as plain data; infinite bounds and gaps become null."""
    return {
        "status": str(solution.status),
        "solver": solution.solver,
        "budgets": {b.cost: b.limit for b in solution.budgets},
        "totals": dict(solution.totals or {}),
        "risk": solution.risk,
        "quantiles": None if solution.quantiles is None else dict(solution.quantiles),
        "score": solution.score,
        "bound": finite(solution.bound),
        "gap": finite(solution.gap),
        "seconds": solution.seconds,
        "allocation": solution.allocation.text() if solution.allocation is not None else None,
    }


def print_solution(
    graph: LayerGraph, problem: Problem, solution: Solution, as_json: bool = False
) -> None:
    """Print a solution of `problem`.

    Raises InfeasibleError where there is none, RunFailedError where none was found.
    """
    if solution.infeasibility is not None:
        raise InfeasibleError("infeasible", solution.infeasibility.told)
    if solution.allocation is None:
        raise RunFailedError(
            "solver", f"solver {solution.solver!r} found no allocation: use solver 'auto'"
        )
    if as_json:
        more = {
            "costs_from": sources(problem.costs),
            "shadow_prices": worth_view(problem, solution),
        }
        print(json.dumps(solution_view(solution) | more, indent=2))
        return
    console = _console()
    console.print(_units_table(graph, problem, solution.allocation))
    console.print(_budget_table(problem, solution))
    _print_pairs(console, problem, solution.allocation)
    for line in worth_lines(problem, solution):
        console.print(Text(line))


def print_least(
    graph: LayerGraph, problem: Problem, found: LeastCost, as_json: bool = False
) -> None:
    """Print the least cost of a score and the allocation that has it."""
    if as_json:
        limits = {budget.cost: budget.limit for budget in found.budgets}
        view = asdict(replace(found, budgets=())) | {"budgets": limits}
        print(json.dumps(view | {"allocation": found.allocation.text()}, indent=2))
        return
    console = _console()
    console.print(_units_table(graph, problem, found.allocation))
    table = _cost_table(problem, found.allocation, found.budgets, None)
    least = " + ".join(f"{'' if w == 1 else f'{w:g} '}{name}" for name, w in found.weights.items())
    table.caption = (
        f"least {least} of score {found.score:.4g} <= {found.score_limit:.4g}, "
        f"gap {found.gap:.2g}, {found.seconds:.3f} s"
    )
    console.print(table)
    _print_pairs(console, problem, found.allocation)


def print_frontier(problem: Problem, found: Frontier, as_json: bool = False) -> None:
    """Print the solutions along the limits of one cost."""
    if as_json:
        print(json.dumps([solution_view(solution) for solution in found.solutions], indent=2))
        return
    others = [name for name in problem.costs if name != found.cost]
    names = [cost_label(problem.costs[name]) for name in (found.cost, *others)]
    table = Table(f"{names[0]} <=", box=None, header_style="bold")
    for column in (*names, "predicted loss", "gap", "mean bits"):
        table.add_column(column, justify="right")
    for solution in found.solutions:
        limit = next(b.limit for b in solution.budgets if b.cost == found.cost)
        totals, allocation = solution.totals or {}, solution.allocation
        bits = [scheme.weights.bits for scheme in allocation.values()] if allocation else []
        table.add_row(
            quantity(limit, problem.costs[found.cost].unit),
            *(quantity(totals[n], problem.costs[n].unit) for n in (found.cost, *others)),
            f"{solution.score:.4g}",
            f"{solution.gap:.1g}",
            f"{sum(bits) / len(bits):.2f}" if bits else "-",
        )
    kind = "every allocation that nothing beats" if found.complete else "evenly spaced limits"
    table.caption = f"{len(found.solutions)} points, {kind}"
    _console().print(table)


def print_surface(problem: Problem, found: Surface, as_json: bool = False) -> None:
    """Print the predicted loss at each pair of limits of two costs."""
    if as_json:
        rows = [[s and solution_view(s) for s in row] for row in found.solutions]
        limits = dict(zip(found.costs, (axis.tolist() for axis in found.limits), strict=True))
        print(json.dumps({"limits": limits, "solutions": rows}, indent=2))
        return
    first, second = (problem.costs[name].unit for name in found.costs)
    names = [cost_label(problem.costs[name]) for name in found.costs]
    table = Table(f"{names[1]} <=", box=None, header_style="bold")
    for limit in found.limits[0]:
        table.add_column(quantity(limit, first, digits=3), justify="right")
    for j in reversed(range(len(found.limits[1]))):
        scores = [row[j] for row in found.solutions]
        table.add_row(
            quantity(found.limits[1][j], second, digits=3),
            *("-" if s is None else f"{s.score:.3g}" for s in scores),
        )
    solved = [s for row in found.solutions for s in row if s is not None]
    gap = max((s.gap for s in solved), default=0.0)
    table.caption = (
        f"predicted loss; columns: {names[0]} <=; {len(solved)} of "
        f"{len(found.limits[0]) * len(found.limits[1])} can be met, proven within {gap:.1g}"
    )
    _console().print(table)


def finite(value: float) -> float | None:
    """Return a number as JSON can hold it: None for an infinite one."""
    return value if abs(value) < float("inf") else None


def _coverage_line(graph: LayerGraph) -> str:
    left = sorted(graph.unsearched, key=lambda part: -part.bytes)
    largest = f"; largest left out: {left[0].name} ({left[0].reason})" if left else ""
    return (
        f"{len(graph.units)} units cover {graph.coverage:.1%} of the parameters of a "
        f"{quantity(graph.native_bytes, 'bytes')} network{largest}"
    )


def _units_table(graph: LayerGraph, problem: Problem, allocation: Allocation | None) -> Table:
    table = Table("unit", "shape", "scheme", box=None, header_style="bold")
    for column in ("predicted loss", "±"):
        table.add_column(column, justify="right")
    for cost in problem.costs.values():
        table.add_column(cost_label(cost), justify="right")
    layers = graph.by_name
    for unit in graph.units:
        assert allocation is not None
        scheme = allocation[unit.name]
        cell = (unit.name, scheme)
        number = problem.cells.index(cell)
        shapes = dict.fromkeys("x".join(map(str, layers[n].weight_shape)) for n in unit.layers)
        table.add_row(
            unit.name,
            ", ".join(shapes),
            str(scheme),
            f"{problem.sensitivity.values[number]:.2e}",
            f"{problem.sensitivity.stderr[number]:.0e}",
            *(
                with_error(cost.values[number], cost.half_width([number]), cost.unit)
                for cost in problem.costs.values()
            ),
        )
    return table


def _budget_table(problem: Problem, solution: Solution) -> Table:
    assert solution.allocation is not None
    table = _cost_table(problem, solution.allocation, solution.budgets, solution.risk)
    proof = f"gap {solution.gap:.2g}" if solution.gap < float("inf") else "no bound"
    table.caption = f"{solution.status} by {solution.solver}, {proof}, {solution.seconds:.3f} s"
    if note := modelled_note(problem.costs.values()):
        table.caption += f"; {note}"
    return table


def _cost_table(
    problem: Problem, allocation: Allocation, budgets: Sequence[Budget], risk: float | None
) -> Table:
    table = Table("cost", box=None, header_style="bold")
    at_risk = () if risk is None else (f"{100 * risk:g} % quantile",)
    for column in ("total", *at_risk, "budget", "unquantized", "share"):
        table.add_column(column, justify="right")
    limits = {budget.cost: budget.limit for budget in budgets}
    choice = allocation.choice(problem.cells)
    for name, cost in problem.costs.items():
        total = problem.total(name, choice)
        limit = quantity(limits[name], cost.unit) if name in limits else "-"
        whole = quantity(cost.baseline, cost.unit) if cost.baseline > 0 else "-"
        share = f"{total / cost.baseline:.1%}" if cost.baseline > 0 else "-"
        chosen = with_error(total, cost.half_width(choice), cost.unit)
        upper = () if risk is None else (quantity(quantile(cost, choice, risk), cost.unit),)
        table.add_row(cost_label(cost), chosen, *upper, limit, whole, share)
    return table


def _print_pairs(console: Console, problem: Problem, allocation: Allocation | None) -> None:
    """Print what the chosen schemes of two units cost or save together."""
    assert allocation is not None
    choice = allocation.choice(problem.cells)
    for line in (line for table in problem.costs.values() for line in joint_lines(table, choice)):
        console.print(Text(line))


def _measured_table(problem: Problem, evaluations: Sequence[Evaluation]) -> Table:
    kind = DIVERGENCE_NAMES[evaluations[0].divergence]
    table = Table("measured on", "candidate", "fits", box=None, header_style="bold")
    for column in (kind, "±", "predicted", "bytes written", "predicted bytes"):
        table.add_column(column, justify="right")
    table.add_column("metrics")
    for e in in_order(evaluations):
        table.add_row(
            e.split.replace("_", "-"),
            Text(e.candidate, "bold" if e.candidate == CHOSEN else ""),
            "yes" if e.allocation and problem.fits(e.allocation) else "no",
            f"{e.mean:.4g}",
            f"{e.stderr:.2g}",
            f"{e.predicted:.4g}" if e.predicted is not None else "-",
            f"{e.measured_bytes}" if e.measured_bytes is not None else "-",
            f"{e.predicted_bytes}" if e.predicted_bytes is not None else "-",
            ", ".join(f"{name} {value:.4f}" for name, value in e.metrics.items()) or "-",
        )
    return table


def _evaluation_view(e: Evaluation) -> Mapping[str, Any]:
    return {
        "candidate": e.candidate,
        "split": e.split,
        "divergence": e.divergence,
        "mean": e.mean,
        "stderr": e.stderr,
        "predicted": e.predicted,
        "metrics": dict(e.metrics),
        "predicted_bytes": e.predicted_bytes,
        "measured_bytes": e.measured_bytes,
    }
