"""The best allocation within each family of formats, to be measured beside the mixed ones."""

from __future__ import annotations

from mpq.core.formats import Format, Scheme
from mpq.core.layers import UnitName
from mpq.core.problem import Allocation, Problem, Solution
from mpq.core.tables import Cells
from solvers import solve
from solvers.pairs import Pairs
from solvers.trust import cross_validated

ONLY, _WITH_PAIRS = "only ", ", pairs"
_MEASURED = 3  # of all families: those of the least predicted loss


def within_families(problem: Problem) -> dict[str, Allocation]:
    """Return the optimum of each of the best families of weight formats alone, by its name.

    A family is what a search that knows one kind of format would choose from: all "int", all
    "int@gptq", all "float", ... with native formats beside it. A unit that is not offered it keeps
    its own choices. With them among the measured candidates the result of a search over many kinds
    of formats is not worse than that over one, whatever the scores say. Each is solved additively
    and, where responses are known, with pairs. None where there is only one family, and none of a
    family that does not fit the budgets.
    """
    schemes = {scheme for kind in problem.cells.kinds for scheme in kind}
    names = {family_name(s.weights) for s in schemes if not s.weights.is_native}
    if len(names) < 2:
        return {}
    alone = {name: of_family(problem, name) for name in sorted(names)}
    solved = {name: solve(of) for name, of in alone.items()}
    fitting = [name for name, solution in solved.items() if solution.allocation is not None]
    best = sorted(fitting, key=lambda name: _score(solved[name]))[:_MEASURED]
    found = {f"{ONLY}{name}": solved[name].allocation for name in best}
    if problem.responses is not None:
        for name in best:
            with_pairs = Pairs(prove=False).solve(cross_validated(alone[name]))
            found[f"{ONLY}{name}{_WITH_PAIRS}"] = with_pairs.allocation
    return {name: allocation for name, allocation in found.items() if allocation is not None}


def of_family(problem: Problem, name: str) -> Problem:
    """Return the problem in which units take only the schemes of a family."""
    return problem.pinned(family_schemes(problem.cells, name))


def family_schemes(cells: Cells, name: str) -> dict[UnitName, list[Scheme]]:
    """Return the schemes of a family, and native ones, of the units that are offered it."""
    found = {}
    for unit, schemes in zip(cells.units, cells.schemes, strict=True):
        if any(family_name(s.weights) == name for s in schemes):
            own = (s for s in schemes if s.weights.is_native or family_name(s.weights) == name)
            found[unit] = list(own)
    return found


def family_of_candidate(candidate: str) -> str:
    """Return the family of a candidate of `within_families`, "" of any other."""
    return candidate.removeprefix(ONLY).removesuffix(_WITH_PAIRS) if ONLY in candidate else ""


def family_name(weights: Format) -> str:
    """Return the family of a format as a user would call it, with its rounding: "int@gptq"."""
    kind = "mixed" if weights.high is not None else weights.family
    branch = "+branch" if weights.rank else ""
    rounding = "" if weights.rounding == "nearest" else f"@{weights.rounding}"
    return f"{kind}{branch}{rounding}"


def _score(solution: Solution) -> float:
    assert solution.score is not None
    return solution.score
