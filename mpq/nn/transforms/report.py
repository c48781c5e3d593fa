"""What a transform did to a network, and to which layers it could not be applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mpq.core.layers import LayerName


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformReport:
    """The layers that a transform changed, and every other linear layer with the reason.

    `transform` is its text form, `costs` what the network has to do more, by the layer it is for.
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
            *(f"{self.transform}: {name} stays: {why}" for name, why in self.unchanged.items()),
            *(f"{self.transform}: {name} costs {cost}" for name, cost in self.costs.items()),
        )
