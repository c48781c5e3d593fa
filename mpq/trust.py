"""Modules whose classes a kept network may have: those that whoever drives it names."""

from __future__ import annotations

import os
from collections.abc import Iterable

TRUSTED = "MPQ_TRUSTED_MODULES"  # prefixes of modules, comma-separated


def trusted_modules() -> tuple[str, ...]:
    """Return the prefixes of modules that this process trusts."""
    return tuple(p for part in os.environ.get(TRUSTED, "").split(",") if (p := part.strip()))


def trusted_text(more: Iterable[str] = ()) -> str:
    """Return the value of the variable with further prefixes in it."""
    return ",".join(dict.fromkeys([*trusted_modules(), *more]))


def trust(more: Iterable[str]) -> None:
    """Trust further modules in this process and in those that it starts."""
    os.environ[TRUSTED] = trusted_text(more)
