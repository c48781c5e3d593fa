"""Lists of runs, runs side by side and layers over runs, for a terminal."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.table import Table
from rich.text import Text

from mpq.comparison import Comparison
from mpq.console import new_console
from mpq.core.budgets import COST_UNITS
from mpq.core.errors import InvalidInputError
from mpq.core.live import short_source
from mpq.core.quantities import quantity
from mpq.datatable import DataTable, checked_format
from mpq.layer_use import LayerUses
from mpq.store.records import RunPage, RunSummary, TokenRecord


def print_page(page: RunPage, as_json: bool = False, number: str | None = None) -> None:
    """Print runs, one a line, with the memory of each and the number they are sorted by."""
    if as_json:
        print(json.dumps([run_plain(row) for row in page.rows], indent=2))
    else:
        numbers = list(dict.fromkeys(["memory", *([number] if number else []), "divergence"]))
        table = Table("run", "name", "state", "created (UTC)", "model", "budgets", box=None)
        for name in numbers:
            table.add_column(name, justify="right")
        for row in page.rows:
            run = row.run
            table.add_row(
                run.id,
                run.name,
                str(run.state),
                f"{run.created_at:%Y-%m-%d %H:%M:%S}",
                short_source(run.spec.model),
                ", ".join(run.spec.budgets),
                *(_shown(row, name) for name in numbers),
            )
        new_console().print(table)
    if page.cursor:
        typer.echo(f"more: mpq list ... --after {page.cursor}", err=True)


def run_plain(row: RunSummary) -> dict[str, object]:
    """Return a run of a list as plain data."""
    run = row.run
    return {
        "id": run.id,
        "name": run.name,
        "state": str(run.state),
        "model": run.spec.model,
        "metric": run.spec.metric,
        "created_at": run.created_at.isoformat(),
        "ended_at": run.ended_at.isoformat() if run.ended_at else None,
        "budgets": list(run.spec.budgets),
        "owner": row.owner,
        "tags": list(row.tags),
        "totals": dict(row.totals),
        "predicted": _or_none(row.predicted),
        "divergence": _or_none(row.divergence),
        "metrics": {name: _or_none(value) for name, value in row.metrics.items()},
    }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shown(row: RunSummary, name: str) -> str:
    of_run = {"divergence": row.divergence, "predicted": row.predicted}
    value = of_run.get(name, row.totals.get(name, row.metrics.get(name, math.nan)))
    if math.isnan(value):
        return "-"
    unit = COST_UNITS.get(name, "s" if name in row.totals else None)  # profiles are times
    return quantity(value, unit) if unit else f"{value:.4g}"


def print_comparison(found: Comparison, as_json: bool = False) -> None:
    """Print runs side by side: what differs of their jobs, numbers, and layers."""
    if as_json:
        print(json.dumps(found.view(), indent=2, default=str))
        return
    table = Table("", box=None, header_style="bold")
    for run, name in zip(found.runs, found.names, strict=True):
        table.add_column(f"{run}\n{name}" if name else run, justify="right")
    for key, values in found.settings.items():
        table.add_row(key, *(_setting(value) for value in values))
    for cost, totals in found.totals.items():
        unit = found.units_of_measure.get(cost)
        shown = [quantity(v, unit) if unit and math.isfinite(v) else _number(v) for v in totals]
        table.add_row(Text(cost, "bold"), *shown)
    for what, values in found.measured.items():
        errors = found.stderr[what]
        table.add_row(
            Text(what.replace("_", "-"), "bold"),
            *(
                _number(value) + (f" ± {error:.2g}" if error > 0 else "")
                for value, error in zip(values, errors, strict=True)
            ),
        )
    for layer, schemes in found.layers.items():
        table.add_row(layer, *(scheme or "-" for scheme in schemes))
    table.caption = f"{len(found.layers)} layers differ, {found.same} are the same"
    new_console().print(table)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _setting(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value in (None, "", {}) else str(value)


def print_layers(found: LayerUses, bits: int, as_json: bool = False) -> None:
    """Print how often each layer got how many weight bits, and which always got many."""
    always = found.always(bits)
    if as_json:
        view = {**found.view(), "always": {"bits": bits, "layers": list(always)}}
        print(json.dumps(view, indent=2))
        return
    widths = sorted({width for layer in found.layers for width in layer.bits})
    table = Table("layer", box=None, header_style="bold")
    for column in ("runs", *(f"{width} bit" for width in widths), "mean bits"):
        table.add_column(column, justify="right")
    table.add_column("schemes")
    for layer in found.layers:
        ordered = sorted(layer.schemes.items(), key=lambda pair: -pair[1])
        table.add_row(
            layer.layer,
            f"{layer.runs}",
            *(f"{layer.bits[width]}" if width in layer.bits else "-" for width in widths),
            f"{layer.mean_bits:.2f}",
            ", ".join(f"{scheme} {count}x" for scheme, count in ordered),
        )
    table.caption = f"chosen in {found.runs} runs of {found.model}"
    console = new_console()
    console.print(table)
    console.print(f"always {bits} bits or more: {', '.join(always) or 'none'}")


def print_tokens(tokens: Sequence[TokenRecord], as_json: bool = False) -> None:
    """Print who may ask the server; nothing of the secrets is known."""
    if as_json:
        print(json.dumps([dataclasses.asdict(token) for token in tokens], indent=2, default=str))
        return
    table = Table("token", "name", "scope", "valid until (UTC)", "last used", "state", box=None)
    for token in tokens:
        ended = "revoked" if token.revoked_at else "expired"
        table.add_row(
            token.id,
            token.name,
            token.scope.value,
            f"{token.expires_at:%Y-%m-%d %H:%M}",
            f"{token.used_at:%Y-%m-%d %H:00}" if token.used_at else "-",
            "valid" if token.is_valid else ended,
        )
    new_console().print(table)


def put_out(table: DataTable, as_format: str | None, out: Path | None) -> None:
    """Write a table to a file, or to standard output, where it is CSV unless said otherwise.

    Raises InvalidInputError for Parquet without a file.
    """
    if out is not None:
        table.write(out, as_format)
        typer.echo(f"{out}: {len(table)} rows", err=True)
        return
    wanted = checked_format(as_format or "csv")
    if wanted == "parquet":
        raise InvalidInputError("table_out", "Parquet is not text: name a file with --out FILE")
    typer.echo(table.csv() if wanted == "csv" else table.jsonl(), nl=False)
