"""What the text of a timed kernel says: the format of its weights and activations."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mpq.core.latency import KernelCase

NETWORK = "network"
_WITHIN = re.compile(r" in a network of (?P<size>\S+) weights$")
_BLOCKS = re.compile(r"\bbits=(?P<bits>\d+) block=(?P<block>\d+)")
_PACKED = re.compile(r"_weight_int(?P<bits>\d+)pack_mm block=(?P<block>\d+)")
_NATIVE = re.compile(r"(?<![a-z0-9])(?P<family>fp32|fp16|bf16|fp64)\b")
_DIGEST = re.compile(r"(?<= [0-9a-f]{8})[0-9a-f]{24}$")  # of a network, of a mix
_BITS = {"fp32": 32, "fp64": 64, "fp16": 16, "bf16": 16}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelName:
    """A kernel apart: `label` is its format, `bits` those of its weights (None: a mix, unknown).

    `shape` is that of the operands, `size` the weights of the network it was timed within; what
    a whole network or a mix of formats is told by is cut.
    """

    family: str
    shape: str
    size: str
    label: str
    bits: int | None


def kernel_name(case: KernelCase) -> KernelName:
    """Read what was timed; a kernel that is not known keeps its whole text as its label."""
    within = _WITHIN.search(case.shape)
    shape = case.shape[: within.start()] if within else case.shape
    size = within["size"] if within else ""
    if case.kernel.startswith(f"{NETWORK} "):
        label = _DIGEST.sub("", case.kernel.removeprefix(f"{NETWORK} "))
        shape, bits = _DIGEST.sub("", shape), _BITS.get(label)
        return KernelName(family=NETWORK, shape=shape, size=size, label=label, bits=bits)
    label, bits = _format(case.kernel)
    family = shape.partition(" ")[0]
    return KernelName(family=family, shape=shape, size=size, label=label, bits=bits)


def _format(kernel: str) -> tuple[str, int | None]:
    if found := _BLOCKS.search(kernel):
        zero = "a" if "zero_points" in kernel else ""
        return f"int{found['bits']}g{found['block']}{zero}", int(found["bits"])
    if found := _PACKED.search(kernel):
        return f"int{found['bits']}g{found['block']}a", int(found["bits"])
    if "_int_mm" in kernel:
        return "int8:int8s", 8
    if re.search(r"\b[us]8 weights", kernel):
        weights = "int8t" if kernel.endswith("per tensor") else "int8"
        reduced = "reduce_range" in kernel or "clamp+" in kernel
        is_static = any(mark in kernel for mark in ("IntegerToFloat", "with_input_q_dq"))
        return f"{weights}:int{7 if reduced else 8}{'static' if is_static else ''}", 8
    if kernel.startswith("quantized::linear_dynamic_fp16"):
        return "fp16", 16
    if found := _NATIVE.search(kernel):
        return found["family"], _BITS[found["family"]]
    return kernel, None
