"""What a choice costs: one model per file, each chosen by the name its budgets use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, cast

from mpq.core.errors import InvalidInputError, unknown
from mpq.core.protocols import CostModel, LatencyModel

if TYPE_CHECKING:
    from hw_cost_models.measured.backend import KernelBackend

COST_MODELS: dict[str, str] = {
    "memory": "hw_cost_models.memory:Memory",
    "bops": "hw_cost_models.bops:BitOperations",
    "latency": "hw_cost_models.latency:MeasuredLatency",
    "macs": "hw_cost_models.macs:Macs",
    "energy": "hw_cost_models.energy:Energy",
    "luts": "hw_cost_models.luts:Luts",
    "resident": "hw_cost_models.resident:Resident",
    "peak": "hw_cost_models.resident:Peak",
    "kv_cache": "hw_cost_models.kv_cache:KvCache",
}
# Times of machines that are not here, by how they are written: "roofline:H100".
HARDWARE: dict[str, str] = {
    "roofline": "hw_cost_models.roofline:Roofline",
    "table": "hw_cost_models.table:LatencyTable",
    "bitplanes": "hw_cost_models.bitplanes:BitPlanes",
}
LOCAL = "local"  # this machine's kernels, measured; "local:torch_cpu" names whose
DEVICE = "device"  # a node of a cluster: "device:jetson", "device:jetson/torch_cpu"
KERNELS: dict[str, str] = {
    "onnxruntime": "hw_cost_models.measured.onnxruntime:OnnxRuntime",  # where none is named
    "torch_cpu": "hw_cost_models.measured.torch_cpu:TorchCpu",
    "cuda": "hw_cost_models.measured.cuda:Cuda",
}


def get_cost_model(name: str, **options: Any) -> CostModel:
    """Return the cost model of that name, made with `options`.

    Only the module that is asked for is imported. Raises InvalidInputError for an unknown name.
    """
    if name not in COST_MODELS:
        raise unknown("cost model", name, COST_MODELS)
    return cast(CostModel, _loaded(COST_MODELS[name])(**options))


def is_local(text: str) -> bool:
    """Tell whether a text such as "local" or "local:torch_cpu" means measured kernels."""
    return isinstance(text, str) and text.partition(":")[0] == LOCAL


def place_of(text: str) -> tuple[str, str]:
    """Return where measured kernels run, and whose: a node's device ("": here), "local:NAME".

    Raises InvalidInputError for "device:" without a name.
    """
    kind, _, rest = text.partition(":") if isinstance(text, str) else ("", "", "")
    if kind != DEVICE:
        return "", text
    device, slash, kernels = rest.partition("/")
    if not device or (slash and not kernels):
        raise InvalidInputError(
            "hardware", f"a node's hardware is 'device:NAME' or 'device:NAME/KERNELS', got {text!r}"
        )
    return device, f"{LOCAL}:{kernels}" if kernels else LOCAL


def is_measured(text: str) -> bool:
    """Tell whether a text means measured kernels, of this machine or of a node of a cluster."""
    return is_local(text) or (isinstance(text, str) and text.partition(":")[0] == DEVICE)


def get_kernels(text: str = LOCAL, **options: Any) -> KernelBackend:
    """Return the backend of measured kernels that "local" or "local:NAME" means.

    Raises InvalidInputError for an unknown name, and where this machine lacks what it needs.
    """
    _, colon, name = text.partition(":")
    if colon and name not in KERNELS:
        raise unknown("hardware", text, [LOCAL, *(f"{LOCAL}:{known}" for known in KERNELS)])
    return cast("KernelBackend", _loaded(KERNELS[name or "onnxruntime"])(**options))


def get_hardware(text: str) -> LatencyModel:
    """Return the latency model that a text such as "roofline:H100" or "table:FILE.csv" names.

    Raises InvalidInputError with the nearest known text.
    """
    kind, colon, argument = text.partition(":") if isinstance(text, str) else ("", "", "")
    if not colon or kind not in HARDWARE or (kind == "roofline" and not argument):
        from hw_cost_models.roofline import presets

        local = [LOCAL, *(f"{LOCAL}:{name}" for name in KERNELS)]
        raise unknown("hardware", text, [*local, f"{DEVICE}:NAME", *presets(), *_WRITTEN])
    return cast(LatencyModel, _loaded(HARDWARE[kind]).parse(argument))


_WRITTEN = ("table:FILE.csv", "bitplanes:a=SECONDS,c=SECONDS")


def _loaded(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)
