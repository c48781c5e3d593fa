"""How long do people wait for the dashboard?

`what-if`: a budget is dragged over runs of 200 and 2,000 units in 8 schemes, with responses: the
server's time for each answer (what the solver and the view take, told by the server), the time
until a client on this machine has it, and, where Chromium is, until the new allocation is on the
screen. Targets: p95 below 60 ms in the server and 150 ms on the screen for 200 units, 500 ms for
2,000. `readers`: 50 readers, each looking at something every four seconds, on a database of 1,000
runs x 300 units x 6 schemes, alone and while a run writes its scores: p95 below 300 ms for lists,
below 1 s for the page with the frontier; what the writer takes with and without readers.
Run: python -m benchmarks.dashboard [what-if readers] [--runs 1000] [--postgresql URL]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx2
import numpy as np

from benchmarks.store import build, layer, spec_of
from mpq.core.evaluation import CHOSEN
from mpq.core.formats import parse_scheme
from mpq.core.jobs import RunState
from mpq.core.layers import LayerGraph, Unit
from mpq.core.problem import Budget, Problem
from mpq.core.tables import Cells, CostTable, Responses, SensitivityTable
from mpq.store import Store, open_store
from solvers import solve
from tests.browser import ARGUMENTS, CHROMIUM, serving

SCHEMES = tuple(
    map(parse_scheme, ("int2", "int3g64", "int4g64", "int4", "int5", "int6", "int8", "fp16"))
)
READERS, PAUSE_S, LOOK_S = 50, 4.0, 40.0
PARTIALS = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", default=["what-if", "readers"])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--postgresql", default="")
    given = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}")
    if "what-if" in given.sections:
        with tempfile.TemporaryDirectory() as folder:
            what_if(f"sqlite:///{folder}/runs.db")
    if "readers" in given.sections:
        with tempfile.TemporaryDirectory() as folder:
            readers(given.postgresql or f"sqlite:///{folder}/runs.db", given.runs)


def p95(seconds: list[float]) -> float:
    return 1e3 * float(np.percentile(seconds, 95))


def told(what: str, seconds: list[float]) -> None:
    middle = 1e3 * statistics.median(seconds)
    print(f"  {what:<46}median {middle:7.1f} ms  p95 {p95(seconds):7.1f} ms  n {len(seconds)}")


# --- dragging ---------------------------------------------------------------------------------


def made_problem(units: int, samples: int = 128, seed: int = 0) -> Problem:
    """Return scores that fall with bits by a factor of four, some of them shared by all units."""
    rng = np.random.default_rng(seed)
    names = tuple(f"model.layers.{i // 7}.mlp.projection_{i % 7}" for i in range(units))
    cells = Cells(units=names, schemes=(SCHEMES,) * units)
    bits = np.array([scheme.weights.bits for scheme in SCHEMES], float)
    size = np.exp(rng.normal(11, 1, units))
    error = np.sqrt(np.exp(rng.normal(0, 1.5, units))[:, None] * 4.0**-bits)
    own = rng.normal(size=(units, 1, samples, 2))
    common = rng.normal(size=(samples, 2))
    vectors = (error[:, :, None, None] * (own + 0.3 * common)).reshape(-1, samples, 2)
    responses = Responses(cells=cells, vectors=(1e-2 * vectors).astype(np.float32))
    values, stderr = responses.own_scores()
    memory = (size[:, None] * bits / 8).ravel()
    latency = (size[:, None] * (2 + 0.7 * bits + rng.normal(0, 0.5, (units, 8))) * 1e-11).ravel()
    costs = {
        "memory": CostTable.exact("memory", "bytes", cells, np.round(memory)),
        "latency": CostTable.exact("latency", "s", cells, latency),
    }
    table = SensitivityTable(metric="gauss_newton", cells=cells, values=values, stderr=stderr)
    return Problem(sensitivity=table, costs=costs, budgets=(), responses=responses)


def put_run(store: Store, problem: Problem) -> str:
    """Keep a problem and its answer as a finished run."""
    names = problem.cells.units
    run_id = store.create_run(spec_of(0))
    store.set_state(run_id, RunState.RUNNING)
    graph = LayerGraph(
        layers=tuple(layer(name, order) for order, name in enumerate(names)),
        units=tuple(Unit(name=name, layers=(name,)) for name in names),
        unsearched=(),
        sample="float32[1, 128, 64]",
    )
    store.put_graph(run_id, graph)
    store.put_sensitivity(run_id, problem.sensitivity)
    for table in problem.costs.values():
        store.put_cost(run_id, table)
    assert problem.responses is not None
    store.put_responses(run_id, problem.responses)
    limits = [
        Budget(name, 0.5 * float(table.values.sum()) / len(SCHEMES), f"{name} <= 50%")
        for name, table in problem.costs.items()
    ]
    store.put_solution(run_id, CHOSEN, solve(problem.with_budgets(limits)))
    store.set_state(run_id, RunState.SUCCEEDED)
    return run_id


def what_if(address: str) -> None:
    print("what-if: 8 schemes, 256 responses; each answer for another budget on memory")
    with open_store(address) as store:
        made = {units: made_problem(units) for units in (200, 2000)}
        ids = {units: put_run(store, problem) for units, problem in made.items()}
    with (
        serving(address, "--drivers", "0") as server,
        httpx2.Client(base_url=server.url, timeout=60) as client,
    ):
        for units, run_id in ids.items():
            table = made[units].costs["memory"]
            own, whole = [], []
            for share in np.linspace(0.25, 0.8, 63):
                limit = share * float(table.values.sum()) / len(SCHEMES) * 1.5
                asked = {"budget": [f"memory <= {limit} bytes", "latency <= 1 s"]}
                began = time.perf_counter()
                answer = client.get(f"/runs/{run_id}/what-if", params=asked)
                whole.append(time.perf_counter() - began)
                answer.raise_for_status()
                timing = answer.headers["server-timing"]
                own.append(1e-3 * float(timing.partition("dur=")[2]))
                time.sleep(0.03)  # a hand moves on: rates are for machines
            told(f"{units} units: in the server", own[3:])
            told(f"{units} units: until a client has it", whole[3:])
        if CHROMIUM is None:
            print("  no Chromium here: nothing was drawn")
            return
        for units, run_id in ids.items():
            told(f"{units} units: on the screen", drawn(server.url, run_id))


DRAG = """async () => {
  const slide = document.querySelector('.knob[data-cost="memory"] .slide'), taken = [];
  const root = document.documentElement, frame = () => new Promise(requestAnimationFrame);
  for (let step = 0; step < 63; step++) {
    delete root.dataset.drag;
    const began = performance.now();
    slide.value = String(950 - 10 * step);
    slide.dispatchEvent(new Event("input"));
    while (!root.dataset.drag) await frame();
    if (root.dataset.drag === "failed") {
      throw new Error(document.getElementById("said").textContent);
    }
    await frame();
    taken.push((performance.now() - began) / 1000);
  }
  return taken.slice(3);
}"""


def drawn(url: str, run_id: str) -> list[float]:
    """Return the seconds from a moved slider to the frame after its answer was drawn."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(f"{url}/runs/{run_id}")
        page.wait_for_load_state("networkidle")
        taken: list[float] = page.evaluate(DRAG)
        browser.close()
    return taken


