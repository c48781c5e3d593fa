"""The complete convex frontier of one cost, which is a chain of nested allocations."""

from __future__ import annotations

import numpy as np

from mpq.core.errors import InvalidInputError, unknown
from mpq.core.frontier import Chain
from mpq.core.problem import Problem
from mpq.core.tables import Floats, Indices
from solvers.joint import refuse_joint


def chain(problem: Problem, cost: str) -> Chain:
    """Return every allocation that is best at some price of a cost, cheapest first.

    The lower convex hull of each unit's (cost, score) points, its edges sorted by score gained
    for cost: each prefix of them is an allocation that no other beats within its own total, so
    it is near-optimal in between, and contained in all later ones (as in BitStack, where a model
    of any size is a prefix). In time of order cells times log cells.

    Budgets of the problem are not looked at: ask the chain for a limit. Raises InvalidInputError
    for an unknown cost, for one of pairs of cells, or for constraints or forbidden pairs, which a
    chain cannot keep.
    """
    if cost not in problem.costs:
        raise unknown("cost", cost, problem.costs)
    if problem.constraints or problem.forbidden:
        raise InvalidInputError(
            "chain", "a chain knows one cost: leave constraints and forbidden pairs out"
        )
    refuse_joint(problem.with_budgets([]), "a chain", [cost])
    table, scores = problem.costs[cost], problem.sensitivity.values
    first, units, moves, slopes = _edges(problem, table.values, scores)
    order = np.lexsort((np.arange(len(slopes)), -slopes))
    units, moves = units[order], moves[order]
    before = _before(first, units, moves)
    steps = table.values[moves] - table.values[before]
    gains = scores[moves] - scores[before]
    return Chain(
        cost=cost,
        cells=problem.cells,
        first=first,
        units=units,
        moves=moves,
        totals=_running(problem.total(cost, first), steps),
        scores=_running(problem.score(first), gains),
    )


def _edges(
    problem: Problem, costs: Floats, scores: Floats
) -> tuple[Indices, Indices, Indices, Floats]:
    """Return each unit's cheapest cell, and unit, cell and slope of every edge of its hull."""
    offsets = problem.cells.offsets
    sizes = np.diff(offsets)
    widest = int(sizes.max(initial=0))
    places = offsets[:-1, None] + np.arange(widest)
    real = np.arange(widest) < sizes[:, None]
    padded = np.where(real, places, 0)
    cost = np.where(real, costs[padded] if len(costs) else 0.0, np.inf)
    score = np.where(real, scores[padded] if len(scores) else 0.0, np.inf)
    rows, steepest = np.arange(len(sizes)), np.full(len(sizes), np.inf)
    at = np.lexsort((score, cost), axis=1)[:, 0] if widest else np.empty(0, np.int64)
    first = offsets[:-1] + at
    units, moves, slopes = [], [], []
    for _ in range(widest - 1):
        with np.errstate(divide="ignore", invalid="ignore"):
            ahead = cost[rows] - cost[rows, at, None]
            gain = score[rows, at, None] - score[rows]
            slope = np.where(real[rows] & (ahead > 0) & (gain > 0), gain / ahead, -1.0)
        best = slope.max(axis=1)
        # of equally steep ones the farthest: a unit's slopes then fall from edge to edge
        at = np.where(slope == best[:, None], ahead, -np.inf).argmax(axis=1)
        on = best >= 0.0
        rows, at, steepest = rows[on], at[on], np.minimum(steepest, best)[on]
        units.append(rows)
        moves.append(offsets[rows] + at)
        slopes.append(steepest)
        if not len(rows):
            break
    none = np.empty(0, np.int64)
    return (
        first,
        np.concatenate([none, *units]),
        np.concatenate([none, *moves]),
        np.concatenate([np.empty(0), *slopes]),
    )


def _running(start: float, steps: Floats) -> Floats:
    """Return the running total, in extended precision where the machine has it."""
    return np.cumsum(np.r_[np.longdouble(start), steps], dtype=np.longdouble).astype(np.float64)


def _before(first: Indices, units: Indices, moves: Indices) -> Indices:
    """Return the cell that each move leaves: the unit's move before it, or its first cell."""
    order = np.argsort(units, kind="stable")
    same = np.diff(units[order], prepend=-1) == 0
    left = np.where(same, np.r_[moves[order][:1], moves[order][:-1]], first[units[order]])
    before = np.empty_like(left)
    before[order] = left
    return before
