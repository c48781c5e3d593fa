"""What a runtime is that networks are deployed to: one file each."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
from torch import nn

from hw_cost_models.measured.protocol import Op
from mpq.core.errors import unknown
from mpq.core.formats import Scheme
from mpq.core.layers import LayerGraph, LayerName
from mpq.nn.batches import Batch
from mpq.nn.quantizers import WeightQuantizer

# Each has the name of the kernels that it runs: those of hardware "local:NAME".
TARGETS: dict[str, str] = {
    "onnxruntime": "mpq.deploy.onnx_target:OnnxRuntimeTarget",
    "torch_cpu": "mpq.deploy.torch_cpu:TorchCpuTarget",
}
Array = npt.NDArray[np.float32]
NUM_THREADS = 1  # as kernels are timed


class Loaded(Protocol):
    """A network in a runtime, on one thread."""

    def output(self, batch: Batch) -> Array:
        """Run on one batch."""

    def runner(self, batch: Batch) -> Callable[[], object]:
        """Return a function that runs on one batch that stays where it is."""


class Written(Loaded, Protocol):
    """A network in chosen formats, loaded from what is written to its file."""

    @property
    def serialized(self) -> bytes:
        """The content of the file."""

    @property
    def stored_bytes(self) -> int:
        """The bytes of the arrays in it."""

    def as_kernels(self) -> AbstractContextManager[nn.Module]:
        """Let the original model compute every rounding of the kernels, in torch."""


class Exported(Protocol):
    """A network in a form that the runtime takes: in fp32, or in any mix of formats."""

    @property
    def any_batch(self) -> bool:
        """Whether the first axis of inputs may have any size."""

    @property
    def fp32(self) -> Loaded:
        """The network as it is, which computes as torch does."""

    def neighbours(self) -> Sequence[tuple[LayerName, LayerName]]:
        """Return the pairs of layers that pass each other codes where both run in 8 bits."""

    def mixed(
        self,
        schemes: Mapping[LayerName, Scheme],
        quantizer: WeightQuantizer,
        calibration: Sequence[Batch],
    ) -> Written:
        """Return the network in which each layer's kernel runs its scheme.

        Raises InvalidInputError naming the layer that no kernel runs in its scheme.
        """


class Target(Protocol):
    """A runtime."""

    @property
    def title(self) -> str:
        """What people call it."""

    @property
    def backend(self) -> str:
        """The name of its kernels."""

    @property
    def device(self) -> str:
        """The fingerprint that its times belong to."""

    def export(self, model: nn.Module, graph: LayerGraph, sample: Batch) -> Exported:
        """Return the network; raises InvalidInputError where the runtime cannot take it."""

    def reference(self) -> Op:
        """Return the kernel that a stopwatch compares with."""


def get_target(name: str) -> Target:
    """Return the runtime of that name; raises InvalidInputError for an unknown one."""
    if name not in TARGETS:
        raise unknown("target", name, TARGETS)
    module, _, attribute = TARGETS[name].partition(":")
    return cast(Target, getattr(importlib.import_module(module), attribute)())
