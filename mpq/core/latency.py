"""The time of one real kernel on one device."""

from __future__ import annotations

from dataclasses import dataclass

REST_INCLUDED = "with the rest of the network in fp32"  # in the provenance of a latency table


@dataclass(frozen=True, slots=True)
class KernelCase:
    """What was timed: a kernel of a backend on operands of a shape.

    `shape` is a canonical text such as "linear 64x384->1536"; `kernel` names the operator with
    everything that changes its code path ("MatMulNBits bits=4 block=64 accuracy_level=4").
    """

    backend: str
    kernel: str
    shape: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelLatency:
    """Median seconds of one call with its 95 % confidence interval.

    `device` is the fingerprint of machine, thread count and library versions: a time from
    another device is another time. `noisy` marks an interval wider than the protocol wants.
    """

    device: str
    case: KernelCase
    median_s: float
    low_s: float
    high_s: float
    rounds: int
    noisy: bool = False
