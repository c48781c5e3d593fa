"""The score of a whole allocation from the responses of its cells."""

from __future__ import annotations

from mpq.core.errors import InvalidInputError
from mpq.core.problem import Problem
from mpq.core.tables import Cells, Indices, Responses


def responses_of(problem: Problem) -> Responses:
    """Return the responses; raises InvalidInputError (`needs_responses`) where there are none."""
    if problem.responses is None:
        raise InvalidInputError(
            "needs_responses",
            "solver 'pairs' needs the responses of the network to each cell, which metric "
            f"{problem.sensitivity.metric!r} did not give: use solver 'ilp' or metric "
            "'gauss_newton'",
        )
    return problem.responses


def pairwise_score(problem: Problem, choice: Indices) -> float:
    """Return x^T G x of a choice, G = `Responses.interactions` over the chosen cells alone.

    Each term of G depends on its own two cells, so the small matrix is the part of the large
    one. Raises InvalidInputError (`needs_responses`).
    """
    responses = responses_of(problem)
    units = problem.cells.units
    places = choice - problem.cells.offsets[:-1]
    chosen = Cells(
        units=units,
        schemes=tuple((problem.cells.schemes[u][p],) for u, p in enumerate(places)),
    )
    return float(responses.restrict(chosen, choice).interactions().sum())
