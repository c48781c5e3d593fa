"""Latency of layers, corrected by whole networks: what their sum gets wrong, from a few runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hw_cost_models.measured.interval import NORMAL
from hw_cost_models.measured.protocol import DRIFT_SD
from mpq.core.joint import JointCosts
from mpq.core.tables import CostTable, Floats, Indices

# Relative standard deviations of what the sum of layers gets wrong, before any run is seen.
_KERNEL_SD = 0.15  # of all times of a kernel together
_CASE_SD = 0.15  # of all times of a kernel on one shape, beyond that
_PART_SD = 0.05  # of one layer's time, beyond that
_REST_SD = 0.10  # of what is between the layers, as a share of the whole fp32 network
# What two neighbours save together, as a share of the mean of their times.
_JOINT_SD = 0.30  # of all neighbours
_PAIR_SD = 0.10  # of one pair, beyond that
_NOISE_SD = 0.01  # of the time of a whole network, at least
_LEAST = 0.05  # of a measured time, whatever the runs say


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The kernel times that the cells of a table are sums of.

    Part p adds `seconds[p]` to cell `cell[p]`; equal numbers in `kernel` are times of one
    operator, equal ones in `case` times of one operator on one shape.
    """

    cell: Indices
    seconds: Floats
    kernel: Indices
    case: Indices


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A whole network that was timed: the chosen cell of each unit, median and its relative sd."""

    choice: Indices
    seconds: float
    sd: float = 0.0


def corrected(
    table: CostTable, parts: Parts, neighbours: Sequence[tuple[int, int]], runs: Sequence[Run]
) -> tuple[CostTable, float]:
    """Return the table that explains whole runs too, and the error of a run that it has not seen.

    A run takes y = rest + sum of parts + sum over neighbours (pairs of cells that are both
    chosen) + noise. All that differs from the measured parts is normal around zero with the
    deviations above, shared by what has the same cause, so that a few runs say something about
    every cell and no run is believed more than its noise allows: the posterior mean of a Gaussian
    linear model (ridge regression with these scales), latent = M^T (M M^T + N)^-1 (y - y0). The
    sum of a pair becomes a joint cost. The error is the root mean square of the relative errors
    of each run predicted from the others, r_i / (K^-1)_ii with r = K^-1 (y - y0) (Rasmussen and
    Williams, Gaussian Processes, 5.12). The limits of cells are so wide that those of a whole
    network are 1.96 times that error, and the drift of the machine, on either side.
    """
    pairs = np.array(neighbours, np.int64).reshape(-1, 2)
    blocks = _blocks(table, parts, pairs, runs)
    took = np.array([run.seconds for run in runs])
    noise = took * np.maximum([run.sd for run in runs], _NOISE_SD)
    design = np.hstack(list(blocks.values()))
    known = _chosen(table, runs)[:, parts.cell] @ parts.seconds + table.fixed
    inverse = np.linalg.inv(design @ design.T + np.diag(np.square(noise)))
    explained = inverse @ (took - known)
    ends = np.cumsum([block.shape[1] for block in blocks.values()])[:-1]
    found = dict(zip(blocks, np.split(design.T @ explained, ends), strict=True))
    factor = 1 + _KERNEL_SD * found["kernel"][parts.kernel] + _CASE_SD * found["case"][parts.case]
    seconds = parts.seconds * np.maximum(factor + _PART_SD * found["part"], _LEAST)
    values: Floats = np.bincount(parts.cell, seconds, len(table.cells)).astype(np.float64)
    joint = _scale(table, pairs) * (_JOINT_SD * found["joint"] + _PAIR_SD * found["pair"])
    rest = table.fixed + _REST_SD * table.baseline * float(found["rest"][0])
    error = float(np.sqrt(np.square(explained / np.diag(inverse) / took).mean()))
    terms = JointCosts(cells=table.cells, first=pairs[:, 0], second=pairs[:, 1], values=joint)
    return _tabled(table, values, rest, terms, error), error


def _chosen(table: CostTable, runs: Sequence[Run]) -> Floats:
    """Return (runs, cells) with 1 where a run has chosen a cell."""
    chosen = np.zeros((len(runs), len(table.cells)))
    for row, run in zip(chosen, runs, strict=True):
        row[run.choice] = 1.0
    return chosen


def _scale(table: CostTable, pairs: Indices) -> Floats:
    scale: Floats = table.values[pairs].mean(axis=1)
    return scale


def _blocks(
    table: CostTable, parts: Parts, pairs: Indices, runs: Sequence[Run]
) -> dict[str, Floats]:
    """Return what one deviation of each cause, (runs, causes), adds to the runs."""
    chosen = _chosen(table, runs)
    times = chosen[:, parts.cell] * parts.seconds
    both = chosen[:, pairs[:, 0]] * chosen[:, pairs[:, 1]] * _scale(table, pairs)
    return {
        "kernel": _KERNEL_SD * times @ _indicator(parts.kernel),
        "case": _CASE_SD * times @ _indicator(parts.case),
        "part": _PART_SD * times,
        "rest": np.full((len(runs), 1), _REST_SD * table.baseline),
        "joint": _JOINT_SD * both.sum(axis=1, keepdims=True),
        "pair": _PAIR_SD * both,
    }


def _indicator(numbers: Indices) -> Floats:
    return np.eye(int(numbers.max()) + 1)[numbers]


def _tabled(
    table: CostTable, values: Floats, rest: float, joint: JointCosts, error: float
) -> CostTable:
    """Return the table with limits; a negative rest (fused away) becomes a part of every unit's."""
    share = min(rest, 0.0) / len(table.cells.units)
    values = np.maximum(values + share, 0.0)
    rest = max(rest, 0.0)
    width = NORMAL * np.hypot(error, DRIFT_SD) * (values + rest / len(table.cells.units))
    return replace(
        table,
        values=values,
        low=np.maximum(values - width, 0.0),
        high=values + width,
        fixed=rest,
        joint=joint if len(joint) else None,
    )
