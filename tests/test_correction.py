"""Latency tables that whole networks have corrected: the posterior, its error, its limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hw_cost_models.measured.correction import Parts, Run, corrected
from mpq.core.constraints import Constraint
from mpq.core.formats import parse_scheme
from mpq.core.joint import JointCosts
from mpq.core.tables import Cells, CostTable, Indices
from tests.oracles import slow_corrected_totals

SCHEMES = tuple(map(parse_scheme, ("fp32", "int8:int8", "int4g32")))
UNITS = 12
CELLS = Cells(units=tuple(f"u{i}" for i in range(UNITS)), schemes=(SCHEMES,) * UNITS)
CELLS_OF = list(CELLS)
NEIGHBOURS = [(3 * i + 1, 3 * i + 4) for i in range(UNITS - 1)]


def made(rng: np.random.Generator) -> tuple[CostTable, Parts]:
    """A table of units of three shapes, one kernel a scheme."""
    seconds = rng.uniform(5e-6, 50e-6, size=3)[np.arange(UNITS) % 3][:, None]
    seconds = (seconds * np.array([1.0, 0.5, 0.8])).ravel()
    kernel = np.tile(np.arange(3), UNITS)
    case = kernel + 3 * np.repeat(np.arange(UNITS) % 3, 3)
    table = CostTable.exact("latency", "s", CELLS, seconds, fixed=1e-4, baseline=5e-4)
    return table, Parts(cell=np.arange(len(CELLS)), seconds=seconds, kernel=kernel, case=case)


def choices(rng: np.random.Generator, count: int) -> list[Indices]:
    return [CELLS.offsets[:-1] + rng.integers(0, 3, UNITS) for _ in range(count)]


def total(table: CostTable, choice: Indices) -> float:
    return Constraint.at_most(table, 1.0).total(choice)


def test_runs_that_the_table_explains_change_nothing() -> None:
    rng = np.random.default_rng(0)
    table, parts = made(rng)
    runs = [Run(choice=c, seconds=total(table, c)) for c in choices(rng, 8)]
    found, error = corrected(table, parts, NEIGHBOURS, runs)
    assert found.values == pytest.approx(table.values, rel=1e-9)
    assert found.fixed == pytest.approx(table.fixed, rel=1e-9)
    assert error < 1e-9
    assert found.joint is not None
    assert np.abs(found.joint.values).max() < 1e-12


def test_totals_are_those_of_the_slow_posterior() -> None:
    rng = np.random.default_rng(1)
    table, parts = made(rng)
    drawn = choices(rng, 9)
    took = [total(table, c) * (1 + 0.1 * rng.normal()) for c in drawn]
    runs = [Run(choice=c, seconds=y, sd=0.02) for c, y in zip(drawn, took, strict=True)]
    found, error = corrected(table, parts, NEIGHBOURS, runs[:6])

    chosen = [set(c.tolist()) for c in drawn]
    rows = [[*table.values[c], y, y * 0.02] for c, y in zip(drawn, took, strict=True)]
    priors: list[tuple[list[float], float]] = [([table.baseline] * 9, 0.10)]
    for numbers, sd in ((parts.kernel, 0.15), (parts.case, 0.15), (parts.cell, 0.05)):
        for number in np.unique(numbers):
            same = [i for i in range(len(CELLS)) if numbers[i] == number]
            priors.append(([sum(table.values[i] for i in same if i in c) for c in chosen], sd))
    pairs = [
        [(table.values[i] + table.values[j]) / 2 * (i in c and j in c) for c in chosen]
        for i, j in NEIGHBOURS
    ]
    priors += [([sum(column) for column in zip(*pairs, strict=True)], 0.30)]
    priors += [(pair, 0.10) for pair in pairs]
    expected = slow_corrected_totals(table.fixed, rows, priors, list(range(6)))
    assert [total(found, c) for c in drawn] == pytest.approx(expected, rel=1e-9)
    left_out = [
        slow_corrected_totals(table.fixed, rows, priors, [i for i in range(6) if i != r])[r]
        / took[r]
        - 1
        for r in range(6)
    ]
    assert error == pytest.approx(np.sqrt(np.square(left_out).mean()), rel=1e-9)


def test_a_few_runs_find_what_the_sum_of_layers_gets_wrong() -> None:
    """Kernels slower by half, neighbours that save, and a rest twice as long; 1 % noise.

    The stated error is that of networks which were not seen, within what 10 runs can say of it.
    """
    ratios, before, after = [], [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        table, parts = made(rng)
        wrong = 1 + 0.15 * rng.normal(size=3)[parts.kernel] + 0.15 * rng.normal(size=9)[parts.case]
        pairs = {(CELLS_OF[i], CELLS_OF[j]): -0.3 * table.values[i] for i, j in NEIGHBOURS}
        truth = replace(
            table,
            values=table.values * np.maximum(wrong, 0.3),
            low=table.values * np.maximum(wrong, 0.3),
            high=table.values * np.maximum(wrong, 0.3),
            fixed=1.5e-4,
            joint=JointCosts.from_cells(CELLS, pairs),
        )
        runs = [
            Run(choice=c, seconds=total(truth, c) * (1 + 0.01 * rng.normal()), sd=0.01)
            for c in choices(rng, 10)
        ]
        found, error = corrected(table, parts, NEIGHBOURS, runs)
        new = choices(rng, 40)
        off = np.array([total(found, c) / total(truth, c) - 1 for c in new])
        was = np.array([total(table, c) / total(truth, c) - 1 for c in new])
        before.append(np.sqrt(np.square(was).mean()))
        after.append(np.sqrt(np.square(off).mean()))
        ratios.append(error / after[-1])
    assert np.mean(after) < 0.3 * np.mean(before)
    assert np.mean(after) < 0.04
    assert 0.7 < np.median(ratios) < 2.0


def test_limits_of_a_whole_network_are_of_the_stated_error() -> None:
    rng = np.random.default_rng(3)
    table, parts = made(rng)
    drawn = choices(rng, 8)
    runs = [Run(choice=c, seconds=total(table, c) * (1.2 + 0.05 * rng.normal())) for c in drawn]
    found, error = corrected(table, parts, NEIGHBOURS, runs)
    share = 1.96 * np.hypot(error, 0.0125)
    for c in choices(rng, 5):
        assert found.half_width(c) == pytest.approx(
            share * (found.values[c].sum() + found.fixed), rel=1e-6
        )


def test_a_rest_below_zero_becomes_a_part_of_every_unit() -> None:
    rng = np.random.default_rng(4)
    table, parts = made(rng)
    short = replace(table, fixed=0.0)
    drawn = choices(rng, 10)
    runs = [Run(choice=c, seconds=total(short, c) - 4e-5) for c in drawn]
    found, _ = corrected(short, parts, [], runs)
    assert found.fixed == 0
    assert found.joint is None
    off = [total(found, c) / run.seconds - 1 for c, run in zip(drawn, runs, strict=True)]
    assert np.abs(off).max() < 0.05
