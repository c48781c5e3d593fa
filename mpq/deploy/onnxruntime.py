"""ONNX models in ONNX Runtime on this CPU: what they return and how long they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hw_cost_models.measured.onnxruntime import session_options
from mpq.deploy.target import NUM_THREADS

Feeds = Mapping[str, npt.NDArray[Any]]


class Session:
    """A loaded model on one thread."""

    def __init__(self, serialized: bytes) -> None:
        import onnxruntime as ort

        self._session = ort.InferenceSession(
            serialized, session_options(NUM_THREADS), providers=["CPUExecutionProvider"]
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
