"""What is told across runs as tables: layers that differ, and what layers got."""

from __future__ import annotations

from mpq.comparison import Comparison
from mpq.datatable import Column, DataTable
from mpq.layer_use import LayerUses


def comparison_table(found: Comparison) -> DataTable:
    """Return the layers that differ, with the scheme that each run gives it in its column."""
    runs = [
        Column(run, "text", [schemes[place] for schemes in found.layers.values()])
        for place, run in enumerate(found.runs)
    ]
    return DataTable(
        name="comparison", columns=(Column("layer", "text", list(found.layers)), *runs)
    )


def layers_table(found: LayerUses) -> DataTable:
    """Return how many runs gave each layer how many bits; `runs` have searched it."""
    bits = sorted({bits for use in found.layers for bits in use.bits})
    counts = [
        Column(f"bits.{number}", "int", [use.bits.get(number, 0) for use in found.layers])
        for number in bits
    ]
    return DataTable(
        name="layers",
        columns=(
            Column("model", "text", [found.model] * len(found.layers)),
            Column("layer", "text", [use.layer for use in found.layers]),
            Column("runs", "int", [use.runs for use in found.layers]),
            Column("least_bits", "int", [use.least_bits for use in found.layers]),
            Column("mean_bits", "float", [use.mean_bits for use in found.layers]),
            *counts,
        ),
    )
