"""Our own file: an allocation as versioned JSON, described by `allocation.schema.json` beside it.

Everything that a choice means without the network and without the database: the layers with their
shapes and schemes, what had to be equal and why, what was pinned, budgets, totals and provenance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from hw_cost_models.memory import stored_bytes
from mpq.core.chosen import Chosen
from mpq.core.errors import InvalidInputError
from mpq.core.formats import Scheme, parse_scheme
from mpq.core.layers import Layer, LayerGraph, LayerName

SCHEMA_ID = "urn:mpq:allocation:1"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class LayerRecord(_Record):
    """One searched layer; `weight` is the parameter that holds it: tied layers name the same."""

    name: str
    kind: str
    weight: str
    shape: list[int]
    scheme: str
    group: str


class GroupRecord(_Record):
    """Layers that share one scheme, why, and whether the scheme was fixed beforehand."""

    name: str
    layers: list[str]
    reason: str
    pinned: bool


class BudgetRecord(_Record):
    """An upper limit on one cost, in the unit of that cost, and as it was written."""

    cost: str
    limit: float
    unit: str
    text: str


class TotalRecord(_Record):
    """What the allocation costs in all, everything outside the search included."""

    value: float
    unit: str


class AllocationRecord(_Record):
    """An allocation of number formats to the layers of a network."""

    format: Literal["mpq-allocation"] = "mpq-allocation"
    version: Literal[1] = 1
    layers: list[LayerRecord]
    groups: list[GroupRecord]
    budgets: list[BudgetRecord]
    totals: dict[str, TotalRecord]
    provenance: dict[str, str | float | None]


def json_schema() -> str:
    """Return the JSON Schema of the file as text."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID}
    return json.dumps(schema | AllocationRecord.model_json_schema(), indent=2) + "\n"


class AllocationJson:
    """The target "mpq": every scheme, and all that is known of the choice."""

    name = "mpq"
    suffix = ".json"
    fuses = False
    keeps_static = True
    every_format = True

    def refusal(self, layer: Layer, scheme: Scheme) -> str:
        """Return "": it holds every scheme."""
        return ""

    def stored_bytes(self, layer: Layer, scheme: Scheme) -> int:
        """Return the bytes in a packed checkpoint (mpq.export.packed)."""
        return stored_bytes(layer, scheme.weights)

    def text(self, chosen: Chosen) -> str:
        """Return the record as JSON."""
        units = {name: unit.name for unit in chosen.graph.units for name in unit.layers}
        cost_units = chosen.cost_units
        record = AllocationRecord(
            layers=[
                LayerRecord(
                    name=layer.name,
                    kind=layer.kind,
                    weight=layer.weight_id,
                    shape=list(layer.weight_shape),
                    scheme=str(scheme),
                    group=units[layer.name],
                )
                for layer, scheme in chosen.searched
            ],
            groups=[
                GroupRecord(
                    name=unit.name,
                    layers=list(unit.layers),
                    reason=unit.reason,
                    pinned=unit.name in chosen.pinned,
                )
                for unit in chosen.graph.units
            ],
            budgets=[
                BudgetRecord(cost=b.cost, limit=b.limit, unit=cost_units[b.cost], text=b.text)
                for b in chosen.budgets
            ],
            totals={
                cost: TotalRecord(value=value, unit=cost_units[cost])
                for cost, value in chosen.totals.items()
            },
            provenance=dict(chosen.provenance),
        )
        return record.model_dump_json(indent=2) + "\n"

    def read(self, text: str, graph: LayerGraph) -> Mapping[LayerName, Scheme]:
        """Return the schemes; shapes must be those of the network."""
        try:
            record = AllocationRecord.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise InvalidInputError(
                "import", f"no mpq-allocation of version 1: {place}: {first['msg']}"
            ) from error
        layers = graph.by_name
        for layer in record.layers:
            if layer.name in layers and tuple(layer.shape) != layers[layer.name].weight_shape:
                raise InvalidInputError(
                    "import",
                    f"layer {layer.name!r} has shape {layer.shape} in the file and "
                    f"{list(layers[layer.name].weight_shape)} in the network",
                )
        return {layer.name: parse_scheme(layer.scheme) for layer in record.layers}
