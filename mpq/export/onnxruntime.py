"""ONNX Runtime: what `quantize_static` and `MatMulNBitsQuantizer` are to do, as JSON.

Layers with quantized activations are in "quantize_static": weight tensors in TensorQuantOverrides
(names of QuantType as text), one activation type for all of them, every other node excluded. Those
with quantized weights alone are in "matmul_nbits": one pass for each format, its nodes by name.
ONNX has names of its own: give `names` where tensors are not called as parameters and nodes not as
layers.
Source: onnxruntime 1.31, quantization/{quantize,tensor_quant_overrides,matmul_nbits_quantizer}.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from mpq.core.chosen import Chosen
from mpq.core.errors import InvalidInputError
from mpq.core.formats import (
    Format,
    PerGroup,
    PerTensor,
    Scheme,
    channel_axes,
    parse_format,
    parse_scheme,
)
from mpq.core.layers import Layer, LayerGraph, LayerName
from mpq.export.rules import as_it_is, refuse_native

_BLOCKS = (16, 32, 64, 128, 256)
_STATIC_KINDS = ("linear", "conv1d", "conv2d")


class OnnxName(NamedTuple):
    """The weight tensor and the node of a layer in the ONNX file, and the axis of its channels."""

    tensor: str
    node: str
    axis: int


class OnnxRuntime:
    """Options of both quantizers of ONNX Runtime."""

    name = "onnxruntime"
    suffix = ".json"
    fuses = False
    keeps_static = False
    every_format = False

    def __init__(self, names: Mapping[LayerName, OnnxName] | None = None) -> None:
        self._names = names or {}

    def refusal(self, layer: Layer, scheme: Scheme) -> str:
        """Return the rule that a scheme breaks on a layer."""
        weights, activations = scheme.weights, scheme.activations
        if weights.is_native:
            return refuse_native(layer, scheme)
        grouped = isinstance(weights.granularity, PerGroup)
        if activations.is_native:
            if layer.kind != "linear":
                return f"has weight-only kernels for matrices, this is of kind {layer.kind}"
            if weights.bits not in (4, 8):
                return "has weight-only kernels of 4 and 8 bits"
            if not isinstance(weights.granularity, PerGroup):
                return "has weight-only kernels in blocks of 16 to 256"
            if weights.granularity.size not in _BLOCKS:
                return f"has blocks of {', '.join(map(str, _BLOCKS))}"
            return ""
        if layer.kind not in _STATIC_KINDS:
            return f"quantizes activations of matrices and convolutions, this is a {layer.kind}"
        if (weights.bits, activations.bits) != (8, 8) or grouped:
            return "has kernels with quantized activations for int8:int8 without groups"
        return ""

    def stored_bytes(self, layer: Layer, scheme: Scheme) -> None:
        """Return None: the file is made by ONNX Runtime."""

    def text(self, chosen: Chosen) -> str:
        """Return the options of both quantizers."""
        static = {la.name: s for la, s in chosen.searched if not s.activations.is_native}
        kinds = {scheme.activations.symmetric for scheme in static.values()}
        if len(kinds) > 1:
            odd = next(n for n, s in static.items() if s.activations.symmetric)
            raise InvalidInputError(
                "export",
                f"layer {odd!r} is {static[odd]}: onnxruntime has one activation type for all "
                "layers; nearest: int8:int8 for all of them",
            )
        passes: dict[Format, list[str]] = {}
        for layer, scheme in chosen.searched:
            if layer.name not in static and not scheme.is_native:
                passes.setdefault(scheme.weights, []).append(self._name(layer).node)
        symmetric = True in kinds
        options = {
            "quantize_static": {
                "activation_type": "QInt8" if symmetric else "QUInt8",
                "nodes_to_exclude": [
                    self._name(la).node for la in chosen.graph.layers if la.name not in static
                ],
                "extra_options": {
                    "ActivationSymmetric": symmetric,
                    "TensorQuantOverrides": {
                        self._name(layer).tensor: [self._override(layer, scheme.weights)]
                        for layer, scheme in chosen.searched
                        if layer.name in static
                    },
                },
            },
            "matmul_nbits": [_pass(weights, nodes) for weights, nodes in passes.items()],
        }
        return json.dumps(options, indent=2) + "\n"

    def read(self, text: str, graph: LayerGraph) -> Mapping[LayerName, Scheme]:
        """Return the schemes of the options."""
        options = json.loads(text)
        static, extra = options["quantize_static"], options["quantize_static"]["extra_options"]
        inputs = "int8s" if extra.get("ActivationSymmetric") else "int8"
        overrides = dict(extra.get("TensorQuantOverrides", {}))
        nodes = {n: p for p in options.get("matmul_nbits", []) for n in p["nodes_to_include"]}
        found = {}
        for layer in graph.layers:
            name = self._name(layer)
            if name.node in nodes:
                found[layer.name] = _block_scheme(nodes.pop(name.node))
            elif name.tensor in overrides and name.node not in static["nodes_to_exclude"]:
                weights = _weights(name.tensor, overrides.pop(name.tensor))
                found[layer.name] = Scheme(weights, parse_format(inputs, "activations"))
            else:
                found[layer.name] = as_it_is(layer)
        if unused := [*nodes, *overrides]:
            raise InvalidInputError("import", f"{unused[0]!r} belongs to no layer of the network")
        return found

    def _name(self, layer: Layer) -> OnnxName:
        plain = OnnxName(layer.weight_id, layer.name, channel_axes(layer.channel_axis)[0])
        return self._names.get(layer.name, plain)

    def _override(self, layer: Layer, weights: Format) -> dict[str, Any]:
        kind = "QInt8" if weights.symmetric else "QUInt8"
        override: dict[str, Any] = {"quant_type": kind, "symmetric": weights.symmetric}
        if weights.granularity != PerTensor():
            override["axis"] = self._name(layer).axis
        return override


def _pass(weights: Format, nodes: list[str]) -> dict[str, Any]:
    assert isinstance(weights.granularity, PerGroup)
    return {
        "bits": weights.bits,
        "block_size": weights.granularity.size,
        "is_symmetric": weights.symmetric,
        "nodes_to_include": nodes,
    }


def _block_scheme(options: Mapping[str, Any]) -> Scheme:
    zero_point = "" if options["is_symmetric"] else "a"
    return parse_scheme(f"int{options['bits']}g{options['block_size']}{zero_point}")


def _weights(tensor: str, overrides: list[Mapping[str, Any]]) -> Format:
    override = overrides[0]
    if override["quant_type"] not in ("QInt8", "QUInt8") or len(overrides) > 1:
        raise InvalidInputError("import", f"tensor {tensor!r}: no scheme stands for {overrides}")
    per_tensor = "" if "axis" in override else "t"
    return parse_format(f"int8{per_tensor}{'' if override.get('symmetric', True) else 'a'}")
