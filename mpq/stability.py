"""Would other calibration samples have chosen the same schemes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np

from mpq.adaptive import drawn
from mpq.core.errors import InvalidInputError
from mpq.core.problem import Allocation, Problem, Solution
from mpq.core.protocols import Scores
from mpq.core.stability import SURE, Stability
from mpq.core.tables import Floats, Indices
from solvers.auto import Auto

_DRAWS = ((2_000, 50), (20_000, 20))  # up to so many cells: some seconds at most
# A draw that cannot be solved in that time, a rare one, takes the best choice found by then.
_SOLVER = Auto(few_cells=40, time_limit_s=0.2)
_UNSURE_SHOWN = 5


def usual_draws(problem: Problem) -> int:
    """Return how many draws take seconds at most: 50, of many cells 20, of too many 0."""
    return next((draws for most, draws in _DRAWS if len(problem.cells) <= most), 0)


def stability(problem: Problem, solution: Solution, draws: int = 50, seed: int = 0) -> Stability:
    """Draw all scores `draws` times within their error bars and solve each draw anew.

    Draws are those of `mpq.adaptive.drawn`: a bootstrap over the calibration samples where
    responses hold the scores of each, else normal and independent for each cell. Budgets,
    constraints and forbidden pairs are those of the problem. A draw in which the allocation is
    within 1e-4 of the optimum keeps all of it. The same for the same `seed`.
    Raises InvalidInputError for a solution without an allocation, or no draws.
    """
    if solution.allocation is None:
        raise InvalidInputError("stability", f"a solution that is {solution.status} has no schemes")
    if isinstance(draws, bool) or not isinstance(draws, Integral) or draws < 1:
        raise InvalidInputError("draws", f"draws: a whole number from 1 on, got {draws!r}")
    choice = solution.allocation.choice(problem.cells)
    _SOLVER.solve(problem)  # compiles the search where that was never done: no draw's time
    taken = np.zeros(len(problem.cells), np.int64)
    own, best = [], []
    for values in drawn(_scores(problem), int(draws), seed):
        table = replace(problem.sensitivity, values=values)
        found = _SOLVER.solve(replace(problem, sensitivity=table, responses=None))
        own.append(math.fsum(values[choice]))
        if found.allocation is None or own[-1] - found.score <= _SOLVER.gap * own[-1]:
            best.append(own[-1])
            taken[choice] += 1
        else:
            best.append(found.score)
            taken[found.allocation.choice(problem.cells)] += 1
    return _counted(problem, choice, taken, np.array(own), np.array(best))


def _scores(problem: Problem) -> Scores:
    """Return scores as they are drawn: with the responses only if those are what scored."""
    table, responses = problem.sensitivity, problem.responses
    if responses is not None:
        largest = float(np.abs(table.values).max(initial=0.0))
        same = np.isclose(responses.own_scores()[0], table.values, rtol=1e-3, atol=1e-6 * largest)
        responses = responses if same.all() else None
    return Scores(sensitivity=table, responses=responses)


def _counted(
    problem: Problem, choice: Indices, taken: Indices, own: Floats, best: Floats
) -> Stability:
    cells, draws = problem.cells, len(own)
    shares = taken[choice] / draws
    others = taken.copy()
    others[choice] = -1
    unsure = [int(u) for u in np.argsort(shares, kind="stable") if shares[u] < SURE]
    schemes = Allocation.from_choice(cells, choice)
    runner_up = {}
    for u in unsure:
        place = int(others[cells.offsets[u] : cells.offsets[u + 1]].argmax())
        runner_up[cells.units[u]] = cells.schemes[u][place]
    lost, total = float((own - best).sum()), float(best.sum())
    return Stability(
        num_draws=draws,
        schemes=dict(schemes),
        kept=dict(zip(cells.units, shares.tolist(), strict=True)),
        unsure=tuple(cells.units[u] for u in unsure),
        runner_up=runner_up,
        score=problem.score(choice),
        spread=float(own.std(ddof=1)) if draws > 1 else 0.0,
        lost=lost / total if total > 0 else (math.inf if lost > 0 else 0.0),
    )


def stability_view(found: Stability) -> dict[str, Any]:
    """Return it as plain data; an infinite loss becomes null."""
    return {
        "num_draws": found.num_draws,
        "kept": dict(found.kept),
        "unsure": [
            {
                "unit": unit,
                "scheme": str(found.schemes[unit]),
                "kept": found.kept[unit],
                "runner_up": str(found.runner_up[unit]),
            }
            for unit in found.unsure
        ],
        "score": found.score,
        "spread": found.spread,
        "lost": found.lost if math.isfinite(found.lost) else None,
    }


def stability_lines(view: Mapping[str, Any] | None) -> list[str]:
    """Return how sure the optimum of the scores is, and the least sure units, one a line."""
    if view is None:
        return []
    sure = len(view["kept"]) - len(view["unsure"])
    lost = "" if view["lost"] is None else f"; it loses {view['lost']:.1%} to theirs on average"
    units = [
        f"  unsure {cell['unit']}: {cell['scheme']} in {cell['kept']:.0%}, else mostly "
        f"{cell['runner_up']}"
        for cell in view["unsure"]
    ]
    if len(units) > _UNSURE_SHOWN:
        units[_UNSURE_SHOWN:] = [f"  and {len(units) - _UNSURE_SHOWN} more"]
    return [
        f"the optimum of the scores keeps {sure} of {len(view['kept'])} units in at least "
        f"{SURE:.0%} of {view['num_draws']} draws within their error bars{lost}",
        *units,
    ]
