"""The scheduler over a simulated cluster: nothing is lost and nothing comes twice."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.sections.simulated_cluster import Faults, Node, SimulatedCluster
from mpq.core.errors import InvalidInputError, MpqWarning, RunFailedError, StorageError
from workers.pool import Finished, Outcome
from workers.schedule import Limits, Schedule

QUICK = Limits(grace_s=30.0, first_grace_s=120.0, patience_s=100.0)


def lengths(seed: int, median_s: float = 1.0, spread: float = 1.0) -> Callable[[int], float]:
    return lambda position: median_s * math.exp(spread * random.Random(seed + position).gauss(0, 1))


def cluster(*nodes: Node, seconds: Any = None, **options: Any) -> SimulatedCluster:
    return SimulatedCluster(seconds or (lambda position: 1.0), nodes, **options)


def everything(number: int) -> list[tuple[int, tuple[int, str]]]:
    return [(i, (i, f"item {i}")) for i in range(number)]


def items(number: int) -> list[str]:
    return [f"item {i}" for i in range(number)]


def until_error(schedule: Schedule, number: int) -> tuple[list[tuple[int, Any]], Exception | None]:
    found = []
    try:
        for result in schedule.run(items(number)):
            found.append(result)  # noqa: PERF402 - what came before an error counts
    except Exception as error:
        return found, error
    return found, None


NODES = st.lists(
    st.builds(
        Node,
        slots=st.integers(1, 5),
        joins_s=st.floats(0, 60),
        leaves_s=st.floats(61, 300),
    ),
    max_size=4,
)
FAULTS = st.builds(
    Faults,
    dies=st.floats(0, 0.15),
    hangs=st.floats(0, 0.03),
    slow=st.floats(0, 0.1),
    broken=st.floats(0, 0.2),
)


@settings(max_examples=150, deadline=None)
@given(
    number=st.integers(0, 120),
    nodes=NODES,
    faults=FAULTS,
    median_s=st.sampled_from([0.001, 0.05, 1.0, 20.0]),
    seed=st.integers(0, 10**6),
)
def test_every_result_comes_exactly_once_whatever_dies(
    number: int, nodes: list[Node], faults: Faults, median_s: float, seed: int
) -> None:
    pool = cluster(Node(slots=2), *nodes, seconds=lengths(seed, median_s), faults=faults, seed=seed)
    limits = Limits(tries=10, grace_s=30.0, first_grace_s=120.0, patience_s=100.0)
    found = list(Schedule(pool, limits).run(items(number)))
    assert sorted(found) == everything(number)
    assert set(pool.runs) == set(range(number))


@settings(max_examples=100, deadline=None)
@given(
    number=st.integers(1, 80),
    faults=FAULTS,
    raises=st.floats(0, 0.05),
    always=st.lists(st.sampled_from(["kills", "poison", "stuck", "starving"]), min_size=80),
    share=st.floats(0, 0.3),
    seed=st.integers(0, 10**6),
)
@pytest.mark.filterwarnings("ignore::mpq.core.errors.MpqWarning")
def test_all_that_can_finish_does_before_the_error(
    number: int, faults: Faults, raises: float, always: list[str], share: float, seed: int
) -> None:
    bad = {i for i in range(number) if random.Random(seed + i).random() < share}
    kinds = {
        kind: frozenset(i for i in bad if always[i] == kind)
        for kind in ("kills", "poison", "stuck", "starving")
    }
    faults = Faults(dies=faults.dies, slow=faults.slow, hangs=faults.hangs, raises=raises, **kinds)
    pool = cluster(Node(slots=4), seconds=lengths(seed), faults=faults, seed=seed)
    limits = Limits(tries=10, grace_s=30.0, first_grace_s=120.0)
    found, error = until_error(Schedule(pool, limits), number)
    good = [result for result in everything(number) if result[0] not in bad]
    if found or not bad:  # where nothing ever finishes the rest is not tried
        assert sorted(found) == good
    assert (error is None) == (not bad)
    assert max(pool.runs.values()) <= 12  # no endless retry


@pytest.mark.parametrize("number", [1, 7, 300])
def test_results_do_not_depend_on_the_number_of_workers_or_their_luck(number: int) -> None:
    orders = set()
    for slots in (1, 2, 7):
        for seed in range(5):
            pool = cluster(
                Node(slots=slots), seconds=lengths(seed), faults=Faults(dies=0.05), seed=seed
            )
            found = list(Schedule(pool, QUICK).run(items(number)))
            orders.add(tuple(position for position, _ in found))
            assert dict(found) == dict(everything(number))
    assert number == 1 or len(orders) > 1


def test_the_same_seed_is_the_same_run() -> None:
    def once() -> tuple[Any, float]:
        pool = cluster(Node(slots=5), faults=Faults(dies=0.1), seconds=lengths(3), seed=4)
        return list(Schedule(pool, QUICK).run(items(50))), pool.clock

    assert once() == once()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("kills", "the worker process died 3 times on task 5: signal 9"),
        ("poison", "task 5 failed: ValueError: no"),
        ("stuck", "task 5 hangs, it was tried 3 times: no answer in"),
    ],
)
def test_a_task_that_fails_on_every_try_ends_the_run_after_the_others(kind: str, says: str) -> None:
    pool = cluster(Node(slots=3), faults=Faults(**{kind: frozenset([5])}))
    found, error = until_error(Schedule(pool, QUICK), 40)
    assert sorted(found) == [result for result in everything(40) if result[0] != 5]
    assert isinstance(error, RunFailedError)
    assert str(error).startswith(says)
    # 5 may have been in one batch with others, which blames nobody
    assert 3 <= pool.runs[5] <= 4


def test_several_failed_tasks_are_told_in_one_line() -> None:
    pool = cluster(Node(slots=3), faults=Faults(poison=frozenset([2, 9, 30])))
    found, error = until_error(Schedule(pool, QUICK), 40)
    assert len(found) == 37
    assert str(error) == "task 2 failed: ValueError: no; 2 more tasks failed: task 9, task 30"


def test_where_nothing_ever_finishes_the_rest_is_not_tried() -> None:
    pool = cluster(Node(slots=3), faults=Faults(poison=frozenset(range(10_000))))
    found, error = until_error(Schedule(pool, QUICK), 10_000)
    assert (found, type(error)) == ([], RunFailedError)
    assert pool.clock < 10_100
    few = cluster(Node(slots=3), faults=Faults(kills=frozenset(range(10_000))))
    until_error(Schedule(few, QUICK), 10_000)
    assert sum(few.runs.values()) < 100


def test_an_error_of_what_was_given_ends_the_run_at_once() -> None:
    class Refusing(SimulatedCluster):
        def _answer(self, process: int, outcomes: tuple[Outcome, ...]) -> Finished:
            error = InvalidInputError("batch", "batch 3 does not fit")
            refused = tuple(
                Outcome(position=o.position, seconds=o.seconds, error=error)
                if o.position == 3
                else o
                for o in outcomes
            )
            super()._answer(process, outcomes)
            return Finished(process, refused)

    pool = Refusing(lambda position: 1.0, [Node(slots=1)])
    found, error = until_error(Schedule(pool, QUICK), 100)
    assert (str(error), type(error)) == ("batch 3 does not fit", InvalidInputError)
    assert {0, 1, 2} <= {position for position, _ in found}
    assert len(found) < 10


def test_a_hanging_process_is_ended_and_its_task_done_elsewhere() -> None:
    class HangsOnce(SimulatedCluster):
        def submit(self, process: int, work: Any) -> None:
            if any(position == 4 for position, _ in work) and not self.runs[4]:
                self.runs[4] += 1
                return
            super().submit(process, work)

    pool = HangsOnce(lambda position: 1.0, [Node(slots=2)])
    assert sorted(Schedule(pool, QUICK).run(items(20))) == everything(20)
    assert pool.runs[4] == 2
    assert 30 < pool.clock < 60


def test_a_long_task_among_short_ones_is_no_hang() -> None:
    pool = cluster(Node(slots=2), seconds=lambda i: 100.0 if i == 7 else 0.1)
    assert sorted(Schedule(pool, QUICK).run(items(50))) == everything(50)
    assert pool.runs[7] == 3  # ended after 30 and 60 s, finished within 120 s


def test_a_caller_that_takes_its_time_over_a_result_makes_no_hang() -> None:
    pool = cluster(Node(slots=3), seconds=lengths(5))
    found = []
    for number, result in enumerate(Schedule(pool, QUICK).run(items(30))):
        found.append(result)
        if number % 10 == 5:  # meanwhile the others answer
            pool.clock += 1000.0
    assert sorted(found) == everything(30)
    assert set(pool.runs.values()) == {1}


def test_a_hanging_setup_is_ended() -> None:
    pool = cluster(Node(slots=1), setup_s=10_000.0)
    found, error = until_error(Schedule(pool, QUICK), 3)
    assert not found
    assert "setting up gave no answer" in str(error)


def test_processes_that_join_late_are_used_and_those_that_go_are_survived() -> None:
    alone = cluster(Node(slots=2))
    assert len(list(Schedule(alone, QUICK).run(items(400)))) == 400
    joined = cluster(Node(slots=2), Node(slots=6, joins_s=30.0))
    assert sorted(Schedule(joined, QUICK).run(items(400))) == everything(400)
    assert joined.most_alive == 8
    assert joined.clock < 90 < 190 < alone.clock
    spot = cluster(Node(slots=2, joins_s=60.0), Node(slots=6, leaves_s=30.5))
    assert sorted(Schedule(spot, QUICK).run(items(400))) == everything(400)
    assert spot.deaths >= 6


def test_a_cluster_that_is_full_for_long_is_an_error_and_a_short_time_is_not() -> None:
    late = cluster(Node(slots=1, joins_s=99.0))
    assert len(list(Schedule(late, QUICK).run(items(3)))) == 3
    never = cluster(Node(slots=1, joins_s=1e6))
    with pytest.raises(StorageError, match="no worker started in 100 s"):
        list(Schedule(never, QUICK).run(items(3)))
    assert never.clock < 200


def test_processes_that_are_only_slow_to_start_are_waited_for() -> None:
    class Slow(SimulatedCluster):
        def no_resources(self, patience_s: float) -> None:
            return None

    pool = Slow(lambda position: 1.0, [Node(slots=2)], start_s=110.0)
    assert len(list(Schedule(pool, QUICK).run(items(3)))) == 3


def test_a_setup_that_never_succeeds_ends_the_run_and_a_bad_node_does_not() -> None:
    pool = cluster(Node(slots=2), faults=Faults(broken=1.0))
    with pytest.raises(RunFailedError, match="setting up failed: no"):
        list(Schedule(pool, QUICK).run(items(30)))
    some = cluster(Node(slots=4), faults=Faults(broken=0.3), seed=2)
    assert sorted(Schedule(some, QUICK).run(items(100))) == everything(100)


def test_a_broken_process_does_not_swallow_tasks() -> None:
    class BlackHole(SimulatedCluster):
        """Process 0 fails every task within a millisecond."""

        def submit(self, process: int, work: Any) -> None:
            if process:
                super().submit(process, work)
                return
            for position, _ in work:
                self.runs[position] += 1
            error = RunFailedError("task_failed", "CUDA error")
            outcomes = tuple(Outcome(position=p, seconds=1e-3, error=error) for p, _ in work)
            self._at(self.clock + 1e-3, lambda: Finished(process, outcomes))

    pool = BlackHole(lambda position: 1.0, [Node(slots=2)])
    assert sorted(Schedule(pool, QUICK).run(items(60))) == everything(60)


def test_a_task_that_needs_all_memory_runs_again_alone() -> None:
    pool = cluster(Node(slots=4), faults=Faults(hungry=frozenset([3, 8])))
    with pytest.warns(MpqWarning, match=r"task [38] ran out of memory .*: it runs again"):
        found = list(Schedule(pool, QUICK).run(items(40)))
    assert sorted(found) == everything(40)
    assert {position for position, _ in found[-2:]} == {3, 8}


@pytest.mark.filterwarnings("ignore::mpq.core.errors.MpqWarning")
def test_a_task_that_is_too_large_even_alone_is_told() -> None:
    pool = cluster(Node(slots=4), faults=Faults(starving=frozenset([3])))
    found, error = until_error(Schedule(pool, QUICK), 40)
    assert len(found) == 39
    assert "task 3 ran out of memory with as little as it can do at once and nothing" in str(error)


@dataclass(frozen=True)
class Batch:
    """An item with a name, which can be done in portions."""

    label: str
    samples: int

    def within(self, samples: int) -> Batch:
        return replace(self, samples=samples)


def batches(number: int, samples: int = 8) -> list[Batch]:
    return [Batch(f"kl of batch {i}", samples) for i in range(number)]


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize(("fits", "most"), [(1, 1), (3, 2), (5, 4)])
def test_a_task_that_runs_out_of_memory_is_halved_and_those_that_follow_too(
    slots: int, fits: int, most: int
) -> None:
    pool = cluster(Node(slots=slots), faults=Faults(most_samples=fits))
    with pytest.warns(MpqWarning, match=r"kl of batch \d+ ran out of memory: it and what follows"):
        found = dict(Schedule(pool, QUICK).run(batches(40)))
    assert {position: item for position, (_, item) in found.items()} == {
        i: Batch(f"kl of batch {i}", most) for i in range(40)
    }
    halvings = round(math.log2(8 / most))
    assert sum(pool.runs.values()) <= 40 + slots * halvings


@pytest.mark.filterwarnings("ignore::mpq.core.errors.MpqWarning")
def test_what_fits_is_remembered_for_the_next_run() -> None:
    pool = cluster(Node(slots=2), faults=Faults(most_samples=2))
    schedule = Schedule(pool, QUICK)
    list(schedule.run(batches(10)))
    before = sum(pool.runs.values())
    list(schedule.run(batches(10)))
    assert sum(pool.runs.values()) == before + 10


@pytest.mark.filterwarnings("ignore::mpq.core.errors.MpqWarning")
def test_one_sample_that_does_not_fit_is_told_and_holds_no_other_to_it() -> None:
    pool = cluster(Node(slots=1), faults=Faults(starving=frozenset([3])))
    schedule = Schedule(pool, QUICK)
    found: list[tuple[int, Any]] = []
    with pytest.raises(RunFailedError, match=r"^kl of batch 3 ran out of memory with as little"):  # noqa: PT012
        for result in schedule.run(batches(10)):
            found.append(result)  # noqa: PERF402 - what came before an error counts
    assert sorted(position for position, _ in found) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert dict(schedule.run(batches(2)))[0][1].samples == 8


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("kills", "the worker process died 3 times on kl of batch 5: signal 9"),
        ("poison", "kl of batch 5 failed: ValueError: no"),
        ("stuck", "kl of batch 5 hangs, it was tried 3 times"),
    ],
)
def test_errors_call_a_task_by_its_label(kind: str, says: str) -> None:
    pool = cluster(Node(slots=3), faults=Faults(**{kind: frozenset([5])}))
    with pytest.raises(RunFailedError) as caught:
        list(Schedule(pool, QUICK).run(batches(10)))
    assert str(caught.value).startswith(says)


def test_tiny_tasks_are_sent_together_and_long_ones_alone() -> None:
    def times_sent(seconds: float) -> int:
        sent = []

        class Counting(SimulatedCluster):
            def submit(self, process: int, work: Any) -> None:
                sent.append(len(work))
                super().submit(process, work)

        pool = Counting(lambda position: seconds, [Node(slots=4)])
        assert len(list(Schedule(pool, QUICK).run(items(4000)))) == 4000
        return len(sent)

    assert times_sent(0.001) < 100
    assert times_sent(2.0) == 4000


def test_tiny_tasks_still_occupy_every_process() -> None:
    pool = cluster(Node(slots=4), seconds=lambda position: 0.01)
    schedule = Schedule(pool, QUICK)
    list(schedule.run(items(4)))
    ready = pool.clock
    list(schedule.run(items(4000)))
    assert pool.clock - ready < 1.15 * 4000 * 0.01 / 4


def test_processes_stay_for_the_next_run_and_end_with_close() -> None:
    pool = cluster(Node(slots=3))
    schedule = Schedule(pool, QUICK)
    for _ in range(3):
        assert len(list(schedule.run(items(30)))) == 30
    assert len(pool._processes) == 3
    schedule.close()
    assert pool.capacity() == len(pool._free) == 3


def test_a_run_left_midway_ends_what_is_at_work() -> None:
    pool = cluster(Node(slots=3), seconds=lengths(1))
    schedule = Schedule(pool, QUICK)
    left = schedule.run(items(50))
    first = next(left)
    left.close()  # type: ignore[attr-defined]
    assert first in everything(50)
    assert sorted(schedule.run(items(20))) == everything(20)


def test_machines_are_asked_for_as_far_as_there_is_work_for_them() -> None:
    pool = cluster(Node(slots=1), Node(slots=9, joins_s=200.0), seconds=lambda position: 30.0)
    assert len(list(Schedule(pool, QUICK).run(items(100)))) == 100
    first, second, *_, last = pool.wanted
    assert first == 1  # before it is known what a task takes
    assert 45 <= second <= 50  # 99 tasks of 30 s: 49 workers find a minute of work each
    assert pool.wanted[1:] == sorted(pool.wanted[1:], reverse=True)
    assert last == 0
    tiny = cluster(Node(slots=2), seconds=lambda position: 0.01)
    assert len(list(Schedule(tiny, QUICK).run(items(1000)))) == 1000
    assert set(tiny.wanted) == {1, 0}
    few = cluster(Node(slots=2), seconds=lambda position: 1000.0)
    list(Schedule(few, Limits(grace_s=5000.0)).run(items(3)))
    assert max(few.wanted) <= 3


@pytest.mark.parametrize("how", ["left midway", "a task fails", "nothing starts"])
def test_what_was_asked_for_is_taken_back_however_a_run_ends(how: str) -> None:
    node = Node(slots=2, joins_s=1e6 if how == "nothing starts" else 0.0)
    poison = frozenset(range(50)) if how == "a task fails" else frozenset()
    pool = cluster(node, seconds=lambda position: 30.0, faults=Faults(poison=poison))
    running = Schedule(pool, QUICK).run(items(50))
    if how == "left midway":
        next(running)
        next(running)
        running.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises((RunFailedError, StorageError)):
            list(running)
    assert len(pool.wanted) > 1
    assert pool.wanted[-1] == 0


def test_many_workers_and_failures_lose_nothing() -> None:
    pool = cluster(
        *[Node(slots=8, joins_s=number % 20) for number in range(25)],
        Node(slots=50, leaves_s=100.0),
        seconds=lengths(0, 5.0),
        faults=Faults(dies=0.02, slow=0.01),
    )
    before = time.process_time()
    found = Counter(position for position, _ in Schedule(pool, Limits()).run(range(20_000)))
    assert len(found) == 20_000
    assert set(found.values()) == {1}
    assert (time.process_time() - before) / 20_000 < 0.002
