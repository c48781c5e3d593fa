"""The whole plug-in surface: what a metric, a cost model, a solver, an executor, an exporter are.

`Workload` (mpq.nn.workload) is the borrowed model with its calibration data and choices; it is
opaque here because the core knows nothing of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from mpq.core.chosen import Chosen
from mpq.core.formats import Scheme
from mpq.core.layers import Layer, LayerGraph, LayerName
from mpq.core.problem import Allocation, Problem, Solution
from mpq.core.tables import Cells, CostTable, Responses, SensitivityTable

Partial = Mapping[str, npt.NDArray[np.generic]]  # plain arrays, so that a database can keep them
State = TypeVar("State")
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Task:
    """An independent piece of scoring; `key` names everything its result depends on.

    Scoring may stop early, after all tasks of some `round`. `label` is what errors call it after
    the metric's name: "calibration batch 3". `samples` are those of a batch that it takes at once
    where `Workload.at_once` allows (None: it looks at no samples, or cannot take fewer).
    """

    key: str
    part: tuple[int, ...]
    round: int = 0
    label: str = ""
    samples: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a metric found: the table, and the responses where it has them."""

    sensitivity: SensitivityTable
    responses: Responses | None = None


class Metric(Protocol):
    """A sensitivity metric: one file under `sensitivity/`."""

    @property
    def name(self) -> str:
        """The name users choose it by."""

    def tasks(self, workload: Any) -> Sequence[Task]:
        """Split the work into independent, content-keyed, resumable tasks."""

    def run(self, workload: Any, task: Task) -> Partial:
        """Do one task; the model is only borrowed."""

    def combine(self, cells: Cells, partials: Sequence[Partial]) -> Scores:
        """Put the results of all tasks of the first rounds, in task order, together."""


class CostModel(Protocol):
    """What each cell costs: one file under `hw_cost_models/`."""

    @property
    def name(self) -> str:
        """The name budgets refer to."""

    def table(self, graph: LayerGraph, cells: Cells) -> CostTable:
        """Return the cost of every cell."""


class LatencyModel(CostModel, Protocol):
    """Times of a machine that need not be here: modelled, or given by the user."""

    @property
    def provenance(self) -> str:
        """What its tables are marked with."""

    def schemes(self, layer: Layer) -> Sequence[Scheme]:
        """Return what is worth trying for a layer."""

    def why_not(self, layer: Layer, scheme: Scheme) -> str:
        """Return why a layer has no time in a scheme, "" where it has one."""


class Solver(Protocol):
    """Chooses one cell per unit: one file under `solvers/`."""

    @property
    def name(self) -> str:
        """The name users choose it by."""

    def solve(self, problem: Problem) -> Solution:
        """Return a checked solution, or INFEASIBLE with its reason."""


class Measure(Protocol):
    """Really measured losses, for solvers that search by them."""

    def __call__(self, allocations: Sequence[Allocation], share: float = 1.0) -> Sequence[float]:
        """Return the loss of each allocation, lower is better, in order.

        It is measured on the same first `share` of the samples, 0 < share <= 1; NaN or infinite
        where an output is.
        """


class Exporter(Protocol):
    """A form of an allocation that another tool reads: one file under `mpq/export/`."""

    @property
    def name(self) -> str:
        """The name users choose it by."""

    @property
    def suffix(self) -> str:
        """How the name of its file ends: ".json"."""

    @property
    def fuses(self) -> bool:
        """Whether the target runs q/k/v and gate/up projections as one kernel."""

    @property
    def keeps_static(self) -> bool:
        """Whether its file says that activations of a linear layer have a static range."""

    @property
    def every_format(self) -> bool:
        """Whether its file names any format and rounding; otherwise integers alone, as stored."""

    def refusal(self, layer: Layer, scheme: Scheme) -> str:
        """Return which rule of the target a scheme breaks on a layer, "" where it runs it."""

    def stored_bytes(self, layer: Layer, scheme: Scheme) -> int | None:
        """Return the exact bytes of the weight in the target's file, None where it has none."""

    def text(self, chosen: Chosen) -> str:
        """Return the file; what is refused for a single layer has been refused before."""

    def read(self, text: str, graph: LayerGraph) -> Mapping[LayerName, Scheme]:
        """Return the schemes that a file gives to layers; inverse of `text`.

        A layer that is left as it is may be missing. Raises InvalidInputError for a file that is
        not one, names another network or holds a format that no scheme stands for.
        """


class Executor(Protocol):
    """Where independent tasks run: one file under `workers/`; knows nothing of quantization."""

    in_process: bool  # tasks run here: what they get need not travel
    gpu: bool  # each worker has one, which tasks are to use

    def map(
        self,
        setup: Callable[[], State],
        fn: Callable[[State, Item], Result],
        items: Iterable[Item],
    ) -> Iterator[tuple[int, Result]]:
        """Run `fn(state, item)` for each item, yielding (position, result) as each finishes.

        An item that has a `label` is called so in errors, any other "task" with its position; one
        that has `samples` and `within(samples)` is done in portions where memory is short.
        `setup` runs once in each worker and makes `state`; workers are kept for further calls
        with the same `setup` object. An MpqError in either ends the iteration as itself, any
        other exception as RunFailedError; results already yielded stay valid.
        """

    def run_exclusively(
        self, fn: Callable[[], Result], resources: Mapping[str, float] | None = None
    ) -> Result:
        """Return `fn()`, run on a node that has these resources, one such call at a time.

        Raises InvalidInputError where no node has them.
        """

    def warm(self, modules: Sequence[str], of: Executor | None = None) -> None:
        """Let the first workers start and import these modules before there is a task.

        `of` is an executor that is no longer needed, whose workers may do.
        """

    def close(self) -> None:
        """Let the workers go."""
