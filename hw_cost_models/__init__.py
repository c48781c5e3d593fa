"""What a choice costs: one model per file, each chosen by the name its budgets use."""

from __future__ import annotations

import importlib
from typing import Any, cast

from mpq.core.errors import unknown
from mpq.core.protocols import CostModel

COST_MODELS: dict[str, str] = {
    "memory": "hw_cost_models.memory:Memory",
    "bops": "hw_cost_models.bops:BitOperations",
    "latency": "hw_cost_models.latency:MeasuredLatency",
}


def get_cost_model(name: str, **options: Any) -> CostModel:
    """Return the cost model of that name, made with `options`.

    Only the module that is asked for is imported. Raises InvalidInputError for an unknown name.
    """
    if name not in COST_MODELS:
        raise unknown("cost model", name, COST_MODELS)
    module, _, attribute = COST_MODELS[name].partition(":")
    return cast(CostModel, getattr(importlib.import_module(module), attribute)(**options))
