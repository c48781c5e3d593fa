"""Choose the number format of every layer under memory and measured-latency budgets."""

from __future__ import annotations

from mpq.core.errors import (
    InfeasibleError,
    InvalidInputError,
    MpqError,
    RunFailedError,
    StorageError,
)
from mpq.core.formats import Format, Scheme, parse_format, parse_scheme
from mpq.core.problem import Allocation, Budget, Frontier, Problem, Solution, Status
from mpq.core.tables import Cells, CostTable, Responses, SensitivityTable

__version__ = "0.1.0"
