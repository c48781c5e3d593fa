"""ONNX models in ONNX Runtime on this CPU: what they return and how long they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hw_cost_models.measured.bandwidth import bytes_per_second
from hw_cost_models.measured.capability import BACKEND
from hw_cost_models.measured.device import device_fingerprint
from hw_cost_models.measured.onnxruntime import OnnxRuntime, session_options
from hw_cost_models.measured.protocol import Op, Stopwatch
from mpq.core.latency import KernelCase, KernelLatency

_NUM_THREADS = 1  # as kernels are timed
Feeds = Mapping[str, npt.NDArray[Any]]


class Session:
    """A loaded model on one thread."""

    def __init__(self, serialized: bytes) -> None:
        import onnxruntime as ort

        self._session = ort.InferenceSession(
            serialized, session_options(_NUM_THREADS), providers=["CPUExecutionProvider"]
        )
        self._inputs = [given.name for given in self._session.get_inputs()]

    def output(self, feeds: Feeds) -> npt.NDArray[np.float32]:
        """Run on one batch; what the graph does not read is not passed."""
        (found,) = self._session.run(None, {name: feeds[name] for name in self._inputs})
        array: npt.NDArray[np.float32] = found
        return array

    def runner(self, feeds: Feeds) -> Callable[[], object]:
        """Return a function that runs on one batch that stays where it is."""
        import onnxruntime as ort

        binding = self._session.io_binding()
        for name in self._inputs:
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(feeds[name]))
        binding.bind_output(self._session.get_outputs()[0].name)

        def run() -> None:
            self._session.run_with_iobinding(binding)

        return run


def network_case(precision: str, shape: str) -> KernelCase:
    """Return what is timed when a whole network is, on a sample that `shape` describes."""
    return KernelCase(BACKEND, f"network {precision}", shape)


def time_networks(
    sessions: Sequence[Session],
    cases: Sequence[KernelCase],
    feeds: Feeds,
    stored: Sequence[int],
    *,
    seconds: float,
    seed: int = 0,
    stopwatch: Stopwatch | None = None,
) -> list[KernelLatency]:
    """Time whole networks side by side, each beside the reference kernel, on one thread.

    A network runs again and again, so that its weights are where a steady use finds them;
    `stored` bytes tell what share of its time may wait for memory. The clock is the thread's
    processor time: a network runs longer than a busy machine leaves a thread alone.
    """
    speed = bytes_per_second()
    ops = [
        Op(case, session.runner(feeds), read_s=size / speed)
        for session, case, size in zip(sessions, cases, stored, strict=True)
    ]
    stopwatch = stopwatch or Stopwatch(budget_s=seconds, seed=seed, clock=time.thread_time_ns)
    reference = OnnxRuntime(num_threads=_NUM_THREADS, seed=seed).reference()
    return stopwatch.measure(ops, reference, device_fingerprint(_NUM_THREADS))
