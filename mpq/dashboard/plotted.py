"""What figures share: axes in units that people read, and names as they are."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpq.core.budgets import AMOUNTS
from mpq.core.quantities import quantity

_LARGE = 1e18  # from here on digits are no longer read
_SMALL = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A plot as plotly takes it, and a text that says what it shows."""

    data: Sequence[dict[str, Any]]
    layout: dict[str, Any]
    text: str
    height: int = 380


def verbatim(name: str) -> str:
    """Return a name so that plotly, which reads some HTML, draws it as it is."""
    return html.escape(name, quote=False)


def axis_scale(most: float, unit: str) -> tuple[str, float]:
    """Return the unit that a largest value is read in, and its size in `unit`."""
    if not math.isfinite(most) or abs(most) >= _LARGE:
        return unit, 1.0
    name = quantity(most, unit).rpartition(" ")[2]
    return (name, AMOUNTS[name]) if name in AMOUNTS else (unit, 1.0)


def amount(value: float | None, unit: str) -> str:
    """Return a quantity as people read it, "–" where there is none, however large it is."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) >= _LARGE or 0 < abs(value) < _SMALL:
        return f"{value:.4g} {unit}"
    return quantity(value, unit)
