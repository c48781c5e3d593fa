"""What a backend of measured kernels is, and how often its kernels take turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from hw_cost_models.measured.bandwidth import bytes_per_second
from hw_cost_models.measured.protocol import Op
from mpq.core.errors import InvalidInputError
from mpq.core.formats import Scheme
from mpq.core.latency import KernelCase
from mpq.core.layers import Layer

_MACS_PER_S = 40e9  # only to guess how long a kernel takes
_RUN_S = 1e-3  # wanted length of a run: far above its overhead, below a scheduler's time slice
_MOST_COPIES = 12  # in a run
_ROTATION_S = 30e-3  # a kernel so long that few fit in here is not waiting for memory
_MOST_WEIGHTS = 128
_MOST_BYTES = 64e6  # twice a large last-level cache: more weights make nothing colder

REFERENCE = Layer(
    name="reference",
    kind="linear",
    weight_shape=(256, 256),
    weight_id="reference",
    weight_bytes=256 * 256 * 4,
    input_shape=(64, 256),
    output_shape=(64, 256),
    macs=64 * 256 * 256,
    calls=1,
    order=0,
)


class KernelBackend(Protocol):
    """Real kernels of one library on this machine, ready to be timed: one file each."""

    @property
    def device(self) -> str:
        """The fingerprint that its times belong to."""

    def schemes(self, layer: Layer) -> Sequence[Scheme]:
        """Return what is worth trying for a layer, each with a kernel."""

    def why_not(self, layer: Layer, scheme: Scheme) -> str:
        """Return why nothing real runs a layer in a scheme, "" where something does."""

    def case(self, layer: Layer, scheme: Scheme) -> KernelCase:
        """Return what is timed; raises InvalidInputError (`no_kernel`) where nothing is."""

    def op(self, layer: Layer, scheme: Scheme) -> Op:
        """Return the kernel ready to run; raises InvalidInputError (`no_kernel`)."""

    def reference(self) -> Op:
        """Return the kernel that others are compared with: a small fp32 product."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """A run executes `copies` kernels, each on its own weights; `sets` runs are a whole turn.

    `read_s` is how long the weights of one execution take to be read from memory.
    """

    copies: int
    sets: int
    read_s: float


@dataclass(frozen=True, slots=True)
class NetworkSize:
    """How many weights the network has that a kernel is part of, in powers of two."""

    log2: int

    @classmethod
    def of(cls, weights: int) -> NetworkSize:
        """Return the power of two that is nearest, 2^30 at most."""
        return cls(min(round(math.log2(max(weights, 1))), 30))

    def within(self, case: KernelCase) -> KernelCase:
        """Return the case with the size in its shape."""
        thousands, rest = divmod(self.log2, 10)
        size = f"{2**rest}{('', 'Ki', 'Mi', 'Gi')[thousands]}"
        return replace(case, shape=f"{case.shape} in a network of {size} weights")

    def rotation(
        self,
        layer: Layer,
        scheme: Scheme,
        *,
        bytes_per_s: float | None = None,
        macs_per_s: float = _MACS_PER_S,
    ) -> Rotation:
        """Return how many weights take turns: the bytes of the network in the same scheme.

        At most 64 MB, 128 weights or some 30 ms. `bytes_per_s` is the speed of the memory, that
        of this machine's processor where it is not given; `macs_per_s` a guess.
        """
        guess_s = max(layer.macs / max(layer.calls, 1) / macs_per_s, 1e-9)
        # The same for all schemes of a layer, so that none has more of the overhead.
        affordable = int(_MOST_BYTES / max(4 * layer.num_weights, 1))
        copies = max(1, min(round(_RUN_S / guess_s), affordable, _MOST_COPIES))
        stored = max(layer.num_weights * scheme.weights.bits / 8, 1.0)
        network = 2**self.log2 * scheme.weights.bits / 8
        weights = math.ceil(min(_MOST_BYTES, network) / stored)
        weights = min(weights, _MOST_WEIGHTS, math.ceil(_ROTATION_S / guess_s))
        read_s = _rows_read(layer) * stored / (bytes_per_s or bytes_per_second())
        return Rotation(copies, math.ceil(weights / copies), read_s)


def checked_threads(num_threads: int) -> int:
    """Return the number of threads; raises InvalidInputError below 1."""
    if num_threads < 1:
        raise InvalidInputError("threads", f"threads are counted from 1, got {num_threads}")
    return num_threads


def _rows_read(layer: Layer) -> float:
    """Return the share of the weight that one call reads: all, but of an embedding some rows."""
    if layer.kind != "embedding":
        return 1.0
    return min(1.0, math.prod(layer.input_shape) / layer.weight_shape[0])
