"""The score of a whole allocation from the responses of its cells."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mpq.core.errors import InvalidInputError
from mpq.core.problem import Problem
from mpq.core.shrinkage import shrunk_products
from mpq.core.tables import Floats, Indices, Responses
from solvers.knapsack import Knapsack, fitting

MANY = 500  # cells from which on single precision saves time that counts
_DOUBT = 5e-3  # of the own scores: what single precision may cost the bound


def responses_of(problem: Problem) -> Responses:
    """Return the responses; raises InvalidInputError (`needs_responses`) where there are none."""
    if problem.responses is None:
        raise InvalidInputError(
            "needs_responses",
            "solver 'pairs' needs the responses of the network to each cell, which metric "
            f"{problem.sensitivity.metric!r} did not give: use solver 'auto' or metric "
            "'gauss_newton'",
        )
    return problem.responses


def pairwise_score(problem: Problem, choice: Indices) -> float:
    """Return x^T G x of a choice, G = `Responses.interactions` over the chosen cells alone.

    Each term of G depends on its own two cells, so the small matrix is the part of the large
    one. Raises InvalidInputError (`needs_responses`).
    """
    responses = responses_of(problem)
    slopes = None if responses.slopes is None else responses.slopes[choice]
    vectors = responses.vectors[choice]
    return float(shrunk_products(vectors, slopes, responses.trust, single=False)[0].sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Interacting:
    """The pairwise score of the choices of a knapsack: sum own[i] + sum_{i != j} cross[i, j].

    `cross` is symmetric and zero within a unit; what G has there is `inner`, in the order of
    `same_unit`, own scores without slopes included: no score depends on it, but it completes
    `cross` to a nearly convex form. `doubt[i]` is more than what rounding can have added for
    taking i. Rows with joint costs are relaxed in the knapsack: it bounds, but does not decide.
    """

    knapsack: Knapsack
    own: Floats
    cross: Floats
    inner: Floats
    doubt: Floats

    @classmethod
    def of(cls, problem: Problem, interactions: Floats, doubt: float) -> Interacting | None:
        """Build it from G over all cells; None where nothing fits.

        A term is off by at most doubt * sqrt(c_i c_j), and (sum_u sqrt c)^2 <= units * sum_u c.
        """
        diagonal = np.diagonal(interactions)
        relaxed = [row.relaxed() for row in problem.rows()]
        knapsack = fitting(problem, diagonal, relaxed, np.arange(len(problem.cells)))
        if knapsack is None:
            return None
        cells = knapsack.cells
        own = diagonal[cells].copy()
        cross = interactions[np.ix_(cells, cells)] if len(cells) < len(diagonal) else interactions
        slopes = responses_of(problem).slopes
        squares = own if slopes is None else own - slopes[cells].mean(axis=1, dtype=np.float64)
        np.fill_diagonal(cross, np.maximum(squares, 0.0))
        rows, columns = same_unit(knapsack.starts)
        inner = cross[rows, columns]
        cross[rows, columns] = 0.0
        rounding = doubt * len(problem.cells.units) * squares + 1e-12 * np.abs(own)
        return cls(knapsack=knapsack, own=own, cross=cross, inner=inner, doubt=rounding)

    def part(self, kept: Indices) -> Interacting:
        """Return the same over fewer entries, ascending, at least one of each unit."""
        whole = self.knapsack
        units = whole.units[kept]
        rows, columns = same_unit(whole.starts)
        both = np.isin(rows, kept) & np.isin(columns, kept)
        return Interacting(
            knapsack=replace(
                whole,
                cells=whole.cells[kept],
                units=units,
                starts=np.searchsorted(units, np.arange(len(whole.starts))),
                objective=whole.objective[kept],
                weights=whole.weights[:, kept],
            ),
            own=self.own[kept],
            cross=self.cross[np.ix_(kept, kept)],
            inner=self.inner[both],
            doubt=self.doubt[kept],
        )

    def score(self, choice: Indices) -> float:
        """Return the score of a choice of entries."""
        return float(self.own[choice].sum() + self.cross[np.ix_(choice, choice)].sum())


def same_unit(starts: Indices) -> tuple[Indices, Indices]:
    """Return the rows and columns of all pairs of entries of one unit, row by row."""
    sizes = np.diff(starts)
    of_row = np.repeat(sizes, sizes)
    rows = np.repeat(np.arange(len(of_row)), of_row)
    first = np.cumsum(of_row) - of_row
    columns = np.arange(len(rows)) - first[rows] + np.repeat(starts[:-1], sizes)[rows]
    return rows, columns


def bounded_interactions(responses: Responses) -> tuple[Floats, float]:
    """Return G and how far rounding moved it, in single precision where that does no harm."""
    units = len(responses.cells.units)
    if len(responses.cells) >= MANY:
        found = responses.bounded_interactions(single=True)
        if found[1] * units <= _DOUBT * responses.trust or not responses.trust:
            return found
    return responses.bounded_interactions()
