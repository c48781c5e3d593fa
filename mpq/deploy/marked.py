"""A network as an ONNX graph in which every searched layer is one marked node."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpq.core.errors import InvalidInputError
from mpq.core.layers import LayerName
from mpq.deploy.served import Served
from mpq.nn.batches import Batch
from mpq.nn.patch import evaluating

DOMAIN, OPERATOR, ATTRIBUTE, OUTPUT = "mpq", "Layer", "layer", "output"
OPSET = 17


@dataclass(frozen=True, slots=True)
class MarkedGraph:
    """A serialized ONNX model with a node `mpq::Layer` for each call of a marked layer.

    A node holds the name of its layer and has the layer's input and output; its weight and bias
    are nowhere in the model. `any_batch`: the first axis of inputs may have any size.
    """

    serialized: bytes
    any_batch: bool

    def model(self) -> Any:
        """Return the model, an object of its own."""
        import onnx

        return onnx.load_from_string(self.serialized)


def arrays_of(graph: Any) -> dict[str, Any]:
    """Return the arrays that a graph stores, by name."""
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def layer_of(node: Any) -> LayerName:
    """Return the layer that a marked node stands for."""
    (name,) = (attribute.s for attribute in node.attribute if attribute.name == ATTRIBUTE)
    return str(name.decode())


class _Mark(torch.autograd.Function):
    """Stands for a layer while the exporter traces."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, output: torch.Tensor, name: str) -> torch.Tensor:
        return output.clone()

    @staticmethod
    def symbolic(graph: Any, inputs: Any, output: Any, name: str) -> Any:
        marked = graph.op(f"{DOMAIN}::{OPERATOR}", inputs, **{f"{ATTRIBUTE}_s": name})
        return marked.setType(output.type())


def export_marked(
    model: nn.Module, sample: Batch, names: Sequence[LayerName], *, any_batch: bool = True
) -> MarkedGraph:
    """Trace the network on the sample with torch's TorchScript exporter.

    Which node is which layer needs no guess about names that the exporter gives: the named
    modules themselves write their nodes, one for each call, shared and tied ones included.
    Raises InvalidInputError (`no_onnx`) where the exporter cannot, or (`no_node`) where a layer
    left no node.
    """
    served = Served(model, sample)
    axes = {name: {0: "batch"} for name in served.batched} if any_batch else {}
    stream = io.BytesIO()
    with evaluating(model), torch.no_grad(), _marking(model, names) as called, _quiet():
        try:
            torch.onnx.export(
                served,
                served.tensors,
                stream,  # type: ignore[arg-type]
                dynamo=False,
                opset_version=OPSET,
                input_names=list(served.names),
                output_names=[OUTPUT],
                dynamic_axes={**axes, OUTPUT: {0: "batch"}} if axes else None,
                custom_opsets={DOMAIN: 1},
            )
        except Exception as error:  # of many kinds: whatever a network does while it is traced
            lines = str(error).strip().splitlines() or [repr(error)]
            raise InvalidInputError(
                "no_onnx", f"torch cannot write this network as ONNX: {lines[0]}"
            ) from error
    missing = [name for name in names if name not in called]
    if missing:
        raise InvalidInputError(
            "no_node", f"layer {missing[0]!r} is not called on the sample: it has no ONNX node"
        )
    return MarkedGraph(serialized=stream.getvalue(), any_batch=bool(axes))


@contextmanager
def _marking(model: nn.Module, names: Sequence[LayerName]) -> Iterator[set[LayerName]]:
    """Make modules write a marked node when they are traced; yields those that were called."""
    called: set[LayerName] = set()

    def marking(name: LayerName, forward: Callable[..., Any]) -> Callable[..., Any]:
        def marked(inputs: torch.Tensor) -> Any:
            called.add(name)
            return _Mark.apply(inputs, forward(inputs), name)  # type: ignore[no-untyped-call]

        return marked

    modules = {name: model.get_submodule(name) for name in names}
    own: dict[LayerName, Any] = {n: vars(module).get("forward") for n, module in modules.items()}
    try:
        for name, module in modules.items():
            module.forward = marking(name, module.forward)
        yield called
    finally:
        for name, module in modules.items():
            if own[name] is None:
                vars(module).pop("forward", None)
            else:
                module.forward = own[name]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide that the exporter is the older one, and what tracing says of Python values."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
