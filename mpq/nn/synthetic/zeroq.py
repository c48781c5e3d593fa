"""Distilled data: inputs that batch norms would have seen in training."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mpq.core.errors import InvalidInputError
from mpq.nn.batches import Batch
from mpq.nn.patch import evaluating, frozen
from mpq.nn.synthetic.inputs import FloatInput
from mpq.nn.synthetic.made import Made, batch_sizes
from mpq.nn.synthetic.statistics import NormStatistics

_RATE, _LEAST_RATE, _PATIENCE = 0.5, 1e-4, 100
_CONVERGED, _WAIT = 1e-3, 150  # no such relative gain in so many steps, some at a lower rate


def zeroq(
    model: nn.Module,
    sample: Batch | None,
    *,
    samples: int,
    batch: int,
    steps: int,
    per_sample: int,
    seed: int,
) -> Made:
    """Make inputs whose statistics at every batch norm are those that it tracks.

    From standard normal noise, Adam (rate 0.5, a tenth after each plateau of 100 steps, 1e-4 at
    least) minimises `NormStatistics` of each sample plus the same for the input itself, mean 0
    and std 1 (Cai et al., "ZeroQ", section 3.1; constants of its code). `per_sample` 0 takes the
    statistics of whole batches instead, so that samples may differ. At most `steps` steps a
    batch; one ends where 150 steps gained less than 0.1 %, our reading of converged. Inputs are
    unbounded floating point, as a normalised image is, in the dtype and shape of `sample`; any
    number of axes. Costs a forward and a backward pass a step.
    """
    statistics = NormStatistics(model, "zeroq", per_sample=bool(per_sample))
    given = FloatInput.of(model, sample, "zeroq")
    generator = torch.Generator().manual_seed(seed)
    made, first, last, taken = [], 0.0, 0.0, 0
    with evaluating(model, seed), frozen(model), statistics:
        for size in batch_sizes(samples, batch):
            values = given.noise(size, generator)
            found, losses = _distilled(statistics, given, values, steps)
            made.append(given.batch(found))
            first, last, taken = first + losses[0], last + min(losses), taken + len(losses) - 1
    told = f"batch norm distance {first / len(made):.3g} to {last / len(made):.3g} in {taken} steps"
    return Made(tuple(made), told)


def _distilled(
    statistics: NormStatistics, given: FloatInput, values: torch.Tensor, steps: int
) -> tuple[torch.Tensor, list[float]]:
    """Return the best values and the distance before each step, and of them."""
    values.requires_grad_(True)
    optimizer = torch.optim.Adam([values], lr=_RATE)
    schedule = ReduceLROnPlateau(optimizer, min_lr=_LEAST_RATE, patience=_PATIENCE)
    losses: list[float] = []
    best, found = float("inf"), values.detach().clone()
    mark, since = float("inf"), 0
    with torch.enable_grad():
        for step in range(steps + 1):
            distance = statistics.distance(given.batch(values), values)
            losses.append(float(distance.detach()))
            if losses[-1] < (1 - _CONVERGED) * mark:
                mark, since = losses[-1], step
            if losses[-1] < best:
                best, found = losses[-1], values.detach().clone()
            if step == steps or step - since >= _WAIT:
                break
            (values.grad,) = torch.autograd.grad(distance, [values])
            optimizer.step()
            schedule.step(losses[-1])
    if not torch.isfinite(found).all() or not best < float("inf"):
        raise InvalidInputError(
            "output_not_finite",
            "zeroq: activations at batch norms are not finite: check the weights of the network",
        )
    return found, losses
