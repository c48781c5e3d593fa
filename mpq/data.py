"""Where batches come from: given, made by an entry point, or synthetic; and what is told of it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from mpq.core.errors import MpqWarning
from mpq.core.synthetic import Synthetic, is_synthetic
from mpq.models import load_batches
from mpq.nn.batches import Batch, check_batches, num_samples
from mpq.nn.fingerprint import batches_digest, digest

_DIGITS = 12
_GIVEN = "given"


@dataclass(frozen=True, slots=True)
class Data:
    """Batches, and one line about where they came from and which they are."""

    batches: tuple[Batch, ...] = ()
    told: str = ""


def load_data(
    source: Any,
    what: str,
    model: nn.Module,
    sample: Batch | None = None,
    *,
    seed: int = 0,
    trial: bool = False,
) -> Data:
    """Return batches: themselves, what an entry point makes, or what a synthetic source makes.

    The line is "given: 4 batches, 128 samples, digest ..." or "zeroq(samples=64, ...): ...". A
    `trial` costs nothing: synthetic batches have the right shapes, but are noise. The same seed
    makes the same batches. Raises InvalidInputError where there are none.
    """
    if not is_synthetic(source):
        found = check_batches(what, load_batches(source, what))
        return Data(found, f"{_GIVEN}: {_described(found)}")
    from mpq.nn.synthetic import synthesise

    asked = Synthetic.parse(source).seeded(seed)
    made = synthesise(asked, model, sample, trial=trial)
    return Data(made.batches, f"{asked}: {_described(made.batches)}; {made.told}")


def _described(batches: tuple[Batch, ...]) -> str:
    samples = sum(num_samples(batch) for batch in batches)
    key = digest(batches_digest(batches))[:_DIGITS]
    many = "batch" if len(batches) == 1 else "batches"
    return f"{len(batches)} {many}, {samples} samples, digest {key}"


def warn_if_unchecked(calibration: str, held_out: str) -> None:
    """Warn where predictions meet synthetic data only, by what `Data.told` says of both splits."""
    source = calibration.partition(":")[0]
    if held_out and not held_out.startswith(_GIVEN):
        warnings.warn(
            f"the held-out batches are synthetic ({held_out.partition(':')[0]}): what is measured "
            f"on them may differ from real data",
            MpqWarning,
            stacklevel=2,
        )
    elif calibration and source != _GIVEN and not held_out:
        warnings.warn(
            f"the calibration batches are synthetic ({source}) and no held-out batches were given: "
            f"predictions are checked on synthetic data only",
            MpqWarning,
            stacklevel=2,
        )
