"""Tables as JSON, and as files that other tools read."""

from __future__ import annotations

import json
from typing import Any, Literal

from fastapi import Response
from pydantic import BaseModel

from mpq.datatable import DataTable, Kind

FileSuffix = Literal["csv", "json", "jsonl", "parquet"]
_MEDIA = {
    "csv": "text/csv; charset=utf-8",
    "json": "application/json",
    "jsonl": "application/jsonl",
    "parquet": "application/vnd.apache.parquet",
}


class ColumnView(BaseModel):
    """A named column; missing and infinite numbers are null, moments ISO 8601."""

    name: str
    kind: Kind
    values: list[Any]


class TableView(BaseModel):
    """Columns of equal length, in order."""

    name: str
    columns: list[ColumnView]


def told_table(table: DataTable) -> Response:
    """Return a table as JSON, column by column, at once: large ones are slow to check."""
    return Response(json.dumps(table.plain(), allow_nan=False), media_type=_MEDIA["json"])


def sent(table: DataTable, suffix: FileSuffix) -> Response:
    """Return a table as a file; texts that a spreadsheet would run are harmless in CSV."""
    content: str | bytes
    if suffix == "parquet":
        content = table.parquet()
    elif suffix == "json":
        content = "[" + table.jsonl().rstrip("\n").replace("\n", ",\n") + "]"
    else:
        content = table.csv() if suffix == "csv" else table.jsonl()
    name = f'attachment; filename="mpq-{table.name}.{suffix}"'
    return Response(content, media_type=_MEDIA[suffix], headers={"Content-Disposition": name})
