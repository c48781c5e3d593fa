"""A stored run under ever other budgets and pins, each answered in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mpq.core.budgets import Budget
from mpq.core.formats import Scheme
from mpq.core.layers import LayerGraph
from mpq.core.problem import Allocation, Problem, Solution
from mpq.pins import Named
from mpq.stated import under
from solvers.risk import at_risk, with_quantiles
from solvers.what_if import WhatIf


class RunWhatIf:
    """What the scores and costs of a run lead to while someone moves its budgets.

    Keep it between questions: what they share is computed once. See `solvers.what_if` for what
    the answers are; `SearchResult.solve` takes longer and comes with a bound.
    """

    def __init__(self, graph: LayerGraph, problem: Problem, risk: float | None) -> None:
        self.graph = graph
        self.problem = problem
        self._risk = risk
        self._what_if = WhatIf(problem)

    def solve(
        self,
        budgets: Sequence[str | Budget],
        pin: Mapping[str, str | Scheme] | None = None,
        risk: float | None = None,
        forbid: Sequence[tuple[Named, Named]] = (),
        near: Allocation | None = None,
    ) -> Solution:
        """Solve as `SearchResult.solve` does, in a moment; `near` is the answer before."""
        plain, risk = under(
            self.graph, self.problem, self._risk, budgets, pin=pin, risk=risk, forbid=forbid
        )
        return with_quantiles(plain, self._what_if.solve(at_risk(plain, risk), near), risk)
