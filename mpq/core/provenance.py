"""Where a cost's numbers are from, so that a model is never read as a measurement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mpq.core.tables import CostTable

_TAKEN_HERE = ("exact", "measured")


def is_modelled(table: CostTable) -> bool:
    """Tell whether values are neither counted nor measured on this machine."""
    return table.provenance.partition(" ")[0] not in _TAKEN_HERE


def cost_label(table: CostTable) -> str:
    """Return the name of a cost as a heading: "latency (modelled)"; as it is if taken here."""
    if not is_modelled(table):
        return table.name
    given = table.provenance.startswith("table ")
    return f"{table.name} ({'given' if given else 'modelled'})"


def modelled_note(tables: Iterable[CostTable]) -> str:
    """Return "latency is modelled (roofline H100)" and so on, "" where nothing is."""
    return ", ".join(
        f"{table.name} is {'given' if table.provenance.startswith('table ') else 'modelled'} "
        f"({table.provenance})"
        for table in tables
        if is_modelled(table)
    )


def sources(costs: Mapping[str, CostTable]) -> dict[str, str]:
    """Return where the numbers of each cost are from, as plain data."""
    return {name: table.provenance for name, table in costs.items()}
