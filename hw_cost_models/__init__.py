"""What a choice costs: one model per file, each chosen by the name its budgets use."""

from __future__ import annotations

import importlib
from typing import Any, cast

from mpq.core.errors import unknown
from mpq.core.protocols import CostModel, LatencyModel

COST_MODELS: dict[str, str] = {
    "memory": "hw_cost_models.memory:Memory",
    "bops": "hw_cost_models.bops:BitOperations",
    "latency": "hw_cost_models.latency:MeasuredLatency",
    "macs": "hw_cost_models.macs:Macs",
    "energy": "hw_cost_models.energy:Energy",
    "luts": "hw_cost_models.luts:Luts",
    "resident": "hw_cost_models.resident:Resident",
    "peak": "hw_cost_models.resident:Peak",
}
# Times of machines that are not here, by how they are written: "roofline:H100".
HARDWARE: dict[str, str] = {
    "roofline": "hw_cost_models.roofline:Roofline",
    "table": "hw_cost_models.table:LatencyTable",
    "bitplanes": "hw_cost_models.bitplanes:BitPlanes",
}
LOCAL = "local"  # this machine's kernels, measured


def get_cost_model(name: str, **options: Any) -> CostModel:
    """Return the cost model of that name, made with `options`.

    Only the module that is asked for is imported. Raises InvalidInputError for an unknown name.
    """
    if name not in COST_MODELS:
        raise unknown("cost model", name, COST_MODELS)
    return cast(CostModel, _loaded(COST_MODELS[name])(**options))


def get_hardware(text: str) -> LatencyModel:
    """Return the latency model that a text such as "roofline:H100" or "table:FILE.csv" names.

    Raises InvalidInputError with the nearest known text.
    """
    kind, colon, argument = text.partition(":") if isinstance(text, str) else ("", "", "")
    if not colon or kind not in HARDWARE or (kind == "roofline" and not argument):
        from hw_cost_models.roofline import presets

        raise unknown("hardware", text, [LOCAL, *presets(), *_WRITTEN])
    return cast(LatencyModel, _loaded(HARDWARE[kind]).parse(argument))


_WRITTEN = ("table:FILE.csv", "bitplanes:a=SECONDS,c=SECONDS")


def _loaded(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)
