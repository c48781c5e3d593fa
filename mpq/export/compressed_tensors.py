"""compressed-tensors, as vLLM and transformers read it: `quantization_config` of a config.json.

One config group for each scheme, its targets written out by name; every other linear layer is
ignored by name, because vLLM refuses a linear layer that nothing matches. Activations are quantized
dynamically for each token, which is finer than the one scale a sample that was scored.
Source: compressed_tensors 0.20, quantization/quant_config.py and quant_args.py; the kernels of vLLM
are those of its schemes WNA16 and W8A8Int8 with Marlin.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mpq.core.chosen import Chosen
from mpq.core.errors import InvalidInputError
from mpq.core.formats import FP32, Format, Granularity, PerChannel, PerGroup, PerTensor, Scheme
from mpq.core.layers import Layer, LayerGraph, LayerName
from mpq.export.rules import as_it_is, refuse_native

PACKED, INTEGER, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
_VLLM_GROUPS = (32, 64, 128)
_SCALE_BYTES = 2  # IEEE half
_SHAPE_BYTES = 16  # two int64


class CompressedTensorsHf:
    """Everything the format holds; transformers unpacks the weights and runs any of it."""

    name = "compressed-tensors-hf"
    suffix = ".json"
    fuses = False
    keeps_static = False
    every_format = False

    def refusal(self, layer: Layer, scheme: Scheme) -> str:
        """Return the rule that a scheme breaks on a layer."""
        weights, activations = scheme.weights, scheme.activations
        if weights.is_native:
            return refuse_native(layer, scheme)
        if layer.kind != "linear":
            return f"quantizes linear layers, this is of kind {layer.kind}"
        if weights.bits < 2:
            return "has weights of 2 to 8 bits"
        if not weights.symmetric and weights.granularity == PerTensor():
            return "packs zero points per channel or per group only"
        if not activations.is_native and activations.bits not in (4, 8):
            return "has activations of 4 or 8 bits"
        return ""

    def stored_bytes(self, layer: Layer, scheme: Scheme) -> int:
        """Return the bytes of codes, scales, zero points and the stored shape."""
        weights = scheme.weights
        if weights.is_native:
            return layer.weight_bytes
        rows, columns = layer.weight_shape
        scales = weights.num_scales(layer.weight_shape)
        if group_format(scheme) == INTEGER:
            return rows * columns + scales * _SCALE_BYTES + (0 if weights.symmetric else scales)
        words = rows * _words(columns, weights.bits)
        if not weights.symmetric:
            words += scales // rows * _words(rows, weights.bits)
        return 4 * words + scales * _SCALE_BYTES + _SHAPE_BYTES

    def text(self, chosen: Chosen) -> str:
        """Return what goes into config.json."""
        refuse_tied(chosen)
        groups: dict[Scheme, list[str]] = {}
        for layer, scheme in chosen.searched:
            if not scheme.is_native:
                groups.setdefault(scheme, []).append(layer.name)
        formats = {group_format(scheme) for scheme in groups}
        config = {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else MIXED if formats else "dense",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{number}": _group(scheme, names)
                for number, (scheme, names) in enumerate(groups.items())
            },
            "ignore": [layer.name for layer in chosen.left_alone if layer.kind == "linear"],
            "kv_cache_scheme": None,
        }
        return json.dumps({"quantization_config": config}, indent=2) + "\n"

    def read(self, text: str, graph: LayerGraph) -> Mapping[LayerName, Scheme]:
        """Return the schemes of a config.json; exact names before patterns before classes."""
        loaded = json.loads(text)
        config = loaded.get("quantization_config", loaded)
        schemes: dict[str, Scheme] = {}
        for name, group in config["config_groups"].items():
            if isinstance(group, list):
                raise InvalidInputError(
                    "import", f"config group {name!r} is a preset: write its weights out"
                )
            schemes |= dict.fromkeys(group["targets"], _scheme(name, group))
        _refuse_unmatched([*schemes], graph)
        found: dict[LayerName, Scheme] = {}
        for layer in graph.layers:
            target = _matching(layer, list(schemes))
            if target is not None and _matching(layer, config.get("ignore") or []) is None:
                found[layer.name] = schemes[target]
        return found


class CompressedTensors(CompressedTensorsHf):
    """What the kernels of vLLM run; their layers q/k/v and gate/up are fused."""

    name = "compressed-tensors"
    fuses = True
    keeps_static = False
    every_format = False

    def refusal(self, layer: Layer, scheme: Scheme) -> str:
        """Return the rule that a scheme breaks on a layer."""
        weights, activations = scheme.weights, scheme.activations
        if rule := super().refusal(layer, scheme):
            return rule
        if weights.is_native:
            return ""
        if layer.name.rpartition(".")[2] == "lm_head":
            return "(vLLM) keeps the output head as it is"
        if not activations.is_native:
            if weights.bits != 8 or activations.bits != 8:
                return "(vLLM) has kernels for quantized activations with int8:int8 only"
            if not weights.symmetric or isinstance(weights.granularity, PerGroup):
                return "(vLLM) has int8:int8 kernels for symmetric weights without groups"
            return ""
        if weights.bits not in (4, 8):
            return "(vLLM) has weight-only kernels for 4 and 8 bits"
        if not weights.symmetric and weights.bits != 4:
            return "(vLLM) has kernels with zero points for 4 bits only"
        match weights.granularity:
            case PerTensor():
                return "(vLLM) has weight-only kernels per channel and per group"
            case PerGroup(size) if size not in _VLLM_GROUPS:
                return "(vLLM) has kernels for groups of 32, 64 and 128"
        return ""


def group_format(scheme: Scheme) -> str:
    """Return how the weights of a config group are stored."""
    whole = scheme.weights.bits == 8 and not scheme.activations.is_native
    return INTEGER if whole else PACKED


def refuse_tied(chosen: Chosen) -> None:
    """Raise InvalidInputError for quantized layers that share a weight: each stores its own."""
    owners: dict[str, str] = {}
    for layer, scheme in chosen.searched:
        first = owners.setdefault(layer.weight_id, layer.name)
        if first != layer.name and not scheme.is_native:
            raise InvalidInputError(
                "export",
                f"layer {layer.name!r} is {scheme}: compressed-tensors has no tied quantized "
                f"weights and it is tied to {first!r}; nearest: {as_it_is(layer)}",
            )


def _words(values: int, bits: int) -> int:
    return -(-values * bits // 32)


def _group(scheme: Scheme, names: Sequence[str]) -> dict[str, Any]:
    weights, activations = scheme.weights, scheme.activations
    strategy: dict[str, Any] = {"strategy": "channel", "group_size": None}
    match weights.granularity:
        case PerTensor():
            strategy["strategy"] = "tensor"
        case PerGroup(size):
            strategy = {"strategy": "group", "group_size": size}
    inputs = None
    if not activations.is_native:
        kind = {"num_bits": activations.bits, "type": "int", "symmetric": activations.symmetric}
        inputs = {**kind, "strategy": "token", "dynamic": True}
    kind = {"num_bits": weights.bits, "type": "int", "symmetric": weights.symmetric}
    return {
        "targets": list(names),
        "weights": {**kind, **strategy, "dynamic": False},
        "input_activations": inputs,
        "output_activations": None,
        "format": group_format(scheme),
    }


def _scheme(name: str, group: Mapping[str, Any]) -> Scheme:
    weights = _format(name, group["weights"], ("channel", "group", "tensor"))
    inputs = group.get("input_activations")
    activations = FP32 if inputs is None else _format(name, inputs, ("token", "tensor"))
    if inputs is not None:
        activations = Format(
            family="int",
            bits=activations.bits,
            granularity=PerTensor(),
            symmetric=activations.symmetric,
        )
    return Scheme(weights, activations)


def _format(name: str, args: Mapping[str, Any], strategies: Sequence[str]) -> Format:
    size = args.get("group_size")
    strategy = args.get("strategy") or {None: "tensor", -1: "channel"}.get(size, "group")
    if args.get("type", "int") != "int" or strategy not in strategies:
        raise InvalidInputError(
            "import",
            f"config group {name!r}: no scheme stands for {args.get('type')} values with strategy "
            f"{strategy!r}, only int with {' or '.join(strategies)}",
        )
    granularities: dict[str, Granularity]
    granularities = {"tensor": PerTensor(), "channel": PerChannel(), "token": PerTensor()}
    return Format(
        family="int",
        bits=int(args.get("num_bits", 8)),
        granularity=PerGroup(int(size or 0)) if strategy == "group" else granularities[strategy],
        symmetric=bool(args.get("symmetric", True)),
    )


def _matching(layer: Layer, targets: Sequence[str]) -> str | None:
    if layer.name in targets:
        return layer.name
    for target in targets:
        if target.startswith("re:") and re.match(target[3:], layer.name):
            return target
    classes = {"linear": "Linear", "embedding": "Embedding"}
    return next((t for t in targets if t == classes.get(layer.kind)), None)


def _refuse_unmatched(targets: Sequence[str], graph: LayerGraph) -> None:
    for target in targets:
        if not any(_matching(layer, [target]) for layer in graph.layers):
            raise InvalidInputError("import", f"target {target!r} matches no layer of the network")