# --- readers ----------------------------------------------------------------------------------


def readers(address: str, runs: int) -> None:
    print(f"readers: {READERS}, each looking every {PAUSE_S:g} s, {runs} runs x 300 units x 6")
    build(address, runs, 300)
    with open_store(address) as store:
        ids = [run.id for run in store.runs(RunState.SUCCEEDED, limit=None)]
    with serving(address, "--drivers", "0") as server:
        asyncio.run(look(server.url, ids, 5.0, READERS))  # warm
        alone = writing(address)
        taken: dict[str, list[float]] = {}
        with in_background(lambda: taken.update(asyncio.run(look(server.url, ids, LOOK_S)))):
            time.sleep(2.0)
            busy = writing(address)
        for what, seconds in taken.items():
            told(what, seconds)
        idle = writing(address)
    before = statistics.mean([alone, idle])
    print(
        f"  a run that writes {PARTIALS} results: {1e3 * before / PARTIALS:.2f} ms each without "
        f"readers, {1e3 * busy / PARTIALS:.2f} ms with them ({100 * (busy / before - 1):+.0f} %)"
    )


def writing(address: str) -> float:
    """Return the seconds that a run takes to keep its results, beside some computing."""
    rng = np.random.default_rng(time.time_ns())
    with open_store(address) as store:
        run_id = store.create_run(spec_of(1))
        store.set_state(run_id, RunState.RUNNING)
        began = time.perf_counter()
        for number in range(PARTIALS):
            work = rng.random((160, 160))
            for _ in range(60):
                work = np.tanh(work @ work / 160)
            store.put_partial(f"{run_id} {number}", {"u": work[:8]}, 0.01)
            store.put_progress(run_id, "scoring", number + 1, PARTIALS)
        seconds = time.perf_counter() - began
        store.set_state(run_id, RunState.STOPPED)
    return seconds


async def look(
    url: str, ids: list[str], seconds: float, number: int = READERS
) -> dict[str, list[float]]:
    """Let readers look at lists and runs for some seconds and return how long each waited."""
    taken: dict[str, list[float]] = {}
    end = time.perf_counter() + seconds

    async def one(seed: int) -> None:
        drawn = random.Random(seed)
        async with httpx2.AsyncClient(base_url=url, timeout=30) as client:
            await asyncio.sleep(drawn.random() * PAUSE_S)
            while time.perf_counter() < end:
                what, path = drawn.choice(
                    [
                        ("list of runs", "/"),
                        ("list of runs, filtered", f"/?model=net{drawn.randrange(10)}"),
                        ("list of runs, by memory", "/?sort=memory&state=SUCCEEDED"),
                        ("page of a run with its frontier", f"/runs/{drawn.choice(ids)}"),
                    ]
                )
                began = time.perf_counter()
                answer = await client.get(path)
                taken.setdefault(what, []).append(time.perf_counter() - began)
                answer.raise_for_status()
                await asyncio.sleep(PAUSE_S * (0.5 + drawn.random()))

    await asyncio.gather(*(one(seed) for seed in range(number)))
    return taken


@contextlib.contextmanager
def in_background(act: object) -> Iterator[None]:
    thread = threading.Thread(target=act)  # type: ignore[arg-type]
    thread.start()
    yield
    thread.join()


if __name__ == "__main__":
    main()
