"""The torch backend: kernels of torch's x86 quantized engine, and torch's own in fp32."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from hw_cost_models.measured.backend import REFERENCE, NetworkSize, checked_threads
from hw_cost_models.measured.device import device_fingerprint
from hw_cost_models.measured.protocol import Op
from hw_cost_models.measured.torch_capability import BACKEND, default_schemes, kernel_for, why_not
from hw_cost_models.measured.torch_kernels import kernel_input, make_kernel
from hw_cost_models.measured.torch_modules import ENGINE, quiet
from mpq.core.errors import InvalidInputError
from mpq.core.formats import FP32, Scheme
from mpq.core.latency import KernelCase
from mpq.core.layers import Layer


class TorchCpu:
    """Kernels of torch on this processor with a fixed number of threads.

    A run is one call of a TorchScript module that holds several copies of the kernel, each with
    its own weights, as a deployed network holds its layers: an operator of the engine that Python
    calls takes 10 microseconds more. Runs rotate over weights as those of ONNX Runtime do. The
    input stays in place, the output is allocated in every call. Raises InvalidInputError
    (`no_engine`) where torch is built without the engine.
    """

    def __init__(
        self, *, num_threads: int = 1, network_weights: int = 2**23, seed: int = 0
    ) -> None:
        engines = torch.backends.quantized.supported_engines
        if ENGINE not in engines:
            raise InvalidInputError(
                "no_engine",
                f"local:{BACKEND} needs torch's quantized engine {ENGINE!r}, which this torch "
                f"lacks (it has {', '.join(engines) or 'none'}): use hardware='local'",
            )
        self.num_threads = checked_threads(num_threads)
        self.device = device_fingerprint(num_threads, "torch", f"{ENGINE} in TorchScript")
        self._network = NetworkSize.of(network_weights)
        self._seed = seed

    def schemes(self, layer: Layer) -> tuple[Scheme, ...]:
        """Return what is worth trying for a layer, none wider than its weights."""
        return default_schemes(layer)

    def why_not(self, layer: Layer, scheme: Scheme) -> str:
        """Return why nothing runs a layer in a scheme, "" where something does."""
        return why_not(layer, scheme)

    def case(self, layer: Layer, scheme: Scheme) -> KernelCase:
        """Return what is timed; raises InvalidInputError (`no_kernel`)."""
        case = kernel_for(layer, scheme)
        if case is None:
            raise InvalidInputError("no_kernel", why_not(layer, scheme))
        return self._network.within(case)

    def op(self, layer: Layer, scheme: Scheme) -> Op:
        """Return the kernel ready to run; up to 64 MB of weights, or one weight."""
        case, turns = self.case(layer, scheme), self._network.rotation(layer, scheme)
        generator = torch.Generator().manual_seed(self._seed)
        first = torch.randn(layer.weight_shape, generator=generator)
        x = kernel_input(layer, generator)
        kernels = [
            make_kernel(layer, scheme, first.roll(17 * i))  # other values, cheaply
            for i in range(turns.copies * turns.sets)
        ]
        with quiet():
            sets = [
                torch.jit.script(_Turn(kernels[i :: turns.sets])).eval() for i in range(turns.sets)
            ]
        rotation = itertools.cycle(sets)

        def run() -> None:
            with threads(self.num_threads), torch.inference_mode():
                next(rotation)(x)

        return Op(case, run, turns.copies, turns.sets, turns.read_s)

    def reference(self) -> Op:
        """Return the kernel that others are compared with: a small fp32 product."""
        small = TorchCpu(num_threads=self.num_threads, network_weights=2**20, seed=self._seed)
        return small.op(REFERENCE, Scheme(FP32))


class _Turn(nn.Module):
    """Applies kernels to one input, one after the other.

    TorchScript drops what nobody reads, and memory that is kept is not in the cache for the next:
    so outputs are counted and let go.
    """

    def __init__(self, kernels: Sequence[nn.Module]) -> None:
        super().__init__()
        self.kernels = nn.ModuleList(kernels)

    def forward(self, x: torch.Tensor) -> int:
        """Return how many elements all outputs have."""
        elements = 0
        for kernel in self.kernels:
            elements += kernel(x).numel()
        return elements


@contextmanager
def threads(wanted: int) -> Iterator[None]:
    """Let torch compute on that many threads."""
    before = torch.get_num_threads()
    if before == wanted:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
