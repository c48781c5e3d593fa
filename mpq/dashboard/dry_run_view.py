"""What a dry run found, as people read it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from mpq.core.dry_run import DryRun, UnitChoices
from mpq.dashboard.plotted import amount

_SHOWN = 300  # units, and lines of what is left out


@dataclass(frozen=True, slots=True, kw_only=True)
class CostHead:
    """A cost with its range over all allocations, as texts."""

    name: str
    least: str
    most: str
    baseline: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformRow:
    """One scheme everywhere: texts of its totals in the order of the costs."""

    scheme: str
    bits: float
    texts: tuple[str, ...]
    shares: tuple[str, ...]
    breaks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRunView:
    """A dry run: `said` are its sentences, `units` the first ones with their choices."""

    found: DryRun
    said: tuple[str, ...]
    costs: tuple[CostHead, ...]
    uniforms: tuple[UniformRow, ...]
    budgets: tuple[tuple[str, str], ...]
    units: tuple[UnitChoices, ...]
    more_units: int
    left_out: tuple[str, ...]
    more_left_out: int


def dry_run_view(found: DryRun) -> DryRunView:
    """Return the texts of a dry run."""
    return DryRunView(
        found=found,
        said=tuple(_said(found)),
        costs=tuple(
            CostHead(
                name=cost.label,
                least=amount(cost.least, cost.unit),
                most=amount(cost.most, cost.unit),
                baseline=amount(cost.baseline, cost.unit) if cost.baseline else "–",
            )
            for cost in found.costs.values()
        ),
        uniforms=tuple(
            UniformRow(
                scheme=row.scheme,
                bits=row.bits,
                texts=tuple(amount(row.totals[n], c.unit) for n, c in found.costs.items()),
                shares=tuple(
                    f"{100 * row.totals[n] / c.baseline:.3g} %" if c.baseline else ""
                    for n, c in found.costs.items()
                ),
                breaks=row.breaks,
            )
            for row in found.uniforms
        ),
        budgets=tuple(
            (b.text, "not known yet" if b.limit is None else amount(b.limit, _unit(found, b.cost)))
            for b in found.budgets
        ),
        units=found.units[:_SHOWN],
        more_units=max(len(found.units) - _SHOWN, 0),
        left_out=found.left_out[:_SHOWN],
        more_left_out=max(len(found.left_out) - _SHOWN, 0),
    )


def _unit(found: DryRun, cost: str) -> str:
    return found.costs[cost].unit if cost in found.costs else "s"


def _said(found: DryRun) -> list[str]:
    counts = Counter(len(unit.schemes) for unit in found.units)
    choices = ", ".join(
        f"{units} with {n} scheme{'s' if n > 1 else ''}"
        for n, units in sorted(counts.items(), reverse=True)
    )
    power = sum(math.log10(len(unit.schemes)) for unit in found.units)
    told = [
        f"{found.searched_layers} of {found.layers} layers are searched, in {len(found.units)} "
        f"units: {choices} each. That is 10^{power:.0f} allocations of "
        f"{found.searched_weights:,} weights.",
        f"{found.cells} cells are scored on {found.samples} calibration samples in "
        f"{found.batches} {'batch' if found.batches == 1 else 'batches'}.",
    ]
    if found.infeasible:
        told.append(f"Nothing fits: {found.infeasible}.")
    elif any(b.limit is None for b in found.budgets):
        told.append("The budgets that are known can be met; those on measured times are not known.")
    elif found.budgets:
        told.append("The budgets can be met.")
    if found.of_kernels:
        told.append(
            "Measured times are sums of kernels that were timed before; the run adds what the rest "
            "of the network takes, so budgets on them move."
        )
    if found.untimed:
        told.append(
            f"{found.untimed} kernels have no time on {found.device} yet: the run times them first."
        )
    return told
