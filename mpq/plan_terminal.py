"""Plans as terminal tables or JSON."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from rich.table import Table
from rich.text import Text

from mpq.console import new_console
from mpq.core.plan import Plan, PlanRow
from mpq.core.quantities import quantity


def print_plan(plan: Plan, as_json: bool = False) -> None:
    """Print what a network takes on a machine."""
    if as_json:
        print(json.dumps(plan_view(plan), indent=2))
        return
    console = new_console()
    for line in _lines(plan):
        console.print(Text(line))
    console.print(_table(plan))
    for line in plan.notes:
        console.print(Text(line, "dim"))


def plan_view(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain data."""
    view = {field.name: getattr(plan, field.name) for field in fields(plan)}
    return view | {
        "uniform": [_row_view(row) for row in plan.uniform],
        "chosen": _row_view(plan.chosen),
        "allocation": plan.allocation.text(),
        "notes": list(plan.notes),
        "budgets": {budget.cost: budget.limit for budget in plan.budgets},
    }


def _row_view(row: PlanRow) -> dict[str, Any]:
    view = {field.name: getattr(row, field.name) for field in fields(row)}
    return view | {"seconds": dict(row.seconds), "modelled": True}


def _lines(plan: Plan) -> list[str]:
    cache = (
        f"; KV cache of {plan.batch} x {plan.context} tokens "
        f"{quantity(plan.kv_cache_bytes, 'bytes')}"
        if plan.kv_cache_bytes
        else ""
    )
    return [
        f"{plan.model}: {plan.parameters / 1e9:.4g} G parameters, {plan.layers} layers, "
        f"{plan.units} units, {quantity(plan.native_bytes, 'bytes')} as it is",
        f"{plan.machine}: {quantity(plan.memory_bytes, 'bytes')} of memory{cache}",
    ]


def _table(plan: Plan) -> Table:
    table = Table("weights", box=None, header_style="bold")
    phases = list(plan.chosen.seconds)
    headings = [f"{phase} (modelled)" for phase in phases]
    for column in ("mean bits", "bytes", "with KV cache", "fits", *headings, "tokens/s"):
        table.add_column(column, justify="right")
    for row in (*plan.uniform, plan.chosen):
        chosen = row is plan.chosen
        speed = plan.batch / row.seconds["decode"] if "decode" in row.seconds else None
        table.add_row(
            Text(f"asked: {row.name}" if chosen else row.name, "bold" if chosen else ""),
            f"{row.bits:.3f}",
            quantity(row.weight_bytes, "bytes"),
            quantity(row.resident_bytes, "bytes"),
            "yes" if row.fits else "no",
            *(quantity(row.seconds[phase], "s") for phase in phases),
            "-" if speed is None else f"{speed:.4g}",
        )
    table.caption = f"{plan.hardware}; batch {plan.batch}, prompt of {plan.tokens} tokens"
    if plan.budgets:
        table.caption += (
            f"; fits: {', '.join(budget.text for budget in plan.budgets)}, and the memory"
        )
    return table
