"""Secrets that texts may hold: passwords of addresses, tokens."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from mpq.core.access import PREFIX
from mpq.core.jobs import JobSpec
from mpq.datatable import DataTable

_PERHAPS = re.compile(rf"(?i)://|pass|secret|key|token|bearer|hf_|{PREFIX}")  # cheaper than all
# Every repetition is bounded: a text of others must not take longer than its length.
_SECRETS = (
    (re.compile(r"([a-zA-Z][\w+.-]{0,30}://[^\s:/@]{0,200}):[^\s@]{0,500}@"), r"\1:***@"),
    (
        re.compile(
            r"(?i)\b((?:password|passwd|secret|api_?key|access_?key|token)\s{0,5}(?:=|:(?=\s))\s{0,5})"
            r"(?:'[^']{0,500}'|\"[^\"]{0,500}\"|[^\s&,;]{1,500})"
        ),
        r"\1***",
    ),
    (re.compile(rf"\b(?:{PREFIX}|hf_)[\w-]{{16,}}"), "***"),
    (re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}"), r"\1***"),
)


def masked_text(text: str) -> str:
    """Return a text in which no password or token can be read."""
    if _PERHAPS.search(text) is None:
        return text
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text


def masked_job(spec: JobSpec) -> dict[str, Any]:
    """Return the keys of a job in which no password or token can be read."""
    found: dict[str, Any] = masked(dataclasses.asdict(spec))
    return found


def masked_table(table: DataTable) -> DataTable:
    """Return a table in whose texts no password or token can be read."""
    columns = [
        dataclasses.replace(column, values=masked(list(column.values)))
        if column.kind == "text"
        else column
        for column in table.columns
    ]
    return dataclasses.replace(table, columns=tuple(columns))


def masked(value: Any) -> Any:
    """Return plain data in whose texts no password or token can be read."""
    if isinstance(value, str):
        return masked_text(value)
    if isinstance(value, dict):
        return {key: masked(item) for key, item in value.items()}
    return [masked(item) for item in value] if isinstance(value, list | tuple) else value
