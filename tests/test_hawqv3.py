"""The published ResNet18 configurations of HAWQ-V3 (ICML 2021), bit for bit.

Source of tests/data/hawqv3_resnet18.json: the integer-programming notebook and the
configurations of the official HAWQ release (MIT licence).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mpq.core.formats import parse_scheme
from mpq.core.problem import Budget, Problem, Status
from mpq.core.tables import Cells, CostTable, SensitivityTable
from solvers import solve
from solvers.frontier import frontier
from tests.oracles import fast_brute_force

DATA = json.loads((Path(__file__).parent / "data" / "hawqv3_resnet18.json").read_text("utf-8"))
BITS = (4, 8)
LAYERS: list[str] = DATA["layers"]
PARAMETERS, MACS = np.array(DATA["parameters"]), np.array(DATA["macs"])
TIED = {second: first for first, second in DATA["ties"]}
UNITS = [number for number in range(len(LAYERS)) if number not in TIED]
CELLS = Cells(
    units=tuple(LAYERS[number] for number in UNITS),
    schemes=(tuple(parse_scheme(f"int{bits}:int{bits}") for bits in BITS),) * len(UNITS),
)


def merged(per_bits: dict[int, np.ndarray]) -> np.ndarray:
    """Add the layers of each unit; cells are unit by unit, 4 bits before 8."""
    layers = np.column_stack([per_bits[bits] for bits in BITS])
    for second, first in TIED.items():
        layers[first] += layers[second]
    return layers[UNITS].ravel()


COSTS = {
    "size": merged({4: PARAMETERS / 2, 8: PARAMETERS}),
    "bops": merged({4: MACS / 64, 8: MACS / 16}),
    "latency": merged({bits: np.array(DATA[f"latency_int{bits}_ms"]) for bits in BITS}),
}
TEXTS = {"size": "MiB", "bops": "MBOPs", "latency": "ms"}
OMEGA = merged(
    {bits: np.array(DATA["hessian_trace"]) * np.array(DATA[f"delta_w{bits}_sq"]) for bits in BITS}
)


def hawq(limits: dict[str, float]) -> Problem:
    return Problem(
        sensitivity=SensitivityTable(
            metric="hessian_trace", cells=CELLS, values=OMEGA, stderr=np.zeros(len(CELLS))
        ),
        costs={
            name: CostTable.exact(name, TEXTS[name], CELLS, values)
            for name, values in COSTS.items()
        },
        budgets=tuple(Budget(name, limit) for name, limit in limits.items()),
    )


def limit_of(cost: str, ratio: float) -> float:
    low, high = COSTS[cost].reshape(-1, 2).sum(axis=0)
    return float(low + ratio * (high - low))


@pytest.mark.parametrize("name", DATA["published"])
def test_published_configuration(name: str) -> None:
    published = DATA["published"][name]
    cost, limit = published["budget"], published["limit"]
    assert limit == pytest.approx(limit_of(cost, published["ratio"]), rel=1e-9)
    solution = solve(hawq({cost: limit}))
    assert solution.status is Status.OPTIMAL
    assert solution.score == pytest.approx(published["omega"], rel=1e-9)
    assert solution.allocation is not None
    bits = [
        solution.allocation[LAYERS[TIED.get(number, number)]].weights.bits
        for number in range(len(LAYERS))
    ]
    assert bits == published["bits"]


def test_three_budgets_at_once() -> None:
    joint = DATA["joint_all_0.5"]
    problem = hawq({cost: limit_of(cost, joint["ratio"]) for cost in joint["budgets"]})
    solution = solve(problem)
    assert solution.status is Status.OPTIMAL
    assert solution.score == pytest.approx(joint["omega"], abs=5e-7)
    assert solution.score == pytest.approx(fast_brute_force(problem), rel=1e-9)


def test_frontier_meets_the_published_points() -> None:
    published = [p for p in DATA["published"].values() if p["budget"] == "size"]
    found = frontier(hawq({}), "size", points=25).solutions
    for point in published:
        below = [s.score for s in found if s.totals and s.totals["size"] <= point["limit"]]
        above = [s.score for s in found if s.totals and s.totals["size"] >= point["limit"]]
        assert min(below) >= point["omega"] - 1e-12
        assert max(above) <= point["omega"] + 1e-12
