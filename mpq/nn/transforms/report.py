"""What a transform did to a network, and to which layers it could not be applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mpq.core.layers import LayerName

_TOLD = 4  # names that are written out


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformReport:
    """The layers that a transform changed, and every other linear layer with the reason.

    `transform` is its text form, `costs` what the network does more, by the layer it is for.
    """

    transform: str
    changed: tuple[LayerName, ...]
    unchanged: Mapping[LayerName, str] = field(default_factory=dict)
    costs: Mapping[LayerName, str] = field(default_factory=dict)

    @property
    def lines(self) -> tuple[str, ...]:
        """What a person should know, in sentences: first what was changed."""
        return (
            f"{self.transform}: changed {', '.join(self.changed) or 'no layer'}",
            *(f"{self.transform}: {_names(n)}: {why}" for why, n in _by(self.unchanged).items()),
            *(f"{self.transform}: {_names(n)}: {cost}" for cost, n in _by(self.costs).items()),
        )


def _by(told: Mapping[LayerName, str]) -> dict[str, list[LayerName]]:
    """Return the names of each text, in order."""
    found: dict[str, list[LayerName]] = {}
    for name, text in told.items():
        found.setdefault(text, []).append(name)
    return found


def _names(names: list[LayerName]) -> str:
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return f"{', '.join(names[:_TOLD])}{more}"
