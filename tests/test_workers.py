"""The contract of executors, for each of them, and what is special about worker processes."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mpq.core.errors import (
    InfeasibleError,
    InvalidInputError,
    MpqError,
    RunFailedError,
    StorageError,
)
from mpq.core.protocols import Executor
from workers import EXECUTORS, get_executor

NAMES = sorted(EXECUTORS)
NOTHING = dict  # a setup; workers are kept while it stays the same object


@pytest.fixture(scope="module")
def _serial() -> Executor:
    return get_executor("serial")


@pytest.fixture(scope="module")
def _ray() -> Iterator[Executor]:
    """One executor, and the local Ray it starts, for the whole file: both are slow to start."""
    found = get_executor("ray", 2)
    yield found
    found.close()

    import ray

    ray.shutdown()


@pytest.fixture
def processes(_ray: Executor) -> Executor:
    return _ray


Fresh = Callable[[int], Executor]


@pytest.fixture
def fresh(_ray: Executor) -> Iterator[Fresh]:
    """Make executors beside one that holds no processor."""
    _ray.close()
    with ExitStack() as stack:

        def make(number: int) -> Executor:
            made = get_executor("ray", number)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture(params=["serial", pytest.param("ray", marks=pytest.mark.slow)])
def executor(request: pytest.FixtureRequest) -> Executor:
    return request.getfixturevalue(f"_{request.param}")


# Worker processes import none of the tests: everything they run is defined inside a function.


def square() -> Callable[[object, int], int]:
    return lambda state, item: item * item


def failing(error: Exception, at: int) -> Callable[[object, int], int]:
    def fn(state: object, item: int) -> int:
        if item == at:
            raise error
        return item

    return fn


def counting(folder: Path) -> Callable[[], int]:
    """Return a setup that leaves a file for each time it runs, and gives its process."""

    def setup() -> int:
        (folder / f"{os.getpid()}-{time.time_ns()}").touch()
        return os.getpid()

    return setup


def dying(folder: Path, times: int, items: range) -> Callable[[object, int], int]:
    """Return a task that ends its process the first `times` times for each of `items`."""

    def fn(state: object, item: int) -> int:
        tries = len(list(folder.glob(f"{item}-*")))
        if item in items and tries < times:
            (folder / f"{item}-{tries}").touch()
            os._exit(1)
        return item

    return fn


def test_every_result_comes_once_with_its_position(executor: Executor) -> None:
    found = list(executor.map(NOTHING, square(), range(10)))
    assert sorted(found) == [(i, i * i) for i in range(10)]


def test_items_may_come_from_a_generator(executor: Executor) -> None:
    found = dict(executor.map(NOTHING, square(), (i + 5 for i in range(3))))
    assert found == {0: 25, 1: 36, 2: 49}


def test_without_items_nothing_is_set_up(executor: Executor, tmp_path: Path) -> None:
    assert list(executor.map(counting(tmp_path), square(), [])) == []
    assert list(tmp_path.iterdir()) == []


def test_setup_runs_once_in_each_worker(executor: Executor, tmp_path: Path) -> None:
    setup = counting(tmp_path)
    seen = [state for _, state in executor.map(setup, lambda state, item: state, range(8))]
    seen += [state for _, state in executor.map(setup, lambda state, item: state, range(8))]
    runs = sorted(path.name.split("-")[0] for path in tmp_path.iterdir())
    assert {str(process) for process in seen} <= set(runs)
    assert len(set(runs)) == len(runs) <= 2


def test_another_setup_makes_another_state(executor: Executor) -> None:
    states = [
        next(executor.map(setup, lambda state, item: state, [0]))
        for setup in (lambda: "first", lambda: "second")
    ]
    assert states == [(0, "first"), (0, "second")]


def test_an_mpq_error_in_a_task_is_raised_as_itself(executor: Executor) -> None:
    fn = failing(InvalidInputError("batch_mismatch", "batch 3 does not fit"), 3)
    with pytest.raises(InvalidInputError, match=r"^batch 3 does not fit$") as caught:
        list(executor.map(NOTHING, fn, range(6)))
    assert caught.value.code == "batch_mismatch"


def test_any_other_error_in_a_task_is_a_failed_run_in_one_line(executor: Executor) -> None:
    fn = failing(ValueError("no such\nthing"), 3)
    with pytest.raises(RunFailedError, match=r"^task 3 failed: ValueError: no such$") as caught:
        list(executor.map(NOTHING, fn, range(6)))
    assert caught.value.code == "task_failed"


def test_an_error_that_cannot_travel_is_still_told(executor: Executor) -> None:
    def fn(state: object, item: int) -> None:
        class TwoArgumentsError(Exception):
            def __init__(self, one: str, two: str) -> None:
                super().__init__(one)

        raise TwoArgumentsError("alone", "lost")

    with pytest.raises(RunFailedError, match="task 0 failed: TwoArgumentsError: alone"):
        list(executor.map(NOTHING, fn, [0]))


def test_an_error_in_setup_is_raised_as_itself(executor: Executor) -> None:
    def setup() -> None:
        raise InvalidInputError("model", "there is no model")

    with pytest.raises(InvalidInputError, match=r"^there is no model$"):
        list(executor.map(setup, square(), range(3)))


def test_any_other_error_in_setup_is_a_failed_run(executor: Executor) -> None:
    def setup() -> None:
        raise KeyError("weights")

    with pytest.raises(RunFailedError, match="setting up failed: KeyError: 'weights'"):
        list(executor.map(setup, square(), range(3)))


def test_results_before_an_error_stay_valid(executor: Executor) -> None:
    found = []
    with pytest.raises(MpqError):  # noqa: PT012
        for position, result in executor.map(NOTHING, failing(ValueError("x"), 6), range(7)):
            found.append((position, result))
    assert set(found) <= {(i, i) for i in range(6)}
    assert len(found) >= 4  # all but those that another worker was still at


def test_an_executor_works_on_after_an_error(executor: Executor) -> None:
    with pytest.raises(MpqError):
        list(executor.map(NOTHING, failing(ValueError("x"), 0), range(4)))
    assert len(list(executor.map(NOTHING, square(), range(4)))) == 4


def test_an_executor_works_on_after_it_was_left_midway(executor: Executor) -> None:
    results = executor.map(NOTHING, square(), range(50))
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert len(list(executor.map(NOTHING, square(), range(4)))) == 4


def test_an_executor_works_on_after_close(executor: Executor) -> None:
    executor.close()
    executor.close()
    assert list(executor.map(NOTHING, square(), [3])) == [(0, 9)]


KINDS = [MpqError, InfeasibleError, InvalidInputError, RunFailedError, StorageError]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_travel_between_processes(kind: type[MpqError]) -> None:
    arrived = pickle.loads(pickle.dumps(kind("slug", "what happened")))
    assert (type(arrived), arrived.code, str(arrived)) == (kind, "slug", "what happened")


def test_an_unknown_executor_gets_the_nearest_one() -> None:
    with pytest.raises(InvalidInputError, match="unknown executor 'serail': did you mean 'serial'"):
        get_executor("serail")


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("name", NAMES)
def test_at_least_one_worker_runs(name: str, number: int) -> None:
    with pytest.raises(InvalidInputError, match=f"at least one worker runs, got {number}"):
        get_executor(name, number)


def test_the_contract_covers_every_executor() -> None:
    assert NAMES == ["ray", "serial"]


def test_serial_runs_in_this_process_and_in_order() -> None:
    serial = get_executor("serial")
    found = list(serial.map(os.getpid, lambda state, item: state, range(3)))
    assert found == [(i, os.getpid()) for i in range(3)]


@pytest.mark.slow
def test_worker_processes_are_others(processes: Executor) -> None:
    found = dict(processes.map(NOTHING, lambda state, item: os.getpid(), range(4)))
    assert os.getpid() not in found.values()


@pytest.mark.slow
def test_warm_workers_have_imported_and_are_the_first_to_work(fresh: Fresh) -> None:
    executor = fresh(2)
    executor.warm(["colorsys"])

    def fn(state: object, item: int) -> tuple[int, bool]:
        import sys
        import time

        time.sleep(0.2)
        return os.getpid(), "colorsys" in sys.modules

    found = dict(executor.map(NOTHING, fn, range(20))).values()
    assert all(imported for _, imported in found)
    assert len({process for process, _ in found}) <= 2


@pytest.mark.slow
def test_a_warm_worker_that_cannot_import_is_replaced(fresh: Fresh) -> None:
    executor = fresh(2)
    executor.warm(["no_such_module"])
    assert list(executor.map(NOTHING, square(), [3])) == [(0, 9)]


@pytest.mark.slow
def test_more_workers_than_processors_do_not_wait_for_ever(fresh: Fresh) -> None:
    assert len(list(fresh(64).map(NOTHING, square(), range(4)))) == 4


@pytest.mark.slow
def test_workers_that_cannot_start_leave_their_tasks_to_others(
    fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.ray_executor._PATIENCE_S", 10.0)
    holding, late = fresh(1), fresh(2)
    assert list(holding.map(NOTHING, square(), [1])) == [(0, 1)]
    assert len(list(late.map(NOTHING, square(), range(6)))) == 6


@pytest.mark.slow
def test_without_a_free_processor_the_error_tells_so(
    fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.ray_executor._PATIENCE_S", 2.0)
    assert len(list(fresh(2).map(NOTHING, square(), range(8)))) == 8
    with pytest.raises(
        StorageError, match="no worker started in 2 s: each takes one CPU"
    ) as caught:
        list(fresh(1).map(NOTHING, square(), [1]))
    assert caught.value.code == "no_resources"


@pytest.mark.slow
def test_arrays_of_a_setup_are_shared_not_copied(processes: Executor) -> None:
    array = np.zeros(1_000_000)
    setup = partial(lambda given: given, array)
    writable = [w for _, w in processes.map(setup, lambda a, _: a.flags.writeable, range(2))]
    assert writable == [False, False]


@pytest.mark.slow
def test_a_task_whose_worker_dies_runs_again(processes: Executor, tmp_path: Path) -> None:
    fn = dying(tmp_path, 1, range(2, 3))
    assert sorted(processes.map(NOTHING, fn, range(5))) == [(i, i) for i in range(5)]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_many_dead_workers_do_not_end_a_run(processes: Executor, tmp_path: Path) -> None:
    fn = dying(tmp_path, 1, range(0, 24, 3))
    assert sorted(processes.map(NOTHING, fn, range(24))) == [(i, i) for i in range(24)]
    assert len(list(tmp_path.iterdir())) == 8


@pytest.mark.slow
def test_a_task_that_always_kills_its_worker_ends_the_run(
    processes: Executor, tmp_path: Path
) -> None:
    fn = dying(tmp_path, 100, range(1, 2))
    with pytest.raises(RunFailedError, match="died 3 times on task 1") as caught:
        list(processes.map(NOTHING, fn, range(2)))
    assert len(list(tmp_path.iterdir())) == 3
    assert "\n" not in str(caught.value)
