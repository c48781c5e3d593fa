"""Seconds that the user gives: a look-up table of layers or shapes, in CSV or JSON."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hw_cost_models.measured.capability import shape_text
from hw_cost_models.per_layer import per_layer_table
from mpq.core.errors import InvalidInputError, unknown
from mpq.core.formats import Scheme, parse_scheme
from mpq.core.layers import Layer, LayerGraph
from mpq.core.tables import Cells, CostTable

_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_COLUMNS = {f"latency_{unit}": scale for unit, scale in _UNITS.items()}

Entry = tuple[str, Scheme]  # a layer's name or a shape, and a scheme


class LatencyTable:
    """Seconds of a unit = the sum over its layers of the table's entries (FBNet, Wu et al. 2019).

    An entry is of a layer, all its calls in a pass, or of a shape, one call; that of the layer
    comes first. Nothing is interpolated: a scheme without an entry is not offered to a layer, and
    a table of one raises. Layers outside the search count their native entry, those that have
    none nothing; where a searched layer has none there is no baseline for percentages.
    """

    name = "latency"

    def __init__(
        self, layers: Mapping[Entry, float], shapes: Mapping[Entry, float], *, source: str
    ) -> None:
        self._layers, self._shapes, self._source = dict(layers), dict(shapes), source

    @classmethod
    def parse(cls, argument: str) -> LatencyTable:
        """Return the table in a file."""
        return read_table(argument)

    @property
    def provenance(self) -> str:
        """What every cost table of this model is marked with."""
        return f"table {self._source}"

    def schemes(self, layer: Layer) -> tuple[Scheme, ...]:
        """Return the schemes that the table has for a layer, in its order."""
        known = dict.fromkeys(scheme for _, scheme in (*self._layers, *self._shapes))
        return tuple(scheme for scheme in known if not self.why_not(layer, scheme))

    def why_not(self, layer: Layer, scheme: Scheme) -> str:
        """Return why there is no time for a layer in a scheme, "" where there is one."""
        if not layer.calls or self._seconds(layer, scheme) is not None:
            return ""
        names = {name for name, _ in self._layers}
        if names and layer.name not in names and not self._shapes:
            return f"{scheme}: {unknown('layer', layer.name, names)} (in {self.provenance})"
        shape = f" ({text})" if (text := _shape_of(layer)) else ""
        return f"{scheme}: {self.provenance} has no entry for layer {layer.name!r}{shape}"

    def _seconds(self, layer: Layer, scheme: Scheme) -> float | None:
        scheme = scheme.as_stored
        found = self._layers.get((layer.name, scheme))
        if found is None:
            one = self._shapes.get((_shape_of(layer), scheme))
            found = None if one is None else one * layer.calls
        return found

    def table(self, graph: LayerGraph, cells: Cells) -> CostTable:
        """Return the seconds of every cell; raises InvalidInputError naming what is missing."""
        searched = {name for unit in graph.units for name in unit.layers}
        units = graph.kernels
        for unit, scheme in cells:
            for layer in units[unit]:
                if reason := self.why_not(layer, scheme):
                    raise InvalidInputError("no_latency", reason)

        def cost(layer: Layer, scheme: Scheme) -> float:
            found = self._seconds(layer, scheme) if layer.calls else 0.0
            if found is None and layer.name not in searched:
                return 0.0
            return math.nan if found is None else found

        return per_layer_table(self.name, "s", graph, cells, cost, self.provenance)


def _shape_of(layer: Layer) -> str:
    """Return the text that names a layer's operands, "" of a layer whose shapes are unknown."""
    known = layer.input_shape and layer.kind != "experts"
    return shape_text(layer) if known else ""


def read_table(path: str | Path) -> LatencyTable:
    """Read a latency table.

    CSV: a header with `layer` or `shape` (or both, one of them filled in each row), `scheme` and
    `latency_s`, `latency_ms` or `latency_us`. JSON: a list of such rows. A shape is written
    "linear 64x384->1536" (rows x inputs -> outputs), of other kinds as why_not tells it.
    Raises InvalidInputError naming the row for what cannot be read, for a time that is not
    positive and finite, and for an entry that appears twice.
    """
    if not str(path):
        raise InvalidInputError(
            "latency_table", "a table is written 'table:FILE.csv', no file given"
        )
    found: dict[str, dict[Entry, float]] = {"layer": {}, "shape": {}}
    for where, row in _rows(Path(path)):
        kinds = [kind for kind in found if row.get(kind)]
        if len(kinds) != 1:
            raise InvalidInputError(
                "latency_table", f"{where}: give a layer or a shape, got {len(kinds)} of them"
            )
        name = str(row[kinds[0]]).strip()
        try:
            entry = (name, parse_scheme(row.get("scheme", "")))
            seconds = _seconds(row)
        except InvalidInputError as error:
            raise InvalidInputError(error.code, f"{where}: {error}") from None
        if entry in found[kinds[0]]:
            raise InvalidInputError(
                "latency_table", f"{where}: {kinds[0]} {name!r} in {entry[1]} appears twice"
            )
        found[kinds[0]][entry] = seconds
    if not any(found.values()):
        raise InvalidInputError("latency_table", f"{path}: no rows in the table")
    return LatencyTable(found["layer"], found["shape"], source=Path(path).name)


def _rows(path: Path) -> Sequence[tuple[str, Mapping[str, Any]]]:
    """Return the rows of a file, each with where it is."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidInputError("latency_table", f"cannot read table {path}: {reason}") from error
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InvalidInputError("latency_table", f"{path}: {error}") from error
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InvalidInputError("latency_table", f"{path}: a table is a list of objects")
        return [(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]
    reader = csv.DictReader(text.splitlines())
    return [(f"{path}, line {reader.line_num}", row) for row in reader]


def _seconds(row: Mapping[str, Any]) -> float:
    units = [column for column in _COLUMNS if row.get(column) not in (None, "")]
    if len(units) != 1:
        raise InvalidInputError(
            "latency_table", f"give the time in one of {', '.join(_COLUMNS)}, got {len(units)}"
        )
    given = row[units[0]]
    try:
        seconds = float(given) * _COLUMNS[units[0]]
    except (TypeError, ValueError):
        seconds = math.nan
    if isinstance(given, bool) or not 0 < seconds < math.inf:
        raise InvalidInputError(
            "latency_table", f"{units[0]} is a positive finite number, got {given!r}"
        )
    return seconds
