"""The integer program of a knapsack, by PuLP with HiGHS or CBC."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mpq.core.errors import InvalidInputError, RunFailedError
from mpq.core.tables import Indices
from solvers.joint import Linked
from solvers.knapsack import Knapsack
from solvers.threads import highs_threads

SCALE = 1e3  # objective and rows are brought to this size, the tolerance is absolute
TOLERANCE = 1e-9

Library = Literal["highs", "cbc"]


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
    gap: float = 0.0,
    library: Library = "highs",
) -> Answer:
    """Minimise the objective over one entry per unit within every slack.

    Variables are numbered, never named after units. `excluded` choices are cut off, of two
    `forbidden` cells one is taken at most, and it ends `enough` from the best, or within `gap`.
    Raises RunFailedError when the solver breaks, InvalidInputError (`needs_cbc`) where there is
    no CBC.
    """
    linked = knapsack.linked()
    unit_value = knapsack.largest
    program, variables = _stated(knapsack, linked, excluded, forbidden, unit_value)
    run = _by_highs if library == "highs" else _by_cbc
    ended = run(program, enough / unit_value * SCALE, gap, max(0.01, time_limit_s))
    bound = max(0.0, ended.bound) / SCALE * unit_value
    if not ended.found:
        return Answer(choice=None, bound=bound, complete=ended.complete)
    values = np.array([variable.varValue for variable in variables])
    # The entry of a unit that is nearest to one; a unit's entries stand together.
    order = np.lexsort((-values, knapsack.units))
    return Answer(choice=order[knapsack.starts[:-1]], bound=bound, complete=ended.complete)


def _stated(
    knapsack: Knapsack,
    linked: Linked | None,
    excluded: Sequence[Indices],
    forbidden: Sequence[tuple[int, int]],
    unit_value: float,
) -> tuple[Any, list[Any]]:
    """Return the program and its variables, one for each entry."""
    import pulp

    n, num_units = len(knapsack.cells), len(knapsack.starts) - 1
    program = pulp.LpProblem("mpq", pulp.LpMinimize)
    variables = [program.add_variable(f"x{i:08d}", 0, 1, pulp.LpInteger) for i in range(n)]

    def row(entries: Sequence[int] | Indices, factors: Sequence[float]) -> pulp.LpAffineExpression:
        return pulp.LpAffineExpression(
            [(variables[i], f) for i, f in zip(entries, factors, strict=True)]
        )

    def constrain(expression: pulp.LpAffineExpression, sense: int, name: str, limit: float) -> None:
        program.addConstraint(pulp.LpConstraint(expression, sense, name, limit))

    everything: Sequence[int] = range(n)
    amounts = np.zeros((len(knapsack.slack) + 1, 0))  # of variables of joint terms, objective last
    if linked is not None:
        count = len(linked.rows)
        most = linked.most.tolist()
        variables += [program.add_variable(f"z{j:08d}", 0, m) for j, m in enumerate(most)]
        everything = range(n + count)
        amounts = np.zeros((len(knapsack.slack) + 1, count))
        amounts[linked.rows, np.arange(count)] = linked.amounts
    objective = np.r_[knapsack.objective, amounts[-1]] / unit_value * SCALE
    program.setObjective(row(everything, objective.tolist()))
    for u in range(num_units):
        entries = range(int(knapsack.starts[u]), int(knapsack.starts[u + 1]))
        constrain(row(entries, [1.0] * len(entries)), pulp.LpConstraintEQ, f"unit{u}", 1.0)
    for k, slack in enumerate(knapsack.slack):
        weights = (np.r_[knapsack.weights[k], amounts[k]] * (SCALE / slack)).tolist()
        constrain(row(everything, weights), pulp.LpConstraintLE, f"budget{k}", SCALE)
    for c, choice in enumerate(excluded):
        ones = [1.0] * num_units
        constrain(row(choice, ones), pulp.LpConstraintLE, f"cut{c}", num_units - 1.0)
    entry_of = {cell: entry for entry, cell in enumerate(knapsack.cells.tolist())}
    for p, pair in enumerate(forbidden):
        if all(cell in entry_of for cell in pair):
            both = [entry_of[cell] for cell in pair]
            constrain(row(both, [1.0, 1.0]), pulp.LpConstraintLE, f"pair{p}", 1.0)
    for number, link in enumerate(linked.links if linked is not None else ()):
        members = [*(n + z for z in link.variables), *link.entries]
        factors = [link.sign] * len(link.variables) + [-link.sign] * len(link.entries)
        constrain(row(members, factors), pulp.LpConstraintGE, f"link{number}", link.least)
    return program, variables[:n]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ended:
    """How a run ended: with values of the variables or without, and the bound in its scale."""

    found: bool
    bound: float
    complete: bool


_INFEASIBLE = _Ended(found=False, bound=float("inf"), complete=True)


def _by_highs(program: Any, enough: float, gap: float, time_limit_s: float) -> _Ended:
    """Solve by HiGHS; the status is its own: PuLP 3 calls a run that met its limit optimal."""
    import highspy
    import pulp

    ended = highspy.HighsModelStatus
    for presolve in ("on", "off"):  # its postsolve is known to end in a violated row, seldom
        program.solve(
            pulp.HiGHS(
                msg=False,
                gapRel=gap,
                gapAbs=enough,  # the default of 1e-6 would stop early
                threads=highs_threads(),
                timeLimit=time_limit_s,
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
        return _INFEASIBLE
    if status not in (ended.kOptimal, ended.kTimeLimit, ended.kInterrupt):
        raise RunFailedError("solver_failed", f"HiGHS ended the integer program with {status}")
    feasible = outcome.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    complete = bool(status == ended.kOptimal)
    return _Ended(found=bool(feasible), bound=outcome.mip_dual_bound, complete=complete)


def _by_cbc(program: Any, enough: float, gap: float, time_limit_s: float) -> _Ended:
    """Solve by the CBC that PuLP carries.

    Values are read only where PuLP tells of a solution: those of an infeasible program are
    garbage. PuLP's status "Optimal" includes runs that met their limit, so the kind of the
    solution decides; that of an infeasible integer program is "none found", so the status does.
    A run that took all its time proves nothing. CBC tells no bound through PuLP.
    """
    import pulp

    options = [f"primalT {TOLERANCE}", f"integerT {TOLERANCE}", "increment 1e-9"]
    # By its path: the class PULP_CBC_CMD warns of PuLP 4 wherever it is made.
    cbc = pulp.COIN_CMD(
        path=_cbc_path(),
        msg=False,
        gapRel=gap,
        gapAbs=enough,
        timeLimit=time_limit_s,
        options=options,
    )
    start = time.monotonic()
    try:
        program.solve(cbc)
    except pulp.PulpSolverError as error:
        raise RunFailedError("solver_failed", f"CBC broke: {error}") from error
    in_time = time.monotonic() - start < time_limit_s
    if program.status == pulp.LpStatusInfeasible and in_time:
        return _INFEASIBLE
    best = program.sol_status == pulp.LpSolutionOptimal
    found = best or program.sol_status == pulp.LpSolutionIntegerFeasible
    return _Ended(found=found, bound=0.0, complete=best and in_time)


def _cbc_path() -> str:
    import pulp

    carried = getattr(pulp, "PULP_CBC_CMD", None)
    path = getattr(carried, "pulp_cbc_path", "")
    if not (path and os.access(path, os.X_OK)):
        raise InvalidInputError(
            "needs_cbc",
            f"solver 'cbc' needs the CBC that PuLP 3 carries; PuLP {pulp.VERSION} has none that "
            "runs here: install pulp<4, or use solver 'ilp' (HiGHS)",
        )
    return str(path)
