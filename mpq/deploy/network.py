"""A network in ONNX Runtime: exported once, then in fp32 or in any mix of formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mpq.core.errors import InvalidInputError
from mpq.core.formats import FP32, Scheme
from mpq.core.layers import LayerGraph, LayerName
from mpq.deploy.marked import MarkedGraph, export_marked
from mpq.deploy.onnx_model import with_kernels
from mpq.deploy.onnxruntime import Session
from mpq.deploy.placed import Placed, markable, place, with_output_limits
from mpq.deploy.served import feeds, of_another_size
from mpq.deploy.tails import Tail, tails
from mpq.nn.batches import Batch, call
from mpq.nn.patch import evaluating, quantized
from mpq.nn.quantizers import WeightQuantizer

FAITHFUL = 1e-3  # relative difference that rounding in another order may make in fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxNetwork:
    """A network as a marked graph, and its fp32 form, which computes as torch does.

    `tails` are those of its layers, taken where they run in integers.
    """

    model: nn.Module
    graph: LayerGraph
    sample: Batch
    marked: MarkedGraph
    tails: Mapping[LayerName, Tail]
    fp32: bytes

    @classmethod
    def export(cls, model: nn.Module, graph: LayerGraph, sample: Batch) -> OnnxNetwork:
        """Export for batches of any size where that works, else for the sample's alone.

        Raises InvalidInputError (`no_onnx`, `no_node`, `no_kernel`) where the network cannot be
        exported, or its fp32 form returns something else than torch.
        """
        names = markable(model, graph)
        placed = place(model, graph, dict.fromkeys(names, Scheme(FP32)), WeightQuantizer())
        other = of_another_size(sample)
        reason = ""
        for any_batch in (True, False):
            marked = export_marked(model, sample, names, any_batch=any_batch)
            serialized = with_kernels(marked, placed)
            try:
                session = Session(serialized)
                differences = [
                    relative(session.output(feeds(model, batch)), _output(model, batch))
                    for batch in ((sample, other) if any_batch else (sample,))
                ]
            except Exception as error:  # ONNX Runtime has kinds of its own
                reason = (str(error).strip().splitlines() or [repr(error)])[0]
                continue
            if max(differences) <= FAITHFUL:
                return cls(
                    model=model,
                    graph=graph,
                    sample=sample,
                    marked=marked,
                    tails=tails(marked, _biases(placed)),
                    fp32=serialized,
                )
            reason = f"its outputs differ from torch's by {max(differences):.2g}"
        raise InvalidInputError("no_onnx", f"the exported network is not the network: {reason}")

    def mixed(
        self,
        schemes: Mapping[LayerName, Scheme],
        quantizer: WeightQuantizer,
        calibration: Sequence[Batch],
    ) -> tuple[bytes, dict[LayerName, Placed]]:
        """Return the model in which each layer's kernel runs its scheme, and what was placed.

        Ranges of the outputs of integer convolutions come from the calibration batches.
        """
        placed = place(self.model, self.graph, schemes, quantizer, tails=self.tails)
        with self._quantized(schemes, quantizer):
            placed = with_output_limits(self.model, placed, calibration)
        return with_kernels(self.marked, placed), placed

    def fake_quantized_output(
        self, schemes: Mapping[LayerName, Scheme], quantizer: WeightQuantizer, batch: Batch
    ) -> npt.NDArray[np.float32]:
        """Return what the search takes the network to compute."""
        with self._quantized(schemes, quantizer):
            return _output(self.model, batch)

    def _quantized(
        self, schemes: Mapping[LayerName, Scheme], quantizer: WeightQuantizer
    ) -> AbstractContextManager[nn.Module]:
        limits = self.graph.input_ranges
        return quantized(self.model, schemes, quantizer=quantizer, limits=limits)


def _biases(placed: Mapping[LayerName, Placed]) -> dict[LayerName, npt.NDArray[np.float32]]:
    """Return the bias of each convolution, zeros where it has none."""
    return {
        name: np.zeros(p.layer.weight_shape[0], np.float32) if p.bias is None else p.bias
        for name, p in placed.items()
        if p.layer.kind in ("conv1d", "conv2d")
    }


def _output(model: nn.Module, batch: Batch) -> npt.NDArray[np.float32]:
    with evaluating(model), torch.no_grad():
        array: npt.NDArray[np.float32] = call(model, batch).numpy()
        return array


def relative(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Return the root mean square of a difference over that of what was expected."""
    if found.shape != expected.shape:
        return float("inf")
    off = np.sqrt(np.square(found - expected, dtype=np.float64).mean())
    size = np.sqrt(np.square(expected, dtype=np.float64).mean())
    return float(off / size) if size > 0 else float(off)
