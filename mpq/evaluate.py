"""What an allocation really does to the network's outputs, metrics and bytes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from mpq.core.evaluation import Evaluation
from mpq.core.problem import Allocation
from mpq.nn.batches import call, checked_call, position_mask
from mpq.nn.patch import evaluating
from mpq.nn.shipping import ShippedWorkload
from mpq.nn.workload import Workload

Split = str  # "calibration" | "held_out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An allocation to measure on one split; an empty one is the network as it is."""

    name: str
    split: Split
    allocation: Allocation
    with_metrics: bool = False
    predicted: float | None = None


@dataclass(slots=True)
class Bench:
    """A workload set up for measuring: original outputs are computed once per split."""

    workload: Workload
    _references: dict[Split, list[torch.Tensor]] = field(default_factory=dict)

    def batches(self, split: Split) -> tuple[object, ...]:
        """Return the batches of a split."""
        chosen = {"calibration": self.workload.calibration, "held_out": self.workload.held_out}
        return chosen[split]

    def references(self, split: Split) -> list[torch.Tensor]:
        """Return the original network's outputs, one per batch."""
        if split not in self._references:
            model = self.workload.model
            with evaluating(model), torch.no_grad():
                self._references[split] = [
                    checked_call(model, batch, f"{split} batch {number}")
                    for number, batch in enumerate(self.batches(split))
                ]
        return self._references[split]


def prepare(source: Workload | ShippedWorkload) -> Bench:
    """Set a worker up for scoring and measuring."""
    return Bench(source.unpack() if isinstance(source, ShippedWorkload) else source)


def measure(bench: Bench, candidate: Candidate) -> Evaluation:
    """Run a candidate over its split: one forward pass, plus the user's metrics if asked.

    The divergence is the mean over samples; its standard error is over samples.
    """
    started = time.perf_counter()
    workload = bench.workload
    references = bench.references(candidate.split)
    with (
        evaluating(workload.model),
        torch.no_grad(),
        workload.quantized_as(candidate.allocation) as model,
    ):
        per_sample = torch.cat(
            [
                workload.divergence.between(reference, output, position_mask(batch, output))
                for batch, reference in zip(bench.batches(candidate.split), references, strict=True)
                for output in [call(model, batch)]
            ]
        ).double()
        metrics = (
            {name: float(value) for name, value in workload.evaluate(model).items()}
            if candidate.with_metrics and workload.evaluate is not None
            else {}
        )
    spread = float(per_sample.std()) if len(per_sample) > 1 else 0.0
    return Evaluation(
        candidate=candidate.name,
        split=candidate.split,
        allocation=candidate.allocation,
        divergence=workload.divergence.kind,
        mean=float(per_sample.mean()),
        stderr=spread / len(per_sample) ** 0.5,
        predicted=candidate.predicted,
        metrics=metrics,
        seconds=time.perf_counter() - started,
    )
