"""Modelled seconds of the products of attention, which hold no weights."""

from __future__ import annotations

from hw_cost_models.machines import Machine
from mpq.core.attention import Attention
from mpq.core.formats import NATIVE_BITS


def prefill_seconds(
    machine: Machine, attention: Attention, family: str, tokens: int, batch: int
) -> float:
    """Return the seconds of a prompt's attention: one fused kernel a layer, a roofline.

    Queries, keys, values and outputs are moved once, no matrix of weights is ever written.
    """
    rows = 2 * (attention.heads + attention.kv_heads) * attention.head_dim * tokens * batch
    moved = rows * len(attention.windows) * NATIVE_BITS[family] / 8
    return _seconds(machine, attention, family, attention.prefill_macs(tokens, batch), moved)


def decode_seconds(
    machine: Machine, attention: Attention, family: str, context: int, batch: int
) -> float:
    """Return the seconds of one more token's attention: the KV cache is read once."""
    element_bytes = NATIVE_BITS[family] // 8
    own = 2 * attention.heads * attention.head_dim * len(attention.windows) * batch
    moved = attention.cache_bytes(context, batch, element_bytes) + own * element_bytes
    return _seconds(machine, attention, family, attention.decode_macs(context, batch), moved)


def _seconds(machine: Machine, attention: Attention, family: str, macs: int, moved: float) -> float:
    peak = machine.peaks.get(family, machine.peaks["fp32"])
    launches = len(attention.windows) * machine.launch_s
    return max(2 * macs / peak, moved / machine.bandwidth) + launches
