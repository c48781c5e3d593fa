"""Column types that give back exactly what was put in."""

from __future__ import annotations

import functools
import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import JSON, DateTime, Dialect, Double, String
from sqlalchemy.types import TypeDecorator

from mpq.core.errors import InvalidInputError, StorageError

if TYPE_CHECKING:
    from pydantic import TypeAdapter


class PlainText(TypeDecorator[str]):
    """Text without NUL characters, which SQLite would keep and PostgreSQL refuses."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Raise InvalidInputError (`text`) for text with a NUL."""
        if value is not None and "\0" in value:
            raise InvalidInputError("text", f"{value[:80]!r} cannot be stored: it has a NUL")
        return value


class UtcTime(TypeDecorator[datetime]):
    """A moment in UTC; comes back aware, also from SQLite, which keeps no zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Turn any aware moment into UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Mark a moment without zone as UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class NanDouble(TypeDecorator[float]):
    """A float that is never None but may be NaN, which is kept as NULL.

    SQLite turns NaN into NULL by itself; infinities it keeps.
    """

    impl = Double
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:
        """Turn NaN into NULL."""
        return None if value is None or math.isnan(value) else float(value)

    def process_result_value(self, value: float | None, dialect: Dialect) -> float:
        """Turn NULL into NaN."""
        return math.nan if value is None else value


class Json(TypeDecorator[Any]):
    """A frozen record, or tuples and mappings of such, as JSON text.

    NaN and infinities, which JSON does not have, become the strings "nan", "inf" and "-inf",
    which fields of type float read back. None becomes NULL.
    """

    impl = JSON(none_as_null=True)
    cache_ok = True

    def __init__(self, record: Any) -> None:
        super().__init__()
        self.record = record

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        """Turn a record into what JSON can hold.

        Raises InvalidInputError (`record`) for one that could not be read back.
        """
        if value is None:
            return None
        adapter = _adapter(self.record)
        try:
            plain = _without_nan(adapter.dump_python(value, mode="json", warnings=False))
            adapter.validate_python(plain)
        except ValueError as error:
            raise InvalidInputError("record", f"cannot store {self._said(error)}") from None
        return plain

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        """Turn what JSON held into the record; raises StorageError (`storage_corrupt`)."""
        if value is None:
            return None
        try:
            return _adapter(self.record).validate_python(value)
        except (ValueError, InvalidInputError) as error:
            raise StorageError("storage_corrupt", f"cannot read {self._said(error)}") from None

    def _said(self, error: Exception) -> str:
        name = getattr(self.record, "__name__", str(self.record))
        if not hasattr(error, "errors"):
            return f"a {name}: {error}"
        first = error.errors()[0]  # of pydantic's ValidationError
        place = ".".join(map(str, first["loc"]))
        return f"a {name} with {place} = {first['input']!r}: {first['msg']}"


@functools.cache
def _adapter(record: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter  # late: opening a database does not need it

    return TypeAdapter(record)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return value
