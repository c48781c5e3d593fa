"""Records as plain data that JSON can hold."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np


def finite_json(value: Any) -> Any:
    """Return a record as dicts, lists, numbers and texts; NaN and infinities become None."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value.value if isinstance(value, enum.Enum) else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (part.name for part in dataclasses.fields(value))
        return {name: finite_json(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): finite_json(part) for key, part in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return finite_json(value.tolist())
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Sequence | set | frozenset):
        return [finite_json(part) for part in value]
    return str(value)
