"""What a result depends on is in its key: another one is worked out again, the same is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mpq.core.problem import Allocation
from mpq.evaluate import Candidate, measure
from mpq.nn.batches import Batch
from mpq.nn.fingerprint import batches_digest
from mpq.nn.workload import Workload
from mpq.progress import Silent
from mpq.quality_tables import quality_tables
from mpq.scoring import relinearise, score
from mpq.store.store import Store, open_store
from mpq.tasks import Workers
from tests.builders import mlp, schemes, workload
from workers import get_executor


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened


def squared(reference: torch.Tensor, changed: torch.Tensor, batch: Batch) -> torch.Tensor:
    return (changed - reference).double().square().sum(1)


def absolute(reference: torch.Tensor, changed: torch.Tensor, batch: Batch) -> torch.Tensor:
    return (changed - reference).double().abs().sum(1)


LEVEL = 1.0


def evaluate(model: object) -> dict[str, float]:
    return {"level": LEVEL}


def made(sizes: tuple[int, ...] = (3, 4, 5), **changes: object) -> Workload:
    """The last batches are the same whatever the first one's size is."""
    torch.manual_seed(0)
    model = mlp().eval()
    batches = tuple(
        torch.randn(size, 6, generator=torch.Generator().manual_seed(number))
        for number, size in enumerate(sizes)
    )
    given = {"key": "made", "batch_keys": batches_digest(batches), "qualities": {"q": squared}}
    return workload(model, batches, ("int2", "int4"), **(given | changes))


def allocation(load: Workload, scheme: str) -> Allocation:
    return Allocation(dict.fromkeys(load.cells.units, schemes(scheme)[0]))


Work = Callable[[Workers], object]


def scored(workers: Workers) -> object:
    return score(workers, "gauss_newton")


def around(scheme: str) -> Work:
    return lambda workers: relinearise(workers, allocation(workers.workload, scheme))


def measured(scheme: str) -> Work:
    def work(workers: Workers) -> object:
        chosen = allocation(workers.workload, scheme)
        candidate = Candidate(name="x", split="calibration", allocation=chosen, with_metrics=True)
        return measure(workers, [candidate])

    return work


def done(store: Store, load: Workload, work: Work) -> int:
    """Return how many tasks ran rather than came from the database."""
    ran = []
    executor = get_executor("serial")
    real = executor.map

    def counting(setup, fn, items):  # type: ignore[no-untyped-def]
        ran.extend(items)
        return real(setup, fn, items)

    executor.map = counting  # type: ignore[method-assign]
    work(Workers.of(load, executor, store, Silent()))
    return len(ran)


LATER = (1, 4, 5)  # the second and the third batch begin at other samples


@pytest.mark.parametrize(
    ("work", "changed_work", "changes", "again"),
    [
        (scored, scored, {"key": "other"}, 3),
        (scored, scored, {"seed": 1}, 3),
        (scored, scored, {"num_probes": 3}, 3),
        (scored, scored, {"sizes": LATER}, 3),
        (around("int2"), around("int4"), {}, 3),
        (around("int2"), around("int2"), {"key": "other"}, 3),
        (around("int2"), around("int2"), {"seed": 1}, 3),
        (around("int2"), around("int2"), {"sizes": LATER}, 3),
        (quality_tables, quality_tables, {"key": "other"}, 3),
        (quality_tables, quality_tables, {"qualities": {"q": absolute}}, 3),
        (quality_tables, quality_tables, {"qualities": {"other": squared}}, 3),
        (quality_tables, quality_tables, {"sizes": LATER}, 1),
        (measured("int2"), measured("int4"), {}, 4),
        (measured("int2"), measured("int2"), {"key": "other"}, 4),
        (measured("int2"), measured("int2"), {"qualities": {"q": absolute}}, 3),
        (measured("int2"), measured("int2"), {"sizes": LATER}, 1),
    ],
)
def test_what_changes_is_worked_out_again(
    store: Store, work: Work, changed_work: Work, changes: dict[str, object], again: int
) -> None:
    first, other = made(evaluate=evaluate), made(evaluate=evaluate, **changes)  # type: ignore[arg-type]
    assert done(store, first, work) >= 3
    assert done(store, replace(first), work) == 0
    assert done(store, other, changed_work) == again
    assert done(store, other, changed_work) == 0


def test_a_global_of_evaluate_that_changes_is_seen(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = made(evaluate=evaluate)
    assert done(store, load, measured("int2")) == 4
    assert done(store, load, measured("int2")) == 0
    monkeypatch.setitem(evaluate.__globals__, "LEVEL", 2.0)
    assert done(store, load, measured("int2")) == 1
