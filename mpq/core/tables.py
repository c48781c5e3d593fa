"""Tables over cells (unit, scheme): what a choice costs and how much it hurts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from mpq.core.errors import InvalidInputError, unknown
from mpq.core.formats import Scheme
from mpq.core.joint import JointCosts, checked_joint, joined_sum
from mpq.core.layers import UnitName
from mpq.core.shrinkage import shrunk_products

Cell = tuple[UnitName, Scheme]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
BLEND = " + "  # between the names of two metrics whose scores were scaled to the measurement
_DIVERGENCES = frozenset({"gauss_newton", "kl"})  # metrics that score in units of the divergence
PAIRS_TRUSTED = 0.75  # measured at 3.0 and 3.5 bits on a CNN and a ViT: better than 1/2 and 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """Which schemes each unit may take: the axis that all tables of a problem share.

    Cells are numbered unit by unit; `offsets[u]` is the first cell of unit u.
    """

    units: tuple[UnitName, ...]
    schemes: tuple[tuple[Scheme, ...], ...]
    offsets: Indices = field(init=False, repr=False, compare=False)
    _unit_index: dict[UnitName, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.units) != len(self.schemes):
            raise InvalidInputError(
                "cells", f"{len(self.units)} units but {len(self.schemes)} lists of schemes"
            )
        index = {name: i for i, name in enumerate(self.units)}
        if len(index) != len(self.units):
            twice = sorted(name for name, count in Counter(self.units).items() if count > 1)
            raise InvalidInputError("cells", f"unit names appear twice: {', '.join(twice)}")
        fine: set[int] = set()  # units share tuples: look at each once
        for name, schemes in zip(self.units, self.schemes, strict=True):
            if id(schemes) in fine:
                continue
            if not schemes:
                raise InvalidInputError("no_choices", f"unit {name!r} has no scheme to choose from")
            if len(set(schemes)) != len(schemes):
                raise InvalidInputError("cells", f"unit {name!r} lists a scheme twice")
            fine.add(id(schemes))
        counts = np.fromiter((len(s) for s in self.schemes), np.int64, len(self.schemes))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        offsets.setflags(write=False)
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "_unit_index", index)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __iter__(self) -> Iterator[Cell]:
        for name, schemes in zip(self.units, self.schemes, strict=True):
            for scheme in schemes:
                yield name, scheme

    @property
    def kinds(self) -> tuple[tuple[Scheme, ...], ...]:
        """The different lists of schemes, told apart by identity: few are shared by many units."""
        return tuple({id(schemes): schemes for schemes in self.schemes}.values())

    def unit_number(self, unit: UnitName) -> int:
        """Return the position of a unit; raises for an unknown one."""
        if unit not in self._unit_index:
            raise unknown("unit", unit, self.units)
        return self._unit_index[unit]

    def index(self, cell: Cell) -> int:
        """Return the number of a cell; raises where the unit may not take the scheme."""
        unit, scheme = cell
        number = self.unit_number(unit)
        try:
            return int(self.offsets[number]) + self.schemes[number].index(scheme)
        except ValueError:
            error = unknown("scheme", str(scheme), map(str, self.schemes[number]))
            raise InvalidInputError(error.code, f"unit {unit!r}: {error}") from None

    def restrict(self, allowed: Mapping[UnitName, Sequence[Scheme]]) -> tuple[Cells, Indices]:
        """Return fewer cells, and the old number of each: units in `allowed` keep only those."""
        kept = list(self.schemes)
        keep = np.ones(len(self), np.bool_)
        for unit, schemes in allowed.items():
            wanted = [self.index((unit, scheme)) for scheme in schemes]
            number = self.unit_number(unit)
            start, stop = self.offsets[number], self.offsets[number + 1]
            keep[start:stop] = False
            keep[wanted] = True
            kept[number] = tuple(
                s for s, k in zip(kept[number], keep[start:stop], strict=True) if k
            )
        return Cells(units=self.units, schemes=tuple(kept)), np.flatnonzero(keep)


def _named(cells: Cells, number: int) -> str:
    unit = int(np.searchsorted(cells.offsets, number, "right")) - 1
    scheme = cells.schemes[unit][number - int(cells.offsets[unit])]
    return f"unit {cells.units[unit]!r} in {scheme}"


def checked(what: str, cells: Cells, values: npt.ArrayLike) -> Floats:
    """Return `values` as a read-only float64 array of one finite number per cell."""
    array = _owned(values)
    if array.shape != (len(cells),):
        raise InvalidInputError(
            "table_incomplete", f"{what} has {array.shape} values for {len(cells)} cells"
        )
    if not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array))[0])
        raise InvalidInputError(
            "table_not_finite", f"{what} of {_named(cells, bad)} is {array[bad]}"
        )
    array.setflags(write=False)
    return array


def _owned(values: npt.ArrayLike) -> Floats:
    """Return `values` as float64, copied unless nobody can write to them."""
    if isinstance(values, np.ndarray) and values.dtype == np.float64 and values.base is None:
        return np.array(values) if values.flags.writeable else values
    return np.array(values, np.float64)


def _gathered(values: Mapping[Cell, float]) -> tuple[Cells, list[float]]:
    schemes: dict[UnitName, list[Scheme]] = {}
    for unit, scheme in values:
        schemes.setdefault(unit, []).append(scheme)
    cells = Cells(units=tuple(schemes), schemes=tuple(tuple(s) for s in schemes.values()))
    return cells, [values[cell] for cell in cells]


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityTable:
    """Predicted loss increase of each cell, additive over units; lower is better.

    `stderr` is the standard error of each estimate, 0 where it is exact. `data` tells which batches
    it was measured on, "given: 4 batches, ..." or "zeroq(...): ..."; "" where nobody knows.
    """

    metric: str
    cells: Cells
    values: Floats
    stderr: Floats
    data: str = ""

    def __post_init__(self) -> None:
        name = f"sensitivity {self.metric!r}"
        object.__setattr__(self, "values", checked(name, self.cells, self.values))
        stderr = checked(f"standard error of {name}", self.cells, self.stderr)
        if (stderr < 0).any():
            raise InvalidInputError("table_negative", f"{name} has a negative standard error")
        object.__setattr__(self, "stderr", stderr)

    @classmethod
    def from_cells(
        cls,
        metric: str,
        values: Mapping[Cell, float],
        stderr: Mapping[Cell, float] | None = None,
    ) -> SensitivityTable:
        """Build a table from a mapping; cells are ordered by first appearance of their unit."""
        cells, ordered = _gathered(values)
        missing = [] if stderr is None else [c for c in cells if c not in stderr]
        if missing:
            unit, scheme = missing[0]
            raise InvalidInputError(
                "table_incomplete", f"no standard error of unit {unit!r} in {scheme}"
            )
        errors = [0.0 if stderr is None else stderr[cell] for cell in cells]
        return cls(metric=metric, cells=cells, values=np.array(ordered), stderr=np.array(errors))

    def __getitem__(self, cell: Cell) -> float:
        return float(self.values[self.cells.index(cell)])

    @property
    def is_divergence(self) -> bool:
        """Tell whether values are divergences as they are measured, to be compared in size."""
        return self.metric in _DIVERGENCES or BLEND in self.metric

    def clamped(self) -> SensitivityTable:
        """Return the table with negative values at zero, for solving: no format is a gain.

        A Hessian trace or a measured loss can be negative; a choice that lives on that is an
        artefact of curvature or noise.
        """
        return replace(self, values=np.maximum(self.values, 0.0))

    def restrict(self, cells: Cells, numbers: Indices) -> SensitivityTable:
        """Return the table over fewer cells (see `Cells.restrict`)."""
        return replace(self, cells=cells, values=self.values[numbers], stderr=self.stderr[numbers])


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable:
    """What each cell costs, and what `joint` adds where two cells are both chosen.

    `fixed` is what no choice changes, `baseline` the cost of the network as it is (percentages
    refer to it), `weights` the number of searched weights where "bits per weight" makes sense.
    `low` and `high` bound a measured value with 95 % confidence; equal to `values` where exact.
    """

    name: str
    unit: str  # "bytes" | "s" | "bitops" | "J" | "MACs" | "LUTs"
    cells: Cells
    values: Floats
    low: Floats
    high: Floats
    fixed: float = 0.0
    baseline: float = float("nan")
    weights: int = 0
    provenance: str = "exact"
    joint: JointCosts | None = None

    def __post_init__(self) -> None:
        joint = checked_joint(f"cost {self.name!r}", self.cells, self.joint)
        object.__setattr__(self, "joint", joint)
        for part in ("values", "low", "high"):
            array = checked(f"cost {self.name!r}", self.cells, getattr(self, part))
            if (array < 0).any():
                bad = int(np.flatnonzero(array < 0)[0])
                raise InvalidInputError(
                    "table_negative",
                    f"cost {self.name!r} of {_named(self.cells, bad)} is negative: {array[bad]}",
                )
            object.__setattr__(self, part, array)
        if not (math.isfinite(self.fixed) and self.fixed >= 0):
            raise InvalidInputError(
                "table_negative", f"the fixed part of cost {self.name!r} is {self.fixed}"
            )

    @classmethod
    def exact(
        cls,
        name: str,
        unit: str,
        cells: Cells,
        values: npt.ArrayLike,
        *,
        fixed: float = 0.0,
        baseline: float = float("nan"),
        weights: int = 0,
        provenance: str = "exact",
    ) -> CostTable:
        """Build a table whose values carry no error."""
        array = np.asarray(values, np.float64)
        return cls(
            name=name,
            unit=unit,
            cells=cells,
            values=array,
            low=array,
            high=array,
            fixed=fixed,
            baseline=baseline,
            weights=weights,
            provenance=provenance,
        )

    @classmethod
    def from_cells(
        cls,
        name: str,
        unit: str,
        values: Mapping[Cell, float],
        *,
        fixed: float = 0.0,
        provenance: str = "exact",
    ) -> CostTable:
        """Build an exact table from a mapping."""
        cells, ordered = _gathered(values)
        return cls.exact(name, unit, cells, ordered, fixed=fixed, provenance=provenance)

    def __getitem__(self, cell: Cell) -> float:
        return float(self.values[self.cells.index(cell)])

    def total(self, choice: Indices) -> float:
        """Return the total of a choice, fixed and joint parts included."""
        return self.fixed + joined_sum(self.values[choice], self.joint, choice)

    def half_width(self, numbers: npt.ArrayLike) -> float:
        """Return half the width of the 95 % interval of the sum of some cells; 0 if exact."""
        chosen = np.asarray(numbers, np.int64)
        return math.fsum(self.high[chosen] - self.low[chosen]) / 2

    def restrict(self, cells: Cells, numbers: Indices) -> CostTable:
        """Return the table over fewer cells (see `Cells.restrict`)."""
        return replace(
            self,
            cells=cells,
            values=self.values[numbers],
            low=self.low[numbers],
            high=self.high[numbers],
            joint=self.joint and self.joint.restrict(cells, numbers),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """The response of the network's output to each cell, as seen by random probes.

    `vectors[c, n, k]` is u_c of sample n and probe k, so that the predicted loss of a whole
    allocation is 1/2 mean_nk (sum_u u[a(u), n, k])^2: squares are the additive scores, cross
    products tell which units cancel and which reinforce each other. Around an already quantized
    network each cell also has a slope for each sample, which is added. `trust` is how far pairs
    are believed beyond what shrinkage by their own error leaves of them.
    """

    cells: Cells
    vectors: npt.NDArray[np.float32]  # (num_cells, num_samples, num_probes)
    slopes: npt.NDArray[np.float32] | None = None  # (num_cells, num_samples); None: zero
    trust: float = PAIRS_TRUSTED

    def __post_init__(self) -> None:
        if self.vectors.ndim != 3 or len(self.vectors) != len(self.cells):
            raise InvalidInputError(
                "table_incomplete",
                f"responses of shape {self.vectors.shape} for {len(self.cells)} cells",
            )
        if not np.isfinite(self.vectors).all():
            bad = int(np.argwhere(~np.isfinite(self.vectors))[0, 0])
            raise InvalidInputError(
                "table_not_finite",
                f"responses of {_named(self.cells, bad)} hold NaN or infinity",
            )
        self.vectors.setflags(write=False)
        if self.slopes is not None:
            if self.slopes.shape != self.vectors.shape[:2]:
                raise InvalidInputError(
                    "table_incomplete",
                    f"slopes of shape {self.slopes.shape} for responses of {self.vectors.shape}",
                )
            checked("slopes", self.cells, self.slopes.sum(axis=1, dtype=np.float64))

    def restrict(self, cells: Cells, numbers: Indices) -> Responses:
        """Return the responses of fewer cells (see `Cells.restrict`)."""
        slopes = None if self.slopes is None else self.slopes[numbers]
        return replace(self, cells=cells, vectors=self.vectors[numbers], slopes=slopes)

    def of_samples(self, samples: slice) -> Responses:
        """Return the responses of some of the samples."""
        slopes = None if self.slopes is None else self.slopes[:, samples]
        return replace(self, vectors=self.vectors[:, samples], slopes=slopes)

    def losses(self, choice: npt.ArrayLike) -> Floats:
        """Return the predicted loss of a choice of cells on each sample, nothing shrunk: unbiased.

        For a choice that these very responses led to it is too low.
        """
        chosen = np.asarray(choice, np.int64)
        together = self.vectors[chosen].sum(axis=0, dtype=np.float64)
        found: Floats = 0.5 * np.square(together).mean(axis=1)
        return found if self.slopes is None else found + self.slopes[chosen].sum(axis=0)

    def own_scores(self) -> tuple[Floats, Floats]:
        """Return each own score, 1/2 mean u^2 plus the slope, and its error over samples."""
        per_sample = 0.5 * np.square(self.vectors, dtype=np.float64).mean(axis=2)
        if self.slopes is not None:
            per_sample += self.slopes
        samples = per_sample.shape[1]
        spread = per_sample.std(axis=1, ddof=1) if samples > 1 else np.zeros(len(per_sample))
        return per_sample.mean(axis=1), spread / np.sqrt(samples)

    def interactions(self) -> Floats:
        """Return G with G[i, j] = 1/2 mean_nk u_i u_j, off-diagonals shrunk.

        The score of an allocation with one-hot x is x^T G x. Each off-diagonal term g with
        standard error s (over samples) is multiplied by max(0, 1 - s^2/g^2), the positive-part
        shrinkage towards "no interaction", because the additive model is right where the
        sample cannot tell otherwise, and by `trust`: whoever minimises picks the pairs that seem
        to cancel best, and large changes cancel less than the second order says.
        """
        return self.bounded_interactions()[0]

    def bounded_interactions(self, *, single: bool = False) -> tuple[Floats, float]:
        """Return `interactions` and how far rounding can have moved a term of it, relatively.

        No term differs from the exact one by more than that number times sqrt(c_i c_j), c the
        diagonal without slopes. `single` takes the errors s, not g, in single precision: a
        quarter less time for many cells.
        """
        return shrunk_products(self.vectors, self.slopes, self.trust, single=single)
