"""What choices cost, and which of them this machine can run when its time is budgeted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mpq.core.errors import InvalidInputError
from mpq.core.formats import Scheme
from mpq.core.layers import Layer, LayerGraph, UnitName
from mpq.core.problem import BudgetText
from mpq.core.tables import Cells, CostTable
from mpq.progress import Progress
from mpq.store.store import Store
