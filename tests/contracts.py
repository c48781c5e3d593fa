"""What every implementation of a protocol must do, whatever else it does."""

from __future__ import annotations

from mpq.core.problem import Problem, Solution, Status
from mpq.core.protocols import Solver
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
