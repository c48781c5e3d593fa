"""The ONNX Runtime backend: kernels as operations that a stopwatch can time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from hw_cost_models.measured.backend import REFERENCE, NetworkSize, checked_threads
from hw_cost_models.measured.capability import default_schemes, kernel_for, why_no_kernel
from hw_cost_models.measured.device import device_fingerprint
from hw_cost_models.measured.operands import Float32
from hw_cost_models.measured.protocol import Op
from mpq.core.errors import InvalidInputError
from mpq.core.formats import FP32, Scheme
from mpq.core.latency import KernelCase
from mpq.core.layers import Layer


class OnnxRuntime:
    """Kernels of ONNX Runtime's CPU provider with a fixed number of threads.

    A run is one session call on a graph with several copies of the kernel, each with its own
    weights, so that the overhead of a session call (some microseconds, which a layer inside a
    network does not have) is shared; what is left of it, under half a microsecond a kernel,
    is not subtracted. Runs rotate over sessions with weights of their own, as many as take the
    bytes of a network of `network_weights` weights in the same scheme (at most 64 MB, 128
    weights or some 30 ms): so a weight is found in the cache or in memory as it would be in that
    network, when it runs again and again. The size counts in powers of two and is a part of the
    case. Inputs and outputs stay in place, as the layer before and after would have them.
    """

    def __init__(
        self, *, num_threads: int = 1, network_weights: int = 2**23, seed: int = 0
    ) -> None:
        self.num_threads = checked_threads(num_threads)
        self.device = device_fingerprint(num_threads)
        self._network = NetworkSize.of(network_weights)
        self._seed = seed

    def schemes(self, layer: Layer) -> tuple[Scheme, ...]:
        """Return what is worth trying for a layer."""
        return default_schemes(layer)

    def why_not(self, layer: Layer, scheme: Scheme) -> str:
        """Return why nothing runs a layer in a scheme, "" where something does."""
        return why_no_kernel(layer, scheme)

    def case(self, layer: Layer, scheme: Scheme) -> KernelCase:
        """Return what is timed for a layer in a scheme.

        Raises InvalidInputError (`no_kernel`) where nothing real runs it.
        """
        case = kernel_for(layer, scheme)
        if case is None:
            raise InvalidInputError("no_kernel", why_no_kernel(layer, scheme))
        return self._network.within(case)

    def op(self, layer: Layer, scheme: Scheme) -> Op:
        """Return the kernel of a layer in a scheme, ready to run.

        Memory: up to 64 MB of weights, or one weight. Raises InvalidInputError (`no_kernel`).
        """
        case = self.case(layer, scheme)
        turns = self._network.rotation(layer, scheme)
        run = self._rotating(layer, scheme, turns.copies, turns.sets)
        return Op(case, run, turns.copies, turns.sets, turns.read_s)

    def reference(self) -> Op:
        """Return the kernel that others are compared with: a small fp32 product."""
        small = OnnxRuntime(num_threads=self.num_threads, network_weights=2**20, seed=self._seed)
        return small.op(REFERENCE, Scheme(FP32))

    def _rotating(
        self, layer: Layer, scheme: Scheme, copies: int, sessions: int
    ) -> Callable[[], object]:
        import onnxruntime as ort

        from hw_cost_models.measured.graphs import input_shape, kernel_model, output_shape

        rng = np.random.default_rng(self._seed)
        shape = input_shape(layer)
        x = (
            rng.integers(0, layer.weight_shape[0], shape)
            if layer.kind == "embedding"
            else rng.standard_normal(shape, np.float32)
        )
        first: Float32 = rng.standard_normal(layer.weight_shape, np.float32)
        source = ort.OrtValue.ortvalue_from_numpy(x)
        target = ort.OrtValue.ortvalue_from_numpy(np.zeros(output_shape(layer), np.float32))
        bound: list[tuple[Any, Any]] = []
        for s in range(sessions):
            numbers = range(s * copies, (s + 1) * copies)
            weights = [np.roll(first, 17 * n) for n in numbers]  # other values, cheaply
            session = ort.InferenceSession(
                kernel_model(layer, scheme, weights),
                session_options(self.num_threads),
                providers=["CPUExecutionProvider"],
            )
            binding = session.io_binding()
            binding.bind_ortvalue_input("x", source)
            for i in range(copies):
                binding.bind_ortvalue_output(f"y{i}", target)
            bound.append((session, binding))
        rotation = itertools.cycle(bound)

        def run() -> None:
            session, binding = next(rotation)
            session.run_with_iobinding(binding)

        return run


def session_options(num_threads: int) -> Any:
    """Return options with that many threads, which do not spin between two runs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options
