"""What an allocation really did, beside what was predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mpq.core.problem import Allocation
from mpq.core.tables import Floats

CHOSEN = "chosen"  # the candidate that a search returns
TRIAL = "trial "  # begins the names of what a solver tried, numbered from 0
UNIFORM = "uniform "  # begins the names of uniform schemes
POINT = "point "  # begins the names of points of a frontier that were measured
CHEAPER = "cheaper "  # begins the names of steps that take cost off an allocation
RANDOM = "random "  # begins the names of the referee's random allocations
DIVERGENCE_NAMES = {
    "kl": "KL to original",
    "cosine": "1 - cosine to original",
    "mse": "squared error to original",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One candidate measured on one split.

    `mean` is the mean over samples of the divergence between the outputs of the quantized and
    the original network, `stderr` its standard error over samples; `predicted` is what the
    sensitivity table said for the same quantity. `metrics` come from the user's `evaluate`.
    The bytes are predicted by the memory table and counted in a really written file (None: not
    written). The candidate "unquantized" has an empty allocation. `per_sample` is what `mean` is
    the mean of, where it is at hand (None: read from the database).
    """

    candidate: str
    split: str  # "calibration" | "held_out"
    allocation: Allocation
    divergence: str  # "kl" | "cosine" | "mse"
    mean: float
    stderr: float
    predicted: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    predicted_bytes: int | None = None
    measured_bytes: int | None = None
    seconds: float = 0.0
    per_sample: Floats | None = field(default=None, compare=False, repr=False)


def without_trials(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Return what is worth showing one by one: nothing tried on the way, nothing random."""
    hidden = (TRIAL, RANDOM, POINT, CHEAPER)
    return [e for e in evaluations if not e.candidate.startswith(hidden)]


def in_order(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Return evaluations by split, the chosen allocation first, then the best."""
    return sorted(evaluations, key=lambda e: (e.split, e.candidate != CHOSEN, e.mean))
