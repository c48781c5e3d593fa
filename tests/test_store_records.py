"""Every record comes back from the database as it was put."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from mpq.core.errors import InvalidInputError
from mpq.core.evaluation import Evaluation
from mpq.core.formats import Format, Scheme, parse_scheme
from mpq.core.jobs import JobSpec
from mpq.core.joint import JointCosts
from mpq.core.layers import Convolution, Layer, LayerGraph, Unit, Unsearched
from mpq.core.problem import Allocation, Budget, Infeasibility, Solution, Status
from mpq.core.tables import Cells, CostTable, Responses, SensitivityTable
from mpq.store import Store, open_store
from solvers.frontier import frontier
from solvers.surface import surface
from tests.databases import sql
from tests.test_solvers import drawn

SPEC = JobSpec(model="pkg.mod:net", calibration="pkg.mod:data", budgets=("memory <= 60%",))
# Neither units nor schemes in alphabetical order, nor the same schemes for all units.
CELLS = Cells(
    units=("z.0", "a.10", "a.9", "ünit 'x'; --"),
    schemes=(
        tuple(map(parse_scheme, ("int8", "int4g64", "int4:int8"))),
        (parse_scheme("int2"),),
        tuple(map(parse_scheme, ("fp16", "int8:int8s", "int3g32a", "int4t"))),
        tuple(map(parse_scheme, ("int8", "int4g64", "int4:int8"))),
    ),
)
RNG = np.random.default_rng(3)


@pytest.fixture
def store(address: str) -> Iterator[Store]:
    with open_store(address) as opened:
        yield opened


@pytest.fixture
def run_id(store: Store) -> str:
    return store.create_run(SPEC)


def same(a: Any, b: Any) -> bool:
    """Equality that takes arrays whole and NaN as equal to NaN."""
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    if dataclasses.is_dataclass(a):
        names = [f.name for f in dataclasses.fields(a) if f.compare]
        return type(a) is type(b) and all(same(getattr(a, n), getattr(b, n)) for n in names)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def sensitivity(metric: str = "gauss_newton", cells: Cells = CELLS) -> SensitivityTable:
    values, stderr = RNG.normal(size=len(cells)), RNG.random(len(cells))
    return SensitivityTable(metric=metric, cells=cells, values=values, stderr=stderr)


def cost(name: str = "latency", cells: Cells = CELLS) -> CostTable:
    values = RNG.random(len(cells))
    return CostTable(
        name=name,
        unit="s",
        cells=cells,
        values=values,
        low=values * 0.9,
        high=values * 1.1,
        fixed=1 / 3,
        baseline=7.5,
        weights=2**40,
        provenance="measured on a machine",
    )


def responses(cells: Cells = CELLS) -> Responses:
    shape = (len(cells), 5, 2)
    return Responses(cells=cells, vectors=RNG.normal(size=shape).astype(np.float32))


GRAPH = LayerGraph(
    layers=(
        Layer(
            name="conv",
            kind="conv2d",
            weight_shape=(8, 3, 3, 3),
            weight_id="conv.weight",
            weight_bytes=864,
            input_shape=(1, 3, 32, 32),
            output_shape=(1, 8, 32, 32),
            macs=221184,
            calls=1,
            order=0,
            convolution=Convolution(
                kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1
            ),
        ),
        *(
            Layer(
                name=name,
                kind="linear",
                weight_shape=(4, 8),
                weight_id="tied",
                weight_bytes=128,
                input_shape=(1, 8),
                output_shape=(1, 4),
                macs=32,
                calls=2,
                order=order,
            )
            for order, name in ((1, "in"), (2, "out"))
        ),
    ),
    units=(
        Unit(name="tied", layers=("in", "out"), reason="tied"),
        Unit(name="conv", layers=("conv",)),
    ),
    unsearched=(Unsearched(name="bn.bias", elements=8, bytes=32, reason="not a weight"),),
    sample="float32[1, 3, 32, 32]",
)


def test_sensitivity_comes_back_exactly_and_in_order(store: Store, run_id: str) -> None:
    table = sensitivity()
    store.put_sensitivity(run_id, table)
    assert same(store.sensitivity(run_id), table)
    assert list(store.sensitivity(run_id).cells) == list(CELLS)


def test_sensitivity_of_another_metric(store: Store, run_id: str) -> None:
    tables = {name: sensitivity(name) for name in ("hessian_trace", "gauss_newton", "another")}
    for table in tables.values():
        store.put_sensitivity(run_id, table)
    for name, table in tables.items():
        assert same(store.sensitivity(run_id, name), table)
    assert store.sensitivity(run_id).metric == SPEC.metric
    with pytest.raises(InvalidInputError, match="did you mean 'hessian_trace'"):
        store.sensitivity(run_id, "hesian_trace")


def test_only_metric_is_the_default_whatever_the_run_asked_for(store: Store, run_id: str) -> None:
    store.put_sensitivity(run_id, sensitivity("another"))
    assert store.sensitivity(run_id).metric == "another"


@pytest.mark.parametrize("baseline", [7.5, math.nan, math.inf, 0.0])
def test_costs_come_back_exactly(store: Store, run_id: str, baseline: float) -> None:
    tables = {
        name: dataclasses.replace(cost(name), baseline=baseline) for name in ("memory", "latency")
    }
    for table in tables.values():
        store.put_cost(run_id, table)
    assert same(store.costs(run_id), tables)


def test_costs_of_pairs_come_back_exactly(store: Store, run_id: str) -> None:
    pairs = JointCosts(
        cells=CELLS,
        first=np.array([9, 0, 3]),
        second=np.array([1, 4, 5]),
        values=np.array([-0.1, 1 / 3, 5e-324]),
    )
    tables = {"latency": dataclasses.replace(cost(), joint=pairs), "memory": cost("memory")}
    for table in tables.values():
        store.put_cost(run_id, table)
    assert same(store.costs(run_id), tables)
    bare = dataclasses.replace(tables["latency"], joint=None)
    store.put_cost(run_id, bare)
    assert same(store.costs(run_id), {**tables, "latency": bare})


def test_putting_again_replaces(store: Store, run_id: str) -> None:
    fewer, _ = CELLS.restrict({"z.0": CELLS.schemes[0][:1]})
    for cells in (CELLS, CELLS, fewer):
        table, price, vectors = sensitivity(cells=cells), cost(cells=cells), responses(cells)
        for _ in range(2):
            store.put_sensitivity(run_id, table)
            store.put_cost(run_id, price)
            store.put_responses(run_id, vectors)
            store.put_graph(run_id, GRAPH)
        assert same(store.sensitivity(run_id), table)
        assert same(store.costs(run_id), {"latency": price})
        assert same(store.responses(run_id), vectors)
    assert same(store.graph(run_id), GRAPH)


def test_runs_do_not_mix(store: Store, run_id: str) -> None:
    other = store.create_run(SPEC)
    store.put_sensitivity(run_id, sensitivity())
    store.put_cost(run_id, cost())
    assert store.costs(other) == {}
    with pytest.raises(InvalidInputError, match=f"run {other} has no sensitivity table"):
        store.sensitivity(other)


def test_problem_is_what_was_put(store: Store, run_id: str) -> None:
    table, prices, vectors = sensitivity(), {n: cost(n) for n in ("bops", "memory")}, responses()
    store.put_sensitivity(run_id, table)
    for price in prices.values():
        store.put_cost(run_id, price)
    assert store.problem(run_id).responses is None
    store.put_responses(run_id, vectors)
    problem = store.problem(run_id)
    assert same(problem.sensitivity, table.clamped())
    assert same(problem.costs, prices)
    assert same(problem.responses, vectors)
    assert problem.budgets == ()
    assert problem.costs["memory"].cells is problem.cells
    assert store.problem(run_id, with_responses=False).responses is None


def test_scheme_without_text_is_refused(store: Store, run_id: str) -> None:
    odd = Scheme(Format(family="int", bits=4, scale_bits=8))
    table = SensitivityTable.from_cells("gauss_newton", {("u", odd): 1.0})
    with pytest.raises(InvalidInputError, match="means another scheme"):
        store.put_sensitivity(run_id, table)
    with pytest.raises(InvalidInputError):
        store.sensitivity(run_id)


def test_responses_are_compact(store: Store, run_id: str, address: str) -> None:
    vectors = responses()
    store.put_responses(run_id, vectors)
    ((size,),) = sql(address, 'SELECT length("array") FROM responses')
    assert size == vectors.vectors.nbytes + 128  # the header of an .npy file
    assert store.responses(store.create_run(SPEC)) is None


def test_graph_comes_back(store: Store, run_id: str, address: str) -> None:
    with pytest.raises(InvalidInputError, match="has no layer graph"):
        store.graph(run_id)
    assert not store.run(run_id).has_graph
    store.put_graph(run_id, GRAPH)
    assert store.graph(run_id) == GRAPH
    assert store.run(run_id).has_graph
    query = "SELECT name, CAST(layers AS TEXT), weights FROM units ORDER BY position"
    units = sql(address, query)
    assert units == [("tied", '["in", "out"]', 32), ("conv", '["conv"]', 216)]


ALLOCATION = Allocation({"z.0": parse_scheme("int4g64"), "a.10": parse_scheme("int8:int8")})
SOLUTIONS = {
    "best": Solution(
        status=Status.OPTIMAL,
        solver="milp",
        budgets=(Budget("memory", 1e6, "memory <= 1 MB"), Budget("latency", 1 / 3)),
        allocation=ALLOCATION,
        score=0.1,
        totals={"memory": 999999.0, "latency": math.inf},
        bound=0.1,
        gap=0.0,
        seconds=0.25,
    ),
    "nothing known": Solution(status=Status.UNKNOWN, solver="slow", budgets=()),
    "impossible": Solution(
        status=Status.INFEASIBLE,
        solver="milp",
        budgets=(Budget("memory", 10.0),),
        infeasibility=Infeasibility(
            names=("memory",),
            smallest={"memory": 11.7, "latency": math.inf, "energy": math.nan},
            relaxed={"memory": None, "latency": -math.inf},
            message="no allocation fits memory <= 10 B",
        ),
    ),
    "no units": Solution(
        status=Status.FEASIBLE, solver="greedy", budgets=(), allocation=Allocation({}), totals={}
    ),
}


def test_solutions_come_back_in_order(store: Store, run_id: str) -> None:
    for label, solution in SOLUTIONS.items():
        store.put_solution(run_id, label, solution)
    found = store.solutions(run_id)
    assert [label for label, _ in found] == list(SOLUTIONS)
    assert same(dict(found), SOLUTIONS)
    assert list(found[0][1].allocation or ()) == ["z.0", "a.10"]
    assert found[0][1].totals is not None
    assert found[1][1].allocation is None
    assert found[1][1].totals is None
    assert math.isnan(found[1][1].score)
    assert (found[1][1].bound, found[1][1].gap) == (-math.inf, math.inf)


def test_solution_under_the_same_label_replaces(store: Store, run_id: str) -> None:
    store.put_solution(run_id, "best", SOLUTIONS["impossible"])
    for _ in range(2):
        store.put_solution(run_id, "best", SOLUTIONS["best"])
    assert same(store.solutions(run_id), [("best", SOLUTIONS["best"])])


EVALUATIONS = [
    Evaluation(
        candidate="unquantized",
        split="held_out",
        allocation=Allocation({}),
        divergence="kl",
        mean=0.0,
        stderr=0.0,
    ),
    Evaluation(
        candidate="best",
        split="held_out",
        allocation=ALLOCATION,
        divergence="kl",
        mean=math.nan,
        stderr=math.inf,
        predicted=0.25,
        metrics={"accuracy": 0.9, "perplexity": math.inf, "lost": math.nan},
        predicted_bytes=2**40,
        measured_bytes=2**40 + 1,
        seconds=1.5,
    ),
    Evaluation(
        candidate="best",
        split="calibration",
        allocation=ALLOCATION,
        divergence="kl",
        mean=np.float64(0.5),
        stderr=0.1,
    ),
]


def test_evaluations_come_back_in_order(store: Store, run_id: str) -> None:
    for _ in range(2):
        for evaluation in EVALUATIONS:
            store.put_evaluation(run_id, evaluation)
    assert same(store.evaluations(run_id), EVALUATIONS)


def test_numbers_of_numpy_are_taken(store: Store, run_id: str) -> None:
    given = dataclasses.replace(
        EVALUATIONS[1],
        mean=np.float32(0.5),
        predicted=np.float32(0.25),
        metrics={"accuracy": np.float32(0.5)},
        predicted_bytes=np.int64(12),
    )
    store.put_evaluation(run_id, given)
    found = store.evaluations(run_id)[0]
    assert (found.mean, found.predicted, found.metrics) == (0.5, 0.25, {"accuracy": 0.5})
    assert type(found.predicted_bytes) is int


def test_tables_are_stored_and_loaded_in_no_time(store: Store, run_id: str) -> None:
    schemes = ("int8", "int4", "int4g64", "int8:int8", "int4a", "int2", "int3g32", "fp16")
    units = tuple(f"blocks.{i}.mlp" for i in range(40))
    cells = Cells(units=units, schemes=(tuple(map(parse_scheme, schemes)),) * 40)
    table, prices = sensitivity(cells=cells), [cost(n, cells) for n in ("memory", "latency")]
    put, load = [], []
    for _ in range(5):
        start = time.process_time()
        store.put_sensitivity(run_id, table)
        put.append(time.process_time() - start)
        for price in prices:
            store.put_cost(run_id, price)
        start = time.process_time()
        assert len(store.problem(run_id).cells) == 320
        load.append(time.process_time() - start)
    assert min(put) < 0.05
    assert min(load) < 0.05


def test_large_tables_come_back(store: Store, run_id: str) -> None:
    cells = Cells(
        units=tuple(f"experts.{i}" for i in range(8000)), schemes=(CELLS.schemes[0],) * 8000
    )
    table = sensitivity(cells=cells)
    store.put_sensitivity(run_id, table)
    assert same(store.sensitivity(run_id), table)


def test_frontiers_come_back(store: Store, run_id: str) -> None:
    problem = drawn(5, 4)
    store.put_sensitivity(run_id, dataclasses.replace(problem.sensitivity, metric="gauss_newton"))
    line = frontier(problem, "memory", points=6)
    store.put_frontier(run_id, line)
    kept = store.frontier(run_id, "memory")
    assert kept is not None
    assert same(kept, line)
    assert store.frontier(run_id, "latency") is None
    grid = surface(problem, points=(4, 3))
    store.put_frontier(run_id, grid)
    store.put_frontier(run_id, grid)  # in place of the earlier one
    assert same(store.surface(run_id, grid.costs), grid)
    assert any(s is None for row in grid.solutions for s in row)
    assert store.surface(run_id, ("latency", "memory")) is None
