"""Runs: their life, how they are listed and found, and what is logged of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

import mpq
from mpq.core.errors import InvalidInputError, MpqError, RunFailedError, StorageError
from mpq.core.jobs import JobSpec, RunState
from mpq.core.latency import KernelCase, KernelLatency
from mpq.core.layers import LayerGraph
from mpq.store import Store, open_store
from tests.databases import sql

SPEC = JobSpec(
    name="vit",
    model="pkg.mod:net",
    calibration="pkg.mod:data",
    budgets=("memory <= 60%", "latency <= 3 ms"),
    schemes=("int8", "int4g64"),
    groups=(("a", "b"), ("c",)),
    pin={"head*": "int8"},
    num_workers=3,
)


@pytest.fixture
def store(address: str) -> Iterator[Store]:
    with open_store(address) as opened:
        yield opened


def named(store: Store, name: str) -> str:
    return store.create_run(dataclasses.replace(SPEC, name=name))


@pytest.mark.parametrize("groups", ["auto", "none", (), (("a", "b"), ("c",))])
def test_new_run_is_pending(store: Store, groups: object) -> None:
    spec = dataclasses.replace(SPEC, groups=groups)
    run = store.run(store.create_run(spec, device="a machine"))
    assert run.spec == spec
    assert (run.name, run.state, run.device) == ("vit", RunState.PENDING, "a machine")
    assert run.mpq_version == mpq.__version__
    assert run.created_at.tzinfo is UTC
    assert abs(datetime.now(UTC) - run.created_at) < timedelta(minutes=1)
    assert (run.started_at, run.ended_at, run.error_code, run.has_graph) == (None,) * 3 + (False,)
    assert len(run.id) == 12
    assert set(run.id) <= set("0123456789abcdef")


def test_life_of_a_run(store: Store) -> None:
    run_id = store.create_run(SPEC)
    store.set_state(run_id, RunState.RUNNING)
    started = store.run(run_id).started_at
    assert started is not None
    store.set_state(run_id, RunState.FAILED, RunFailedError("broken", "layer 'x': it broke"))
    failed = store.run(run_id)
    assert failed.state is RunState.FAILED
    assert (failed.error_code, failed.error_message) == ("broken", "layer 'x': it broke")
    assert failed.ended_at is not None
    assert failed.ended_at >= started
    store.set_state(run_id, RunState.RUNNING)
    resumed = store.run(run_id)
    assert (resumed.started_at, resumed.ended_at, resumed.error_code) == (started, None, None)
    store.set_state(run_id, RunState.SUCCEEDED)
    with pytest.raises(InvalidInputError, match="SUCCEEDED run cannot become RUNNING") as caught:
        store.set_state(run_id, RunState.RUNNING)
    assert caught.value.code == "run_state"
    assert store.run(run_id).state is RunState.SUCCEEDED


def test_runs_are_listed_newest_first(store: Store) -> None:
    ids = [named(store, f"run{i % 2}") for i in range(6)]
    store.set_state(ids[3], RunState.RUNNING)
    other = dataclasses.replace(SPEC, model="pkg:other", metric="hessian_trace")
    last = store.create_run(other)
    assert [run.id for run in store.runs()] == [last, *reversed(ids)]
    assert [run.id for run in store.runs(limit=2)] == [last, ids[5]]
    assert [run.id for run in store.runs(state=RunState.RUNNING)] == [ids[3]]
    assert [run.id for run in store.runs(name="run1")] == [ids[5], ids[3], ids[1]]
    assert [run.id for run in store.runs(state=RunState.PENDING, name="run1", limit=1)] == [ids[5]]
    assert [run.id for run in store.runs(model="pkg:other")] == [last]
    assert [run.id for run in store.runs(metric="hessian_trace")] == [last]
    assert len(store.runs(limit=None)) == 7
    assert store.runs(name="' OR 1=1 --") == []


def test_many_runs_need_a_limit(store: Store) -> None:
    for _ in range(55):
        store.create_run(SPEC)
    assert len(store.runs()) == 50


def test_run_is_found_by_id_start_name_and_latest(store: Store) -> None:
    first, second, third = named(store, "vit"), named(store, "vit"), named(store, "")
    assert store.resolve_run(first) == first
    assert store.resolve_run(first[:8]) == first
    assert store.resolve_run(first[:8].upper()) == first
    assert store.resolve_run("vit") == second
    assert store.resolve_run("latest") == third


def test_name_goes_before_the_start_of_an_id(store: Store) -> None:
    first = named(store, "vit")
    second = named(store, first[:4])
    assert store.resolve_run(first[:4]) == second
    assert store.resolve_run(first) == first


def test_start_of_several_ids_is_ambiguous(store: Store) -> None:
    ids = [store.create_run(SPEC) for _ in range(17)]  # two of them start alike
    digits = [run_id[0] for run_id in ids]
    shared = max(digits, key=digits.count)
    with pytest.raises(InvalidInputError, match="write more of its id") as caught:
        store.resolve_run(shared)
    assert caught.value.code == "ambiguous_run"


@pytest.mark.parametrize("text", ["", "%", "_", "nothing", "x' OR '1'='1"])
def test_unknown_run_is_one_line(store: Store, text: str) -> None:
    with pytest.raises(InvalidInputError, match="there are no runs yet"):
        store.resolve_run("latest")
    named(store, "resnet20")
    with pytest.raises(InvalidInputError) as caught:
        store.resolve_run(text)
    assert caught.value.code == "unknown_run"
    assert "Newest: resnet20" in str(caught.value)


def test_unknown_run_names_the_nearest(store: Store) -> None:
    named(store, "resnet20")
    with pytest.raises(InvalidInputError, match="unknown run 'resnet2O': did you mean 'resnet20'"):
        store.resolve_run("resnet2O")


def test_every_method_knows_an_unknown_run(store: Store) -> None:
    graph = LayerGraph(layers=(), units=(), unsearched=(), sample="")
    calls = [
        lambda: store.run("nope"),
        lambda: store.set_state("nope", RunState.RUNNING),
        lambda: store.put_graph("nope", graph),
        lambda: store.graph("nope"),
        lambda: store.sensitivity("nope"),
        lambda: store.costs("nope"),
        lambda: store.responses("nope"),
        lambda: store.problem("nope"),
        lambda: store.solutions("nope"),
        lambda: store.evaluations("nope"),
        lambda: store.log("nope", "kind", "message"),
        lambda: store.events("nope"),
    ]
    for call in calls:
        with pytest.raises(InvalidInputError) as caught:
            call()
        assert caught.value.code == "unknown_run"


def test_log_is_in_order_and_can_be_followed(store: Store) -> None:
    run_id, other = store.create_run(SPEC), store.create_run(SPEC)
    for i in range(3):
        store.log(run_id, "stage", f"step {i}\nwith <b>markup</b>")
        store.log(other, "stage", "elsewhere")
    events = store.events(run_id)
    assert [event.message[:6] for event in events] == ["step 0", "step 1", "step 2"]
    assert {event.kind for event in events} == {"stage"}
    assert events[0].at.tzinfo is UTC
    assert store.events(run_id, after=events[1].id) == events[2:]


def test_spec_that_could_not_be_read_back_is_refused(store: Store) -> None:
    for wrong in ({"divergence": "many"}, {"metric": None}, {"name": "lone \ud800 surrogate"}):
        with pytest.raises(InvalidInputError) as caught:
            store.create_run(dataclasses.replace(SPEC, **wrong))
        assert caught.value.code in ("record", "text")
        assert "\n" not in str(caught.value)
    assert store.runs() == []


@pytest.mark.parametrize("text", ["a\0b", "\0"])
def test_text_that_not_every_database_takes_is_refused(store: Store, text: str) -> None:
    run_id = store.create_run(SPEC)
    calls = [
        lambda: named(store, text),
        lambda: store.create_run(SPEC, device=text),
        lambda: store.log(run_id, text, "message"),
        lambda: store.log(run_id, "kind", text),
    ]
    for call in calls:
        with pytest.raises(InvalidInputError) as caught:
            call()
        assert caught.value.code == "text"
        assert "NUL" in str(caught.value)
    for look in (store.resolve_run, lambda name: store.runs(name=name)):
        with pytest.raises(InvalidInputError):
            look(text)
    assert len(store.runs()) == 1
    assert store.events(run_id) == []


def test_lists_in_a_spec_become_tuples(store: Store) -> None:
    run_id = store.create_run(dataclasses.replace(SPEC, budgets=["memory <= 60%"]))
    assert store.run(run_id).spec.budgets == ("memory <= 60%",)


def test_failed_transaction_leaves_nothing(store: Store) -> None:
    run_id = store.create_run(SPEC)
    with pytest.raises(StorageError, match=r"(?i)not.null"):
        store.log(run_id, "kind", None)  # type: ignore[arg-type]
    assert store.events(run_id) == []
    store.log(run_id, "kind", "still works")
    assert len(store.events(run_id)) == 1


def test_what_belongs_to_a_run_goes_with_it(store: Store, address: str) -> None:
    run_id = store.create_run(SPEC)
    store.log(run_id, "kind", "message")
    sql(address, "DELETE FROM runs")
    assert sql(address, "SELECT count(*) FROM events") == [(0,)]


def test_memory_database_works() -> None:
    with open_store("sqlite://") as store:
        assert store.runs(name="vit") == []
        named(store, "vit")
        assert len(store.runs()) == 1


def test_error_travels_with_its_code(store: Store) -> None:
    run_id = store.create_run(SPEC)
    store.set_state(run_id, RunState.FAILED, MpqError("some_code", "what happened"))
    assert store.run(run_id).error_code == "some_code"


def test_store_is_open_for_threads(store: Store) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def put(i: int) -> None:
        case = KernelCase("b", "k", f"{i % 10}")
        store.put_kernel_latency(
            KernelLatency(device="d", case=case, median_s=i, low_s=i, high_s=i, rounds=1)
        )
        assert len(store.kernel_latencies("d")) <= 10

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(put, range(60)))
    assert len(store.kernel_latencies("d")) == 10
