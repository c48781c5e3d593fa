"""Solvers: one cell per unit, least score, every budget met."""

from __future__ import annotations

from collections.abc import Callable

from mpq.core.errors import unknown
from mpq.core.problem import Problem, Solution
from mpq.core.protocols import Solver


def _auto() -> Solver:
    from solvers.auto import Auto

    return Auto()


def _ilp() -> Solver:
    from solvers.ilp import Ilp

    return Ilp()


def _cbc() -> Solver:
    from solvers.ilp import Ilp

    return Ilp(name="cbc", library="cbc")


def _brute_force() -> Solver:
    from solvers.brute_force import BruteForce

    return BruteForce()


def _greedy() -> Solver:
    from solvers.greedy import Greedy

    return Greedy()


def _dp() -> Solver:
    from solvers.dp import Dp

    return Dp()


def _pairs() -> Solver:
    from solvers.pairs import Pairs

    return Pairs()


def _evolution() -> Solver:
    from solvers.evolution import Evolution

    return Evolution()


def _optuna() -> Solver:
    from solvers.optuna_search import OptunaSearch

    return OptunaSearch()


def _nsga2() -> Solver:
    from solvers.optuna_search import OptunaSearch

    return OptunaSearch(name="nsga2", sampler="nsga2")


SOLVERS: dict[str, Callable[[], Solver]] = {
    "auto": _auto,
    "ilp": _ilp,
    "cbc": _cbc,
    "brute_force": _brute_force,
    "greedy": _greedy,
    "dp": _dp,
    "pairs": _pairs,
    "evolution": _evolution,
    "optuna": _optuna,
    "nsga2": _nsga2,
}

USE_PAIRS = frozenset({"pairs", "evolution", "optuna", "nsga2"})  # the responses, where there are


def get_solver(name: str) -> Solver:
    """Return a solver by its name. Raises InvalidInputError for others."""
    if name not in SOLVERS:
        raise unknown("solver", name, SOLVERS)
    return SOLVERS[name]()


def solve(problem: Problem, solver: str = "auto", risk: float | None = None) -> Solution:
    """Solve a problem; an infeasible one is answered with its reason, not raised.

    With a `risk` such as 0.95 each budget holds with that probability, see solvers.risk.
    """
    if risk is None:
        return get_solver(solver).solve(problem)
    from solvers.risk import solve_at_risk

    return solve_at_risk(problem, risk, solver)
