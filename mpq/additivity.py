"""Do the parts of a choice add up: alone, in pairs, and as measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mpq.core.evaluation import CHOSEN, Evaluation
from mpq.core.layers import UnitName
from mpq.core.problem import Allocation, Problem
from mpq.core.tables import Cells, Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two units whose errors reinforce (positive) or cancel (negative) each other's, by `effect`.

    `effect` is what both together cost beyond each alone, in units of the loss.
    """

    first: UnitName
    second: UnitName
    effect: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Additivity:
    """Predictions of a chosen allocation's loss beside its measurement on calibration data.

    `parts` is the sum of the cells' own scores (None where they are not in units of the
    divergence), `with_pairs` has the pairwise terms as well (None where there are none),
    `measured` is the divergence with its standard error. `matrix[u, v]` is
    the effect of units u and v together, zero on the diagonal; `pairs` the strongest of them.
    `metric` names what scored.
    """

    units: tuple[UnitName, ...]
    metric: str
    parts: float | None
    with_pairs: float | None
    measured: float | None
    stderr: float | None
    matrix: Floats | None
    pairs: tuple[Pair, ...]

    def told(self) -> list[str]:
        """Return what the parts add up to, and the pairs that matter most, one a line."""
        lines = [
            f"the scores of {self.metric} are not in units of the divergence"
            if self.parts is None
            else f"sum of parts {self.parts:.5g}"
        ]
        if self.with_pairs is not None:
            lines.append(f"with pairs {self.with_pairs:.5g}")
        if self.measured is not None:
            lines.append(f"measured {self.measured:.5g} ± {self.stderr:.2g}")
        pairs = [
            f"  {'reinforce' if pair.effect > 0 else 'cancel'} {pair.effect:+.2e}: "
            f"{pair.first} and {pair.second}"
            for pair in self.pairs
        ]
        return [", ".join(lines), *pairs]

    def view(self) -> dict[str, Any]:
        """Return all but the matrix as plain data."""
        return {
            "parts": self.parts,
            "with_pairs": self.with_pairs,
            "measured": self.measured,
            "stderr": self.stderr,
            "pairs": [asdict(pair) for pair in self.pairs],
        }


def additivity(
    problem: Problem, allocation: Allocation, evaluations: Sequence[Evaluation], strongest: int = 10
) -> Additivity:
    """Return how the parts of `allocation` add up, and the `strongest` pairs by |effect|."""
    choice = allocation.choice(problem.cells)
    matrix = None
    with_pairs = None
    pairs: tuple[Pair, ...] = ()
    if problem.responses is not None:
        chosen = Cells(units=problem.cells.units, schemes=tuple((s,) for s in allocation.values()))
        interactions = problem.responses.restrict(chosen, choice).interactions()
        with_pairs = float(interactions.sum())
        matrix = 2 * interactions
        np.fill_diagonal(matrix, 0.0)
        pairs = _strongest(problem.cells.units, matrix, strongest)
    measured = next(
        (e for e in evaluations if e.candidate == CHOSEN and e.split == "calibration"), None
    )
    return Additivity(
        units=problem.cells.units,
        metric=problem.sensitivity.metric,
        parts=problem.score(choice) if problem.sensitivity.is_divergence else None,
        with_pairs=with_pairs,
        measured=None if measured is None else measured.mean,
        stderr=None if measured is None else measured.stderr,
        matrix=matrix,
        pairs=pairs,
    )


def _strongest(units: tuple[UnitName, ...], matrix: Floats, count: int) -> tuple[Pair, ...]:
    rows, columns = np.triu_indices(len(units), k=1)
    effects = matrix[rows, columns]
    order = np.argsort(-np.abs(effects), kind="stable")[:count]
    return tuple(
        Pair(first=units[rows[i]], second=units[columns[i]], effect=float(effects[i]))
        for i in order
        if effects[i]
    )
