"""A network that really runs in its chosen formats: what it weighs, returns and takes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from mpq.core.quantities import quantity, with_error

DEPLOYED = "deployment"  # the kind of event that keeps one with a run


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileTime:
    """What a deployed network takes on the batch of a profile, in turns with its fp32 form.

    Where the written file does not run its `shape` (`in_file`), the network was exported for that
    alone. `predicted_s` is what the profile's table said (None: none of this device).
    """

    name: str
    shape: str
    in_file: bool
    measured_s: float
    low_s: float
    high_s: float
    fp32_s: float
    fp32_low_s: float
    fp32_high_s: float
    predicted_s: float | None

    @property
    def speed_up(self) -> float:
        """How many times faster than the fp32 network in the same runtime."""
        return self.fp32_s / self.measured_s

    @property
    def latency_error(self) -> float | None:
        """Predicted over measured seconds, minus 1."""
        return None if self.predicted_s is None else self.predicted_s / self.measured_s - 1

    def line(self) -> str:
        """Return what a person wants to know."""
        own = "" if self.in_file else ", exported for this shape, which the file does not run"
        return f"{self.name} ({self.shape}) {_took(self)}{own}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One written model of a runtime, measured on the sample that the latency is for.

    Differences are root mean squares of outputs over that of the reference: `difference` of the
    runtime's to the fake-quantized network's, `rounding` of what the kernels round beyond it,
    computed by torch, `unexplained` of the runtime's to the latter, and, to judge them by,
    `quantization` of the fake-quantized network's to the original's. `samples` were compared.
    Seconds are of one thread, medians with 95 % limits of rounds in which the model and its fp32
    form took turns. `predicted_s` and `predicted_bytes` are what the search's tables said (None:
    no table); `stored_bytes` are those of the arrays in the file. `profiles` are timed too;
    `untimed` tells of those that are not.
    """

    target: str
    path: str
    file_bytes: int
    stored_bytes: int
    predicted_bytes: int | None
    samples: int
    difference: float
    rounding: float
    unexplained: float
    quantization: float
    device: str
    measured_s: float
    low_s: float
    high_s: float
    fp32_s: float
    fp32_low_s: float
    fp32_high_s: float
    predicted_s: float | None
    any_batch: bool
    profiles: tuple[ProfileTime, ...] = ()
    untimed: tuple[str, ...] = ()

    @property
    def speed_up(self) -> float:
        """How many times faster than the fp32 network in the same runtime."""
        return self.fp32_s / self.measured_s

    @property
    def latency_error(self) -> float | None:
        """Predicted over measured seconds, minus 1."""
        return None if self.predicted_s is None else self.predicted_s / self.measured_s - 1

    def lines(self) -> list[str]:
        """Return what a person wants to know, a fact a line."""
        weight = quantity(self.stored_bytes, "bytes")
        if self.predicted_bytes is not None:
            weight += f" (predicted {quantity(self.predicted_bytes, 'bytes')})"
        batch = "any batch size" if self.any_batch else "the batch size of the sample only"
        return [
            f"deployed to {self.target}: {self.path}, {quantity(self.file_bytes, 'bytes')}, "
            f"arrays {weight}, {batch}",
            f"output differs from the fake-quantized network's by {self.difference:.2g} (kernels' "
            f"own rounding {self.rounding:.2g}, unexplained {self.unexplained:.2g}); that from the "
            f"original by {self.quantization:.2g}",
            _took(self),
            *(profile.line() for profile in self.profiles),
            *self.untimed,
        ]

    def view(self) -> dict[str, Any]:
        """Return plain data, with what follows from it."""
        profiles = [asdict(profile) | _derived(profile) for profile in self.profiles]
        kept = asdict(self) | {"profiles": profiles, "untimed": list(self.untimed)}
        return kept | _derived(self)

    def text(self) -> str:
        """Return the text that `from_text` reads back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Deployment:
        """Read what `text` wrote; fields of a later version are left out."""
        values: dict[str, Any] = json.loads(text)
        times = values.get("profiles", ())
        values["profiles"] = tuple(ProfileTime(**time) for time in times)
        values["untimed"] = tuple(values.get("untimed", ()))
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})


def _took(timed: Deployment | ProfileTime) -> str:
    took = with_error(timed.measured_s, (timed.high_s - timed.low_s) / 2, "s")
    whole = with_error(timed.fp32_s, (timed.fp32_high_s - timed.fp32_low_s) / 2, "s")
    if timed.latency_error is not None and timed.predicted_s is not None:
        took += f" (predicted {quantity(timed.predicted_s, 's')}, {timed.latency_error:+.1%})"
    return f"takes {took}, {timed.speed_up:.2f} times as fast as fp32 with {whole}"


def _derived(timed: Deployment | ProfileTime) -> dict[str, float | None]:
    return {"speed_up": timed.speed_up, "latency_error": timed.latency_error}
