"""How many tasks and workers one scheduler serves, and what Ray adds to the work itself.

The scheduler is the real one (workers/schedule.py). First over simulated workers with a clock of
their own: 1,000,000 tasks on 2,000 workers, of which 2 % of the tasks kill their worker and 2 %
take 20 times as long; then for how many workers it keeps up. Then over real Ray: its own time
for each task, and scoring MiniLM with two workers against the serial executor.
Run: python -m benchmarks.cluster [first_score simulated saturation overhead scoring]
"""

from __future__ import annotations

import itertools
import math
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TASKS, WORKERS = 1_000_000, 2_000


def lognormal(median_s: float, seed: int = 0) -> Callable[[int], float]:
    """Return times of tasks: a table that repeats, so that drawing them costs nothing."""
    draw = random.Random(seed)
    table = [median_s * math.exp(0.5 * draw.gauss(0, 1)) for _ in range(9973)]
    return lambda position: table[position % len(table)]


def run(tasks: int, workers: int, median_s: float, failures: float) -> dict[str, float]:
    """Return what one simulated run took; raises where a result is missing or comes twice."""
    from benchmarks.sections.simulated_cluster import Faults, Node, SimulatedCluster
    from workers.pool import Event, Work
    from workers.schedule import Limits, Schedule

    class Timed(SimulatedCluster):
        """Counts the time that the simulation itself takes."""

        own_s = 0.0

        def submit(self, process: int, work: Sequence[Work]) -> None:
            began = time.perf_counter()
            super().submit(process, work)
            self.own_s += time.perf_counter() - began

        def wait(self, timeout_s: float) -> Sequence[Event]:
            began = time.perf_counter()
            events = super().wait(timeout_s)
            self.own_s += time.perf_counter() - began
            return events

    nodes = [Node(slots=min(8, workers))] * max(1, workers // 8)
    faults = Faults(dies=failures, slow=failures)
    pool = Timed(lognormal(median_s), nodes, faults=faults)
    seen = bytearray(tasks)
    began, cpu = time.perf_counter(), time.process_time()
    for position, _ in Schedule(pool, Limits()).run(range(tasks)):
        seen[position] += 1
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert seen.count(1) == tasks, "a result is missing or came twice"
    work_s = sum(map(pool.seconds, range(tasks))) * (1 + 19 * failures)  # stragglers: 20 times
    return {
        "tasks": tasks,
        "workers": workers,
        "cpu_s": cpu,
        "scheduler_s": cpu * (1 - pool.own_s / wall),
        "virtual_s": pool.clock,
        "busy": work_s / (pool.clock * workers),
        "deaths": pool.deaths,
        "again": sum(pool.runs.values()) - tasks,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def simulated() -> None:
    """A million tasks of 5 s and a million of 10 ms, with failures and stragglers."""
    print(f"{TASKS:,} tasks on {WORKERS:,} simulated workers, 2 % deaths, 2 % stragglers")
    for median_s in (5.0, 0.01):
        found = run(TASKS, WORKERS, median_s, 0.02)
        print(
            f"  tasks of {median_s:g} s: all results once; {found['deaths']:,} deaths, "
            f"{found['again']:,} runs again; {found['virtual_s']:,.0f} s of the cluster, "
            f"{found['busy']:.0%} of it work\n"
            f"    driver: {TASKS / found['scheduler_s']:,.0f} tasks/s "
            f"({1e6 * found['scheduler_s'] / TASKS:.1f} us a task; with the simulation "
            f"{found['cpu_s']:.0f} s in all), peak memory {found['peak_mb']:.0f} MB"
        )


def saturation() -> None:
    """Scheduling rate against the number of workers."""
    print("workers  driver us/task  tasks/s  workers kept busy with tasks of 0.1 s / 1 s / 10 s")
    for workers in (10, 100, 1_000, 2_000, 10_000, 50_000):
        tasks = max(50_000, 4 * workers)
        found = run(tasks, workers, 5.0, 0.0)
        rate = tasks / found["scheduler_s"]
        kept = " / ".join(f"{rate * seconds:,.0f}" for seconds in (0.1, 1.0, 10.0))
        print(f"{workers:7,}  {1e6 / rate:14.1f}  {rate:7,.0f}  {kept}", flush=True)


def overhead() -> None:
    """Driver time for each task over real Ray, by the length of tasks."""
    from workers import get_executor

    executor = get_executor("ray", 2)
    list(executor.map(dict, lambda state, item: item, range(4)))
    idle = time.process_time()
    time.sleep(5)
    idle = (time.process_time() - idle) / 5  # the threads of Ray in the driver
    print(f"real Ray, 2 workers, load {os.getloadavg()[0]:.1f}; idle driver {1e3 * idle:.1f} ms/s")
    for seconds, number in ((0.0, 20_000), (0.001, 5_000), (0.02, 500), (1.1, 20)):

        def fn(state: object, item: int, seconds: float = seconds) -> int:
            time.sleep(seconds)
            return item

        cpu, wall = time.process_time(), time.perf_counter()
        assert len(list(executor.map(dict, fn, range(number)))) == number
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(
            f"  tasks of {seconds:5.3f} s: driver {1e3 * cpu / number:6.3f} ms a task (without "
            f"what it takes idle {1e3 * (cpu - idle * wall) / number:6.3f}), "
            f"{number / wall:8,.0f} tasks/s"
        )
    executor.close()


def scoring() -> None:
    """Scoring MiniLM by gauss_newton: serial with one thread against two workers of Ray.

    Wall time means something on an idle machine alone. Processor time tells what two idle cores
    would give: the serial time over that of the busier worker.
    """
    import torch

    from mpq.core.formats import parse_scheme
    from mpq.core.jobs import JobSpec
    from mpq.intake import graph_of, load, make_workload
    from mpq.progress import Silent
    from mpq.scoring import run_task
    from mpq.store.store import open_store
    from mpq.tasks import Workers
    from sensitivity import get_metric
    from workers import get_executor

    def timed(bench: Any, task: Any) -> tuple[int, float, Any]:
        began = time.process_time()
        found = run_task(bench, ("gauss_newton", task))
        return os.getpid(), time.process_time() - began, found

    torch.set_num_threads(1)
    spec = JobSpec(
        model="examples.minilm:make_model",
        calibration="examples.minilm:calibration_batches",
        budgets=("memory <= 60%",),
    )
    given = load(spec.model, spec.calibration)
    schemes = [parse_scheme(f"int{bits}") for bits in (2, 3, 4, 5, 6, 8)]
    workload = make_workload(spec, given, graph_of(spec, given), lambda layer: schemes)
    tasks = get_metric("gauss_newton").tasks(workload)
    for turn in range(2):
        took, tables = {}, {}
        for name, number in {"serial": 1, "ray": 2}.items():
            executor = get_executor(name, number)
            with open_store("sqlite://") as store:
                workers = Workers.of(workload, executor, store, Silent())
                slowly = lambda bench, item: time.sleep(2.0)  # noqa: E731
                list(executor.map(workers.setup, slowly, range(number)))  # both are set up
                wall, driver = time.perf_counter(), time.process_time()
                found = dict(executor.map(workers.setup, timed, tasks))
                wall, driver = time.perf_counter() - wall, time.process_time() - driver
            executor.close()
            spent: dict[int, float] = defaultdict(float)
            for process, seconds, _ in found.values():
                spent[process] += seconds
            took[name] = (wall, max(spent.values()))
            tables[name] = [found[i][2]["u"].tobytes() for i in range(len(tasks))]
            print(
                f"  {name} ({number}), {len(tasks)} tasks: {wall:.2f} s wall, processor time of "
                f"each worker {', '.join(f'{s:.2f}' for s in spent.values())} s, of the driver "
                f"{driver:.2f} s, load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
        assert tables["serial"] == tables["ray"], "results depend on the executor"
        by_wall, by_cpu = (took["serial"][i] / took["ray"][i] for i in (0, 1))
        print(
            f"  turn {turn + 1}: the same results bit for bit, {by_wall:.2f} times faster by "
            f"wall time, {by_cpu:.2f} by processor time"
        )


@contextmanager
def own_cluster(folder: str, num_cpus: int = 2) -> Iterator[str]:
    """Start a Ray cluster of this machine that asks for a token, and end it by its process."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", "--block", "--include-dashboard=false"]
    command += [f"--port={port}", f"--num-cpus={num_cpus}"]
    with Path(folder, "ray.log").open("wb") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while b"Ray runtime started" not in Path(folder, "ray.log").read_bytes():
            if head.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(Path(folder, "ray.log").read_text()[-2000:])
            time.sleep(0.2)
        time.sleep(10)  # its first processes are started in advance
        yield f"127.0.0.1:{port}"
    finally:
        head.terminate()
        head.wait(60)


def first_score() -> None:
    """From `Client.submit` to the first score in the database, on a cluster that runs already.

    "new": a driver process is started for the run; "ready": `mpq drive --ray-address` has one, and
    a worker, that have imported everything.
    """
    import sqlite3
    import tempfile

    import mpq
    from mpq.core.jobs import ENDED

    nets = {  # the modules of the examples import sklearn and transformers, which takes seconds
        "a small network of torch alone": ("tests.slow_net:make_deep", "tests.slow_net:batches"),
        "digits_resnet20": tuple(
            f"examples.digits_resnet20:{what}" for what in ("make_model", "calibration_batches")
        ),
        "MiniLM": tuple(f"examples.minilm:{w}" for w in ("make_model", "calibration_batches")),
    }
    with tempfile.TemporaryDirectory() as folder, own_cluster(folder) as address:
        for (name, (model, batches)), how in itertools.product(nets.items(), ("new", "ready")):
            print(f"  {name}, {how}:")
            for turn in range(1, 4):  # the first one meets processes that were never used
                path = f"{folder}/{name}-{how}-{turn}.db"
                client = mpq.Client(path)
                driving = how == "ready" and drives(path, address)
                job = mpq.JobSpec(
                    model=model,
                    calibration=batches,
                    budgets=("memory <= 60%",),
                    schemes=("int4", "int8"),
                    ray_address=address,
                    seed=turn,
                )
                began = time.perf_counter()
                run = client.submit(job, queue=how == "ready")
                stages: dict[str, float] = {}
                database = sqlite3.connect(path)
                count = "SELECT count(*) FROM partials"
                while not (scored := database.execute(count).fetchone()[0]):
                    if run.status() in ENDED:
                        break
                    for stage in run.progress():
                        stages.setdefault(stage.stage, time.perf_counter() - began)
                    time.sleep(0.02)
                took = time.perf_counter() - began
                assert scored, run.record().error_message
                database.close()
                run.stop()
                client.close()
                if driving:
                    driving.send_signal(signal.SIGINT)
                    driving.wait()
                told = ", ".join(f"{stage} from {at:.2f} s" for stage, at in stages.items())
                load = os.getloadavg()[0]
                print(f"    {took:.2f} s ({told}; load {load:.1f})", flush=True)


def drives(path: str, address: str) -> subprocess.Popen[bytes]:
    """Start `mpq drive`, and wait until it is ready."""
    command = [sys.executable, "-m", "mpq.cli", "drive", "--ray-address", address]
    process = subprocess.Popen(command, env={**os.environ, "MPQ_STORAGE": path})
    time.sleep(20)
    return process


SECTIONS = {
    "simulated": simulated,
    "saturation": saturation,
    "overhead": overhead,
    "scoring": scoring,
    "first_score": first_score,
}


def main(names: Iterable[str]) -> None:
    """Run the sections that were asked for."""
    for name in names:
        print(f"\n{(SECTIONS[name].__doc__ or name).splitlines()[0]}", flush=True)
        SECTIONS[name]()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main(sys.argv[1:] or SECTIONS)
