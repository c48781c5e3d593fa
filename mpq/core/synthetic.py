"""The text that asks for synthetic data, `zeroq(samples=64, steps=500)`, read in one place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mpq.core.errors import InvalidInputError, unknown

SYNTHESISED = ("calibration", "held_out")  # the keys of a job that may ask for it
_ASKED = re.compile(r"\s*(\w+)\s*(?:\((.*))?", re.DOTALL)
_OPTION = re.compile(r"\s*(\w+)\s*=\s*(\d{1,9})\s*")

_FROM_ZERO = ("per_sample", "seed")
# Source: its options and their defaults (None: from the sample, the network or the job).
SOURCES: dict[str, dict[str, int | None]] = {
    "zeroq": {"samples": 64, "batch": 32, "steps": 500, "per_sample": 1, "seed": None},
    "genie": {"samples": 64, "batch": 32, "steps": 300, "seed": None},
    "random_tokens": {"samples": 32, "batch": 8, "tokens": None, "seed": None},
}


@dataclass(frozen=True, slots=True)
class Synthetic:
    """A source of synthetic data (a key of `SOURCES`) and every option of it.

    `samples` in batches of at most `batch`; `steps` of optimisation for each batch; `per_sample`
    0: statistics of whole batches, not as published; `seed` None: that of the job. Raises
    InvalidInputError for unknown names, with the nearest match, and for what is no whole number in
    range.
    """

    source: str
    options: Mapping[str, int | None]

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise InvalidInputError(
                "unknown_data_source",
                f"{unknown('data source', self.source, SOURCES)}, or 'package.module:name', an "
                f"entry point",
            )
        defaults = SOURCES[self.source]
        for name, value in self.options.items():
            if name not in defaults:
                error = unknown("option", name, defaults)
                raise InvalidInputError(error.code, f"data source {self.source!r}: {error}")
            least = 0 if name in _FROM_ZERO else 1
            if value is not None and value < least:
                raise InvalidInputError(
                    "data_option",
                    f"data source {self.source!r}: {name} is a whole number from {least} on, got "
                    f"{value}",
                )
        object.__setattr__(self, "options", {**defaults, **self.options})

    def __str__(self) -> str:
        given = {name: value for name, value in self.options.items() if value is not None}
        return f"{self.source}({', '.join(f'{name}={value}' for name, value in given.items())})"

    @classmethod
    def parse(cls, text: str) -> Synthetic:
        """Read `source` or `source(option=number, ...)`."""
        found = _ASKED.fullmatch(text)
        if found is None:
            raise InvalidInputError("data_source", f"{_written()}, got {text[:100]!r}")
        source, rest = found[1], found[2]
        if source not in SOURCES or rest is None:
            return cls(source, {})
        inside, end, after = rest.rpartition(")")
        options: dict[str, int | None] = {}
        for part in inside.split(",") if inside.strip() else ():
            option = _OPTION.fullmatch(part)
            if option is None or option[1] in options:
                raise InvalidInputError(
                    "data_option",
                    f"{_written()}, each once; got {part.strip()[:100]!r} in {text!r}",
                )
            options[option[1]] = int(option[2])
        if not end or after.strip():
            raise InvalidInputError("data_source", f"{_written()}, got {text[:100]!r}")
        return cls(source, options)

    def seeded(self, seed: int) -> Synthetic:
        """Return it with a seed, unless it has one."""
        if self.options["seed"] is not None:
            return self
        return replace(self, options={**self.options, "seed": seed})


def is_synthetic(source: object) -> bool:
    """Tell whether a text asks for synthetic data: entry points and artifacts have a colon."""
    return isinstance(source, str) and ":" not in source and bool(_ASKED.fullmatch(source))


def _written() -> str:
    return f"synthetic data is written 'zeroq(samples=64)', of {', '.join(sorted(SOURCES))}"
