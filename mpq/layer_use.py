"""Which layers always need many bits: the chosen allocations of many runs, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from mpq.core.errors import InvalidInputError
from mpq.core.formats import FP32, parse_scheme
from mpq.store.layer_counts import layer_counts
from mpq.store.query import RunQuery
from mpq.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerUse:
    """How many of the runs that searched a layer gave it which scheme, and how many weight bits."""

    layer: str
    runs: int
    schemes: Mapping[str, int]
    bits: Mapping[int, int]

    @property
    def least_bits(self) -> int:
        """The fewest weight bits that any run gave it."""
        return min(self.bits)

    @property
    def mean_bits(self) -> float:
        """The mean over runs of its weight bits."""
        return sum(bits * runs for bits, runs in self.bits.items()) / self.runs


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerUses:
    """The layers of one model over `runs` chosen allocations, in the order of the network."""

    model: str
    runs: int
    layers: tuple[LayerUse, ...]

    def always(self, bits: int) -> tuple[str, ...]:
        """Return the layers that got so many weight bits or more in every run."""
        return tuple(layer.layer for layer in self.layers if layer.least_bits >= bits)

    def view(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "model": self.model,
            "runs": self.runs,
            "layers": [
                {
                    "layer": layer.layer,
                    "runs": layer.runs,
                    "schemes": dict(layer.schemes),
                    "bits": {str(bits): runs for bits, runs in layer.bits.items()},
                    "least_bits": layer.least_bits,
                    "mean_bits": layer.mean_bits,
                }
                for layer in self.layers
            ],
        }

    @classmethod
    def from_view(cls, view: Mapping[str, Any]) -> Self:
        """Read what `view` returned."""
        layers = tuple(
            LayerUse(
                layer=layer["layer"],
                runs=layer["runs"],
                schemes=layer["schemes"],
                bits={int(bits): runs for bits, runs in layer["bits"].items()},
            )
            for layer in view["layers"]
        )
        return cls(model=view["model"], runs=view["runs"], layers=layers)


def layer_uses(store: Store, **wanted: Any) -> LayerUses:
    """Return how often the runs that these filters find (see `RunQuery`) gave each layer what.

    Raises InvalidInputError (`no_runs`) where none has a result, `several_models` where they are
    of more than one.
    """
    found = layer_counts(store, RunQuery.of(**wanted))
    if not found.runs:
        raise InvalidInputError(
            "no_runs", "no run with these properties has a result: 'mpq list' shows what there is"
        )
    if len(found.models) > 1:
        shown = ", ".join(found.models[:5]) + (", ..." if len(found.models) > 5 else "")
        raise InvalidInputError(
            "several_models",
            f"these runs are of {len(found.models)} models: choose one of {shown} by its name",
        )
    layers = []
    for layer, schemes in found.counts.items():
        bits: dict[int, int] = {}
        for text, runs in schemes.items():
            scheme = parse_scheme(text)
            is_input = layer.endswith(".input") and scheme.weights == FP32
            told = (scheme.activations if is_input else scheme.weights).bits
            bits[told] = bits.get(told, 0) + runs
        counted = dict(sorted(bits.items()))
        uses = LayerUse(layer=layer, runs=sum(bits.values()), schemes=schemes, bits=counted)
        layers.append(uses)
    return LayerUses(model=found.models[0], runs=found.runs, layers=tuple(layers))
