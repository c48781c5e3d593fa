"""The integer program of a knapsack, by PuLP and HiGHS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpq.core.errors import RunFailedError
from mpq.core.tables import Indices
from solvers.knapsack import Knapsack
from solvers.threads import highs_threads

SCALE = 1e3  # objective and rows are brought to this size, the tolerance is absolute
TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The best choice of entries that was found, and a lower bound in units of the objective.

    `choice` may break a budget by the tolerance of the solver. `complete` tells that the search
    ended by itself: then the choice is best, or, where it is None, nothing fits.
    """

    choice: Indices | None
    bound: float
    complete: bool


def branch_and_cut(
    knapsack: Knapsack,
    excluded: Sequence[Indices],
    *,
    forbidden: Sequence[tuple[int, int]] = (),
    time_limit_s: float,
    enough: float = 0.0,
) -> Answer:
    """Minimise the objective over one entry per unit within every slack.

    Variables are numbered, never named after units. `excluded` choices are cut off, of two
    `forbidden` cells one is taken at most, and it ends `enough` from the best. The status is
    read from HiGHS itself: PuLP 3 calls a run that met its time limit optimal.
    Raises RunFailedError when the solver breaks.
    """
    import highspy
    import pulp

    n, num_units = len(knapsack.cells), len(knapsack.starts) - 1
    unit_value = float(knapsack.objective.max(initial=0.0)) or 1.0
    program = pulp.LpProblem("mpq", pulp.LpMinimize)
    variables = [program.add_variable(f"x{i:08d}", 0, 1, pulp.LpInteger) for i in range(n)]

    def row(entries: Sequence[int] | Indices, factors: Sequence[float]) -> pulp.LpAffineExpression:
        return pulp.LpAffineExpression(
            [(variables[i], f) for i, f in zip(entries, factors, strict=True)]
        )

    def constrain(expression: pulp.LpAffineExpression, sense: int, name: str, limit: float) -> None:
        program.addConstraint(pulp.LpConstraint(expression, sense, name, limit))

    everything = range(n)
    program.setObjective(row(everything, (knapsack.objective / unit_value * SCALE).tolist()))
    for u in range(num_units):
        entries = range(int(knapsack.starts[u]), int(knapsack.starts[u + 1]))
        constrain(row(entries, [1.0] * len(entries)), pulp.LpConstraintEQ, f"unit{u}", 1.0)
    for k, slack in enumerate(knapsack.slack):
        weights = (knapsack.weights[k] * (SCALE / slack)).tolist()
        constrain(row(everything, weights), pulp.LpConstraintLE, f"budget{k}", SCALE)
    for c, choice in enumerate(excluded):
        ones = [1.0] * num_units
        constrain(row(choice, ones), pulp.LpConstraintLE, f"cut{c}", num_units - 1.0)
    entry_of = {cell: entry for entry, cell in enumerate(knapsack.cells.tolist())}
    for p, pair in enumerate(forbidden):
        if all(cell in entry_of for cell in pair):
            both = [entry_of[cell] for cell in pair]
            constrain(row(both, [1.0, 1.0]), pulp.LpConstraintLE, f"pair{p}", 1.0)

    ended = highspy.HighsModelStatus
    for presolve in ("on", "off"):  # its postsolve is known to end in a violated row, seldom
        program.solve(
            pulp.HiGHS(
                msg=False,
                gapRel=0.0,
                gapAbs=enough / unit_value * SCALE,  # the default of 1e-6 would stop early
                threads=highs_threads(),
                timeLimit=max(0.01, time_limit_s),
                random_seed=0,
                mip_feasibility_tolerance=TOLERANCE,
                # Half the time of small programs, for what the caller has done already:
                mip_heuristic_run_feasibility_jump=False,
                mip_allow_restart=False,
                presolve=presolve,
            )
        )
        status = program.solverModel.getModelStatus()
        if status != ended.kSolveError:
            break
    outcome = program.solverModel.getInfo()
    if status in (ended.kInfeasible, ended.kUnboundedOrInfeasible):
        return Answer(choice=None, bound=float("inf"), complete=True)
    if status not in (ended.kOptimal, ended.kTimeLimit, ended.kInterrupt):
        raise RunFailedError("solver_failed", f"HiGHS ended the integer program with {status}")
    bound = max(0.0, outcome.mip_dual_bound) / SCALE * unit_value
    complete = bool(status == ended.kOptimal)
    if outcome.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return Answer(choice=None, bound=bound, complete=False)
    values = np.array([variable.varValue for variable in variables])
    # The entry of a unit that is nearest to one; a unit's entries stand together.
    order = np.lexsort((-values, knapsack.units))
    return Answer(choice=order[knapsack.starts[:-1]], bound=bound, complete=complete)
