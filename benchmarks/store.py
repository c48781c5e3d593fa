"""How long do the list of runs and the page of one run wait for their database?

One run is put by the store and copied in bulk until there are 1,000, each with a network of 300
units in 6 schemes: a sensitivity table, two cost tables, three solutions, a frontier. PostgreSQL
is a server of its own in a temporary directory (skipped where none is installed), or
`--postgresql URL` of an empty database. Targets on an idle machine: p95 of a filtered list below
50 ms, of a run's page below 200 ms. "CPU ms" is the median of this process alone, which a busy
machine changes little.
Run: python -m benchmarks.store [--runs 1000] [--units 300] [--calls 200]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from sqlalchemy import Connection, create_engine, text

from mpq.core.evaluation import CHOSEN
from mpq.core.formats import parse_scheme
from mpq.core.frontier import Frontier
from mpq.core.jobs import JobSpec, RunState
from mpq.core.layers import Layer, LayerGraph, Unit
from mpq.core.problem import Allocation, Budget, Solution, Status
from mpq.core.tables import Cells, CostTable, SensitivityTable
from mpq.store import Store, open_store
from tests.postgres import programs, serve

SCHEMES = tuple(map(parse_scheme, ("int2", "int3g64", "int4g64", "int4", "int8:int8", "fp16")))
MODELS, METRICS = 10, ("gauss_newton", "kl", "hessian_trace")
# Table: columns but the run, and what else is copied with it.
TABLES = {
    "units": "name, position, layers, weights",
    "scores": "metric, unit, scheme, position, value, stderr",
    "costs": "name, unit_of_measure, fixed, baseline, weights, provenance",
    "cost_cells": "name, unit, scheme, position, value, low, high",
    "solutions": "label, status, solver, score, bound, gap, seconds, created_at, budgets, totals, "
    "infeasibility",
    "frontiers": "costs, complete, grid, created_at",
    "frontier_points": "costs, position, status, solver, score, bound, gap, seconds, budgets, "
    "totals, places",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--units", type=int, default=300)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--postgresql", default="")
    given = parser.parse_args()
    print(f"{given.runs} runs x {given.units} units x {len(SCHEMES)} schemes")
    print(f"{'database':<12}{'what':<34}{'median ms':>10}{'p95 ms':>9}{'max ms':>9}{'CPU ms':>9}")
    for name, opened in databases(given.postgresql):
        with opened() as address:
            started = time.perf_counter()
            build(address, given.runs, given.units)
            print(f"{name:<12}built in {time.perf_counter() - started:.0f} s")
            with open_store(address) as store:
                measure(name, store, given.calls)


def databases(url: str) -> Iterator[tuple[str, Callable[[], AbstractContextManager[str]]]]:
    """Yield (name, context of an address)."""

    @contextmanager
    def sqlite() -> Iterator[str]:
        with tempfile.TemporaryDirectory() as folder:
            yield f"sqlite:///{Path(folder) / 'runs.db'}"

    @contextmanager
    def postgresql() -> Iterator[str]:
        if url:
            yield url
        else:
            with contextmanager(serve)() as server:
                yield server.new_database()

    yield "SQLite", sqlite
    if url or programs():
        yield "PostgreSQL", postgresql
    else:
        print("PostgreSQL: no server is installed here")


def build(address: str, runs: int, units: int) -> None:
    """Fill an empty database."""
    with open_store(address) as store:
        first = put_first(store, units)
        ids = [store.create_run(spec_of(number)) for number in range(1, runs)]
        for run_id in ids[: len(ids) * 9 // 10]:
            store.set_state(run_id, RunState.RUNNING)
            store.set_state(run_id, RunState.SUCCEEDED)
    engine = create_engine(address)
    with engine.begin() as connection:
        copy(connection, first)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    engine.dispose()


def spec_of(number: int) -> JobSpec:
    return JobSpec(
        name=f"run {number}",
        model=f"pkg.models:net{number % MODELS}",
        calibration="pkg.data:batches",
        budgets=("memory <= 60%", "latency <= 3 ms"),
        metric=METRICS[number % len(METRICS)],
    )


def put_first(store: Store, units: int) -> str:
    """Put one whole run and return its id."""
    names = tuple(f"model.layers.{i // 7}.mlp.projection_{i % 7}" for i in range(units))
    layers = tuple(layer(name, order) for order, name in enumerate(names))
    graph = LayerGraph(
        layers=layers,
        units=tuple(Unit(name=name, layers=(name,)) for name in names),
        unsearched=(),
        sample="float32[1, 128, 64]",
    )
    cells = Cells(units=names, schemes=(SCHEMES,) * units)
    values = np.random.default_rng(0).random(len(cells))
    run_id = store.create_run(spec_of(0))
    store.set_state(run_id, RunState.RUNNING)
    store.put_graph(run_id, graph)
    table = SensitivityTable(
        metric=METRICS[0], cells=cells, values=values, stderr=np.zeros(len(cells))
    )
    store.put_sensitivity(run_id, table)
    for name, unit in (("memory", "bytes"), ("latency", "s")):
        cost = CostTable(
            name=name, unit=unit, cells=cells, values=values, low=values, high=values, weights=1
        )
        store.put_cost(run_id, cost)
    found = [solution(names, scheme) for scheme in SCHEMES]
    for label, one in zip((CHOSEN, "additive", "pairs"), found[:3], strict=True):
        store.put_solution(run_id, label, one)
    store.put_frontier(run_id, Frontier(cost="memory", solutions=tuple(found * 4 + found[:1])))
    store.set_state(run_id, RunState.SUCCEEDED)
    return run_id


def layer(name: str, order: int) -> Layer:
    return Layer(
        name=name,
        kind="linear",
        weight_shape=(64, 64),
        weight_id=f"{name}.weight",
        weight_bytes=16384,
        input_shape=(1, 128, 64),
        output_shape=(1, 128, 64),
        macs=524288,
        calls=1,
        order=order,
    )


def solution(names: tuple[str, ...], scheme: object) -> Solution:
    return Solution(
        status=Status.OPTIMAL,
        solver="auto",
        budgets=(Budget("memory", 1e6, "memory <= 1 MB"),),
        allocation=Allocation(dict.fromkeys(names, scheme)),
        score=0.5,
        totals={"memory": 1e6, "latency": 0.003},
        bound=0.5,
        gap=0.0,
        seconds=0.01,
    )


def copy(connection: Connection, first: str) -> None:
    """Give every run what the first one has."""
    others = "FROM runs JOIN {} AS t ON t.run_id = :first WHERE runs.id <> :first ORDER BY runs.id"
    for table, columns in TABLES.items():
        chosen = ", ".join(f"t.{column.strip()}" for column in columns.split(","))
        if table == "scores":  # each run has its own metric
            chosen = chosen.replace("t.metric", "runs.metric")
        connection.execute(
            text(
                f"INSERT INTO {table} (run_id, {columns}) SELECT runs.id, {chosen} "
                + others.format(table)
            ),
            {"first": first},
        )
    connection.execute(
        text(
            "INSERT INTO allocations (solution_id, position, unit, scheme) "
            "SELECT s.id, a.position, a.unit, a.scheme FROM solutions AS s "
            "JOIN solutions AS f ON f.label = s.label AND f.run_id = :first "
            "JOIN allocations AS a ON a.solution_id = f.id WHERE s.run_id <> :first ORDER BY s.id"
        ),
        {"first": first},
    )
    graph = "SELECT graph FROM runs WHERE id = :first"
    connection.execute(text(f"UPDATE runs SET graph = ({graph})"), {"first": first})


def measure(name: str, store: Store, calls: int) -> None:
    """Time what pages ask, on runs in random order."""
    drawn = random.Random(0)
    ids = [run.id for run in store.runs(limit=None)]

    def page() -> None:
        run_id = drawn.choice(ids)
        assert len(store.sensitivity(run_id).cells) == len(store.costs(run_id)["memory"].cells)
        assert len(store.solutions(run_id)) == 3

    def chosen() -> None:
        model = f"pkg.models:net{drawn.randrange(MODELS)}"
        store.runs(RunState.SUCCEEDED, model=model, metric=drawn.choice(METRICS))

    asked: dict[str, Callable[[], object]] = {
        "newest 50 runs": store.runs,
        "50 runs of a model, metric, state": chosen,
        "runs of a name": lambda: store.runs(name=f"run {drawn.randrange(1, len(ids))}"),
        "a run's scores, costs, solutions": page,
    }
    for what, ask in asked.items():
        taken, computed = [], []
        for _ in range(calls):
            started, cpu = time.perf_counter(), time.process_time()
            ask()
            taken.append(1000 * (time.perf_counter() - started))
            computed.append(1000 * (time.process_time() - cpu))
        low, high = np.percentile(taken, [50, 95])
        print(
            f"{name:<12}{what:<34}{low:>10.1f}{high:>9.1f}{max(taken):>9.1f}"
            f"{np.median(computed):>9.1f}"
        )


if __name__ == "__main__":
    main()
