"""What a network would take on a machine, before anything is loaded or scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpq.core.problem import Allocation, Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """One allocation: its bytes, and its modelled seconds.

    `bits` is the mean over the searched weights with all that their schemes store, `seconds` has
    "prefill" (a whole prompt) and "decode" (one more token of every sequence) of a language model,
    else "forward"; with profiles each of them and "latency". `resident_bytes` are weights and KV
    cache; what `fits` keeps within the memory and every budget.
    """

    name: str
    bits: float
    weight_bytes: int
    resident_bytes: int
    fits: bool
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Bytes and modelled times of uniform schemes and of an allocation with the asked mean bits.

    `chosen` has no more than the asked bits. Nothing was scored: where no uniform scheme has them,
    units take the two nearest schemes by size alone (`allocation`).
    """

    model: str
    machine: str
    hardware: str
    layers: int
    units: int
    parameters: int
    searched_weights: int
    native_bytes: int
    memory_bytes: int
    kv_cache_bytes: int
    batch: int
    tokens: int
    context: int
    uniform: tuple[PlanRow, ...]
    chosen: PlanRow
    allocation: Allocation
    notes: tuple[str, ...]
    budgets: tuple[Budget, ...] = ()
