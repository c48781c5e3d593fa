"""What there is to know of a job before anything is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitChoices:
    """A unit with the schemes that it may take."""

    unit: str
    layers: tuple[str, ...]
    weights: int
    schemes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformTotals:
    """What one scheme everywhere costs, in the units of `DryRun.costs`.

    `bits` are the mean of the searched weights with all that is stored; `breaks` are the budgets
    that it does not meet.
    """

    scheme: str
    bits: float
    totals: Mapping[str, float]
    breaks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRange:
    """What allocations cost at least and at most, and the network as it is (0: not known)."""

    label: str
    unit: str
    least: float
    most: float
    baseline: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetFound:
    """A budget with its limit in the unit of its cost, None where that is not known yet."""

    text: str
    cost: str
    limit: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """A job whose network was traced; nothing was scored or timed.

    `cells` are what will be scored, on `samples` calibration samples in `batches`. `infeasible`
    tells which budgets cannot be met together, "" where they can as far as is known; `untimed`
    counts kernels that the run times first. With `of_kernels` measured times are sums of kernels,
    without the rest of the network. `left_out` tells what is not searched or offered.
    """

    layers: int
    searched_layers: int
    searched_weights: int
    native_bytes: int
    cells: int
    batches: int
    samples: int
    units: tuple[UnitChoices, ...]
    costs: Mapping[str, CostRange]
    uniforms: tuple[UniformTotals, ...]
    budgets: tuple[BudgetFound, ...]
    infeasible: str
    untimed: int
    of_kernels: bool
    device: str
    left_out: tuple[str, ...]
