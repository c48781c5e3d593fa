"""ONNX Runtime as a target: one ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from hw_cost_models.measured.capability import BACKEND
from hw_cost_models.measured.device import device_fingerprint
from hw_cost_models.measured.onnxruntime import OnnxRuntime
from hw_cost_models.measured.protocol import Op
from mpq.core.formats import Scheme
from mpq.core.layers import LayerGraph, LayerName
from mpq.deploy.neighbours import neighbours
from mpq.deploy.network import OnnxNetwork
from mpq.deploy.onnx_model import stored_bytes
from mpq.deploy.onnxruntime import Session
from mpq.deploy.placed import Placed
from mpq.deploy.rounding import as_kernels
from mpq.deploy.served import feeds
from mpq.deploy.target import NUM_THREADS, Array
from mpq.nn.batches import Batch
from mpq.nn.quantizers import WeightQuantizer


@dataclass(frozen=True)
class _Loaded:
    model: nn.Module
    serialized: bytes

    @cached_property
    def _session(self) -> Session:
        return Session(self.serialized)

    def output(self, batch: Batch) -> Array:
        return self._session.output(feeds(self.model, batch))

    def runner(self, batch: Batch) -> Callable[[], object]:
        return self._session.runner(feeds(self.model, batch))


@dataclass(frozen=True)
class _Written(_Loaded):
    placed: Mapping[LayerName, Placed]
    quantizer: WeightQuantizer

    @property
    def stored_bytes(self) -> int:
        return stored_bytes(self.serialized)

    def as_kernels(self) -> AbstractContextManager[nn.Module]:
        return as_kernels(self.model, self.placed, self.quantizer)


@dataclass(frozen=True)
class _Exported:
    network: OnnxNetwork

    @property
    def any_batch(self) -> bool:
        return self.network.marked.any_batch

    @cached_property
    def fp32(self) -> _Loaded:
        return _Loaded(self.network.model, self.network.fp32)

    def neighbours(self) -> Sequence[tuple[LayerName, LayerName]]:
        return neighbours(self.network.marked)

    def mixed(
        self,
        schemes: Mapping[LayerName, Scheme],
        quantizer: WeightQuantizer,
        calibration: Sequence[Batch],
    ) -> _Written:
        serialized, placed = self.network.mixed(schemes, quantizer, calibration)
        return _Written(self.network.model, serialized, placed, quantizer)


class OnnxRuntimeTarget:
    """ONNX Runtime's CPU provider on one thread."""

    title, backend = "ONNX Runtime", BACKEND

    @property
    def device(self) -> str:
        """The fingerprint of this machine and the library."""
        return device_fingerprint(NUM_THREADS)

    def export(self, model: nn.Module, graph: LayerGraph, sample: Batch) -> _Exported:
        """Return the network as ONNX; raises InvalidInputError where it cannot be exported."""
        return _Exported(OnnxNetwork.export(model, graph, sample))

    def reference(self) -> Op:
        """Return a small fp32 product."""
        return OnnxRuntime(num_threads=NUM_THREADS).reference()
