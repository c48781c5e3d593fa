"""What alone reads a layer's output, so that an integer kernel computes it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mpq.core.layers import LayerName
from mpq.deploy.marked import DOMAIN, MarkedGraph, arrays_of, layer_of

_LARGEST_CODE = 2.0**30  # of an integer bias: half of what 32 bits hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A batch norm in evaluation: the names of its four arrays, and what it adds to variances."""

    arrays: tuple[str, str, str, str]  # weight, bias, mean, variance
    epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """y -> relu(factor * y + offset), of a layer's output y without bias.

    `factor` and `offset` have one number a channel: bias and batch norm. A kernel computes with
    the offset that it `held` in integers. `nodes` of the marked graph are computed with it, so
    that the kernel writes the tensor `output`, which the marked layers `readers` read.
    """

    factor: npt.NDArray[np.float32]
    offset: npt.NDArray[np.float32]
    held: npt.NDArray[np.float32]
    relu: bool = False
    norm: Norm | None = None
    nodes: frozenset[str] = frozenset()
    output: str
    readers: tuple[LayerName, ...] = ()

    def applied(self, bare: torch.Tensor) -> torch.Tensor:
        """Return what is behind the tail, of an output (samples, channels, ...) without bias."""
        found = bare * _spread(self.factor, bare) + _spread(self.held, bare)
        return found.relu() if self.relu else found

    def undone(self, behind: torch.Tensor) -> torch.Tensor:
        """Return an output without bias that has `behind` behind the tail."""
        return (behind - _spread(self.offset, behind)) / _spread(self.factor, behind)

    def within(self, scales: npt.NDArray[np.float32]) -> Tail | None:
        """Return the tail of a kernel whose accumulators have these scales, one a channel.

        None where 32 bits do not hold the offset, as in a channel with a factor near zero.
        """
        steps = np.abs(self.factor) * scales
        if not (np.abs(self.offset) < _LARGEST_CODE * steps).all():
            return None
        return replace(self, held=(np.rint(self.offset / steps) * steps).astype(np.float32))


def _spread(values: npt.NDArray[np.float32], over: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).reshape(-1, *(1,) * (over.ndim - 2))


def bare_tail(bias: npt.NDArray[np.float32], output: str) -> Tail:
    """Return the tail of a layer alone: its bias, zeros where it has none."""
    return Tail(factor=np.ones_like(bias), offset=bias, held=bias, output=output)


def tails(
    marked: MarkedGraph, biases: Mapping[LayerName, npt.NDArray[np.float32]]
) -> dict[LayerName, Tail]:
    """Return the tail of each layer of `biases` (zeros: none) that is called once.

    A batch norm in evaluation and then a ReLU belong to it where nothing else reads what is
    before them.
    """
    graph = marked.model().graph
    arrays = arrays_of(graph)
    readers: dict[str, list[Any]] = {output.name: [None] for output in graph.output}
    calls: dict[LayerName, list[Any]] = {}
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in arrays:  # equal arrays, stored once
            arrays[node.output[0]] = arrays[node.input[0]]
        for name in node.input:
            readers.setdefault(name, []).append(node)
        if node.domain == DOMAIN:
            calls.setdefault(layer_of(node), []).append(node)
    found = {}
    for layer, nodes in calls.items():
        if layer in biases and len(nodes) == 1:
            tail = bare_tail(biases[layer], nodes[0].output[0])
            tail = _with_relu(_with_norm(tail, readers, arrays), readers)
            reading = [n for n in readers.get(tail.output, []) if n and n.domain == DOMAIN]
            found[layer] = replace(tail, readers=tuple(map(layer_of, reading)))
    return found


def _only(readers: Mapping[str, list[Any]], tensor: str, operator: str) -> Any:
    """Return the one node that reads a tensor, None where it is another or there are more."""
    found = readers.get(tensor, [])
    return found[0] if len(found) == 1 and found[0] and found[0].op_type == operator else None


def _with_norm(tail: Tail, readers: Mapping[str, list[Any]], arrays: Mapping[str, Any]) -> Tail:
    node = _only(readers, tail.output, "BatchNormalization")
    if node is None or any(name not in arrays for name in node.input[1:]):
        return tail
    settings = {attribute.name: attribute.f for attribute in node.attribute}
    norm = Norm(arrays=tuple(node.input[1:]), epsilon=settings.get("epsilon", 1e-5))
    weight, bias, mean, variance = (arrays[name] for name in norm.arrays)
    factor = weight / np.sqrt(variance + np.float32(norm.epsilon))
    offset = bias + factor * (tail.offset - mean)
    return replace(
        tail,
        factor=factor,
        offset=offset,
        held=offset,
        norm=norm,
        nodes=tail.nodes | {node.name},
        output=node.output[0],
    )


def _with_relu(tail: Tail, readers: Mapping[str, list[Any]]) -> Tail:
    node = _only(readers, tail.output, "Relu")
    if node is None:
        return tail
    return replace(tail, relu=True, nodes=tail.nodes | {node.name}, output=node.output[0])
