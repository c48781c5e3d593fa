"""Where memory is short a batch is done in portions, and the answers are the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mpq
from mpq.core.errors import InvalidInputError, MpqWarning, RunFailedError
from mpq.core.memory import ran_out_of_memory
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
from tests.builders import schemes, workload
from workers import get_executor

ROOT = Path(mpq.__file__).parents[1]


class Small(nn.Module):
    """A network that has memory for so many samples."""

    def __init__(self, most: float = float("inf")) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.most, self.seen = most, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            raise MemoryError
        self.seen = max(self.seen, len(x))
        return self.head(self.inner(x).tanh())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened


def squared(reference: torch.Tensor, changed: torch.Tensor, batch: Batch) -> torch.Tensor:
    return (changed - reference).double().square().sum(1)


def load(most: float, samples: int = 8) -> Workload:
    generator = torch.Generator().manual_seed(1)
    batches = tuple(torch.randn(samples, 6, generator=generator) for _ in range(3))
    loaded = workload(
        Small().eval(),
        batches,
        ("int2", "int4"),
        key=f"most {most}",
        batch_keys=batches_digest(batches),
        qualities={"q": squared},
    )
    loaded.model.most, loaded.model.seen = most, 0
    return loaded


def workers(loaded: Workload, store: Store) -> Workers:
    return Workers.of(loaded, get_executor("serial"), store, Silent())


def everything(loaded: Workload, store: Store, metric: str) -> dict[str, np.ndarray]:
    ready = workers(loaded, store)
    base = Allocation(dict.fromkeys(loaded.cells.units, schemes("int4")[0]))
    scored = score(ready, metric).sensitivity
    whole = Candidate(name="int4", split="calibration", allocation=base)
    part = Candidate(name="int4", split="calibration", allocation=base, share=0.5)
    found = [evaluation.per_sample for evaluation in measure(ready, [whole, part])]
    assert all(per_sample is not None for per_sample in found)
    return {
        "values": scored.values,
        "stderr": scored.stderr,
        "vectors": relinearise(ready, base).vectors,
        "quality": quality_tables(ready)["q"].values,
        "whole": np.asarray(found[0]),
        "part": np.asarray(found[1]),
    }


@pytest.mark.parametrize("metric", ["gauss_newton", "kl", "taylor", "hessian_trace"])
@pytest.mark.parametrize(("most", "kept"), [(1, 1), (3, 2), (4, 4), (7, 4)])
def test_the_answers_do_not_depend_on_the_halving(
    store: Store, metric: str, most: int, kept: int
) -> None:
    plenty = everything(load(8), store, metric)
    short = load(most)
    with pytest.warns(MpqWarning, match=r"ran out of memory: it and what follows take"):
        found = everything(short, store, metric)
    assert short.model.seen == kept
    for name, values in plenty.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-7, err_msg=name)


def test_the_warning_names_the_metric_and_the_batch(store: Store) -> None:
    with pytest.warns(MpqWarning) as told:
        score(workers(load(4), store), "kl")
    assert [str(warning.message) for warning in told] == [
        "kl of calibration batch 0 ran out of memory: it and what follows take 4 samples at a time"
    ]


@pytest.mark.filterwarnings("ignore::mpq.core.errors.MpqWarning")
def test_one_sample_that_does_not_fit_ends_the_run_in_one_line(store: Store) -> None:
    with pytest.raises(RunFailedError, match=r"^kl of calibration batch 0 ran out of mem") as told:
        score(workers(load(0), store), "kl")
    assert told.value.code == "out_of_memory"
    assert "\n" not in str(told.value)


def mean_square(output: torch.Tensor, batch: Batch) -> torch.Tensor:
    return output.square().mean()


def test_a_loss_of_whole_batches_is_never_asked_of_a_portion(store: Store) -> None:
    loaded = replace(load(4), loss=mean_square)
    with pytest.raises(RunFailedError, match=r"^hessian_trace of unit '\w+' ran out of memory"):
        score(workers(loaded, store), "hessian_trace")
    assert loaded.model.seen == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_want_of_memory_is_known_whoever_tells_of_it(error: Exception) -> None:
    wrapped = InvalidInputError("batch_mismatch", "the model cannot run batch 3")
    wrapped.__cause__ = error
    assert ran_out_of_memory(error)
    assert ran_out_of_memory(wrapped)
    assert not ran_out_of_memory(ValueError("can't allocate memory"))
    assert not ran_out_of_memory(RuntimeError("shapes do not match"))


REAL = """
import resource, warnings
import numpy as np, torch
from torch import nn
from mpq.core.problem import Allocation
from mpq.evaluate import Candidate, measure
from mpq.nn.fingerprint import batches_digest
from mpq.progress import Silent
from mpq.scoring import score
from mpq.store.store import open_store
from mpq.tasks import Workers
from tests.builders import schemes, workload
from workers import get_executor

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 4096), nn.ReLU(), nn.Linear(4096, 2)).eval()
batches = [torch.randn(64, 512, 16) for _ in range(2)]  # 0.5 GB behind the first layer
few = workload(model, [b[:2] for b in batches], ("int4",), key="few", batch_keys=("a", "b"))
keys = batches_digest(tuple(batches))
all_of_them = workload(model, batches, ("int4",), key="all", batch_keys=keys)

def found(loaded):
    workers = Workers.of(loaded, get_executor("serial"), open_store("sqlite://"), Silent())
    chosen = Allocation(dict.fromkeys(loaded.cells.units, schemes("int4")[0]))
    scores = score(workers, "kl").sensitivity
    candidate = Candidate(name="x", split="calibration", allocation=chosen)
    return scores.values, measure(workers, [candidate])[0].per_sample

found(few)
with open("/proc/self/statm") as f:
    used = int(f.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000, resource.RLIM_INFINITY))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    values, per_sample = found(all_of_them)
assert any("ran out of memory" in str(w.message) for w in told), told
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
expected, whole = found(all_of_them)
np.testing.assert_allclose(values, expected, rtol=1e-4)
np.testing.assert_allclose(per_sample, whole, rtol=1e-3, atol=1e-9)
print("done", str(told[-1].message))
"""


@pytest.mark.slow
def test_a_process_with_little_memory_scores_and_measures_the_same() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", REAL],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.startswith("done")
