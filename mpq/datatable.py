"""Tables that other tools read: CSV, JSON lines, Parquet, pandas and Arrow."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self, get_args

from mpq.core.errors import InvalidInputError, unknown

Kind = Literal["text", "int", "float", "time"]
FileFormat = Literal["csv", "jsonl", "parquet"]
FILE_FORMATS: tuple[str, ...] = get_args(FileFormat)
# A spreadsheet takes a text that begins so for a formula, which may run programs.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


@dataclass(frozen=True, slots=True)
class Column:
    """A named column; None is a missing value in each kind, as is NaN in "float"."""

    name: str
    kind: Kind
    values: Sequence[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataTable:
    """Columns of equal length, in order."""

    name: str
    columns: tuple[Column, ...]

    def __len__(self) -> int:
        return len(self.columns[0].values) if self.columns else 0

    def __getitem__(self, name: str) -> Sequence[Any]:
        for column in self.columns:
            if column.name == name:
                return column.values
        raise unknown("column", name, [column.name for column in self.columns])

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Yield the rows."""
        yield from zip(*(column.values for column in self.columns), strict=True)

    def csv(self) -> str:
        """Return the table as CSV: missing values are empty, moments ISO 8601.

        A text that a spreadsheet would take for a formula (=, +, -, @, tab or line break first)
        gets an apostrophe before it.
        """
        to = io.StringIO()
        writer = csv.writer(to)  # CRLF: only so is a lone CR in a text quoted
        writer.writerow([_harmless(column.name) for column in self.columns])
        writer.writerows([_csv_cell(value) for value in row] for row in self.rows())
        return to.getvalue()

    def jsonl(self) -> str:
        """Return one JSON object a line; missing and infinite numbers are null."""
        names = [column.name for column in self.columns]
        lines = [
            json.dumps(dict(zip(names, map(_json_value, row), strict=True)), ensure_ascii=False)
            for row in self.rows()
        ]
        return "".join(f"{line}\n" for line in lines)

    def plain(self) -> dict[str, Any]:
        """Return its columns as JSON can hold them; missing and infinite numbers are None."""
        columns = [
            {"name": c.name, "kind": c.kind, "values": [_json_value(v) for v in c.values]}
            for c in self.columns
        ]
        return {"name": self.name, "columns": columns}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Read what `plain` returned."""
        columns = tuple(
            Column(c["name"], c["kind"], [_read_value(v, c["kind"]) for v in c["values"]])
            for c in plain["columns"]
        )
        return cls(name=plain["name"], columns=columns)

    def parquet(self) -> bytes:
        """Return a Parquet file; raises InvalidInputError (`library`) without pyarrow."""
        table = self.arrow()
        from pyarrow import parquet

        to = io.BytesIO()
        parquet.write_table(table, to)
        return to.getvalue()

    def arrow(self) -> Any:
        """Return a `pyarrow.Table`; raises InvalidInputError (`library`) without pyarrow."""
        try:
            import pyarrow as pa
        except ImportError:
            raise _lacking("Parquet and Arrow", "pyarrow") from None
        kinds = {
            "text": pa.string(),
            "int": pa.int64(),
            "float": pa.float64(),
            "time": pa.timestamp("us", tz="UTC"),
        }
        arrays = [
            pa.array(list(column.values), kinds[column.kind], from_pandas=True)
            for column in self.columns
        ]
        return pa.Table.from_arrays(arrays, names=[column.name for column in self.columns])

    def pandas(self) -> Any:
        """Return a `pandas.DataFrame`; raises InvalidInputError (`library`) without pandas."""
        try:
            import pandas as pd
        except ImportError:
            raise _lacking("a data frame", "pandas") from None
        kinds = {"text": "object", "int": "Int64", "float": "float64"}
        frame = {
            column.name: pd.to_datetime(pd.Series(list(column.values), dtype="object"), utc=True)
            if column.kind == "time"
            else pd.Series(list(column.values), dtype=kinds[column.kind])
            for column in self.columns
        }
        return pd.DataFrame(frame)

    def write(self, path: str | Path, as_format: str | None = None) -> Path:
        """Write a file and return its path; the format is that of its suffix unless given.

        A file is there whole or not at all. Raises InvalidInputError.
        """
        from mpq.report import check_writable

        path = Path(path)
        wanted = checked_format(as_format or path.suffix.removeprefix("."))
        check_writable(path)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            if wanted == "parquet":
                unfinished.write_bytes(self.parquet())
            else:
                text = self.csv() if wanted == "csv" else self.jsonl()
                unfinished.write_text(text, encoding="utf-8", newline="")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        return path


def checked_format(text: str) -> str:
    """Return the name of a file format; raises InvalidInputError (`unknown_file_format`)."""
    if text not in FILE_FORMATS:
        raise unknown("file format", text, FILE_FORMATS)
    return text


def _harmless(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text


def _csv_cell(value: Any) -> Any:
    if isinstance(value, str):
        return _harmless(value)
    if isinstance(value, float) and math.isnan(value):
        return None
    return value.isoformat() if isinstance(value, datetime) else value


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.isoformat() if isinstance(value, datetime) else value


def _read_value(value: Any, kind: Kind) -> Any:
    if kind == "float":
        return math.nan if value is None else float(value)
    return datetime.fromisoformat(value) if kind == "time" and value is not None else value


def _lacking(what: str, package: str) -> InvalidInputError:
    return InvalidInputError("library", f"{what} needs {package}: pip install 'mpq-search[tables]'")
