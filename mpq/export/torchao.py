"""torchao: a FqnToConfig as JSON, alone or in the `quantization_config` of a Hugging Face model.

`torchao.core.config.config_from_dict` reads it, `quantize_(model, config, filter_fn=None)` applies
it. Layers are named by module; None leaves one alone. torchao skips a weight that its groups do not
divide without a word: such a layer is refused. Activations are quantized for each token; the scales
of a convolution are for each position of its kernel: both finer than what was scored.
Source: torchao 0.18, quantization/quant_api.py and core/config.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mpq.core.chosen import Chosen
from mpq.core.errors import InvalidInputError
from mpq.core.formats import (
    FP32,
    Format,
    PerChannel,
    PerGroup,
    PerTensor,
    Scheme,
    parse_format,
)
from mpq.core.layers import Layer, LayerGraph, LayerName
from mpq.export.rules import as_it_is, refuse_native

_UNPACKED = {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"}
_AFFINE = {"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"}
_PER_ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}


class TorchAo:
    """The FqnToConfig itself."""

    name = "torchao"
    suffix = ".json"
    fuses = False
    keeps_static = False
    every_format = False

    def refusal(self, layer: Layer, scheme: Scheme) -> str:
        """Return the rule that a scheme breaks on a layer."""
        weights, activations = scheme.weights, scheme.activations
        if weights.is_native:
            return refuse_native(layer, scheme)
        if layer.kind not in ("linear", "embedding", "conv2d"):
            return f"quantizes linear, embedding and conv2d layers, this is of kind {layer.kind}"
        if layer.kind == "conv2d" and not (
            weights.granularity == PerChannel() and activations.is_native
        ):
            return "quantizes convolutions per channel and weights only"
        if weights.bits == 1 and weights.symmetric:
            return "has a zero in its symmetric 1-bit grid"
        if weights.granularity == PerTensor() and not _is_int8(weights):
            return "has one scale per tensor for symmetric int8 alone"
        if activations.is_native:
            return ""
        if activations.bits != 8:
            return "has activations of 8 bits"
        if weights.granularity == PerTensor():
            return "has no activations with one weight scale per tensor"
        if activations.symmetric and not _is_int8(weights):
            return "has symmetric activations with per-channel int8 alone"
        return ""

    def stored_bytes(self, layer: Layer, scheme: Scheme) -> None:
        """Return None: how a config is packed is the choice of a machine."""

    def text(self, chosen: Chosen) -> str:
        """Return the config as JSON."""
        return json.dumps(_fqn_to_config(chosen), indent=2) + "\n"

    def read(self, text: str, graph: LayerGraph) -> Mapping[LayerName, Scheme]:
        """Return the schemes of a config."""
        return _read(json.loads(text), graph)


class TorchAoHf(TorchAo):
    """The same inside what goes into config.json."""

    name = "torchao-hf"

    def text(self, chosen: Chosen) -> str:
        """Return what goes into config.json."""
        embeddings = [layer for layer, s in chosen.searched if layer.kind == "embedding"]
        config = {
            "quant_method": "torchao",
            "quant_type": {"default": _fqn_to_config(chosen)},
            "modules_to_not_convert": [layer.name for layer in chosen.left_alone],
            "include_input_output_embeddings": any(
                not chosen.schemes[layer.name].is_native for layer in embeddings
            ),
            "untie_embedding_weights": False,
        }
        return json.dumps({"quantization_config": config}, indent=2) + "\n"

    def read(self, text: str, graph: LayerGraph) -> Mapping[LayerName, Scheme]:
        """Return the schemes of a config.json."""
        loaded = json.loads(text)
        config = loaded.get("quantization_config", loaded)
        return _read(config["quant_type"]["default"], graph)


def _is_int8(weights: Format) -> bool:
    grouped = isinstance(weights.granularity, PerGroup)
    return weights.bits == 8 and weights.symmetric and not grouped


def _fqn_to_config(chosen: Chosen) -> dict[str, Any]:
    configs = {layer.name: _config(scheme) for layer, scheme in chosen.searched}
    configs |= {layer.name: None for layer in chosen.left_alone}
    return _object("FqnToConfig", 1, {"fqn_to_config": configs})


def _object(kind: str, version: int, data: Mapping[str, Any]) -> dict[str, Any]:
    return {"_type": kind, "_version": version, "_data": dict(data)}


def _mapping(symmetric: bool) -> dict[str, str]:
    return {"_type": "MappingType", "_data": "SYMMETRIC" if symmetric else "ASYMMETRIC"}


def _config(scheme: Scheme) -> dict[str, Any] | None:
    weights, activations = scheme.weights, scheme.activations
    if weights.is_native:
        return None
    if weights.granularity == PerTensor():
        per_tensor = _object("PerTensor", 1, {})
        fields = {"group_size": None, "granularity": per_tensor, "set_inductor_config": True}
        return _object("Int8WeightOnlyConfig", 2, fields)
    if not activations.is_native and _is_int8(weights):
        fields = {
            "act_mapping_type": _mapping(activations.symmetric),
            "weight_only_decode": False,
            "granularity": _PER_ROW,
            "set_inductor_config": True,
            "reduce_range": False,
        }
        return _object("Int8DynamicActivationInt8WeightConfig", 2, fields)
    granularity = _object("PerAxis", 1, {"axis": 0})
    if isinstance(weights.granularity, PerGroup):
        granularity = _object("PerGroup", 1, {"group_size": weights.granularity.size})
    prefix = "" if activations.is_native else "weight_"
    fields = {
        "weight_dtype": {"_type": "torch.dtype", "_data": f"int{weights.bits}"},
        f"{prefix}granularity": granularity,
        f"{prefix}mapping_type": _mapping(weights.symmetric),
        f"{prefix}scale_dtype": None,
        "intx_packing_format": _UNPACKED,
        "intx_choose_qparams_algorithm": _AFFINE,
    }
    if activations.is_native:
        return _object("IntxWeightOnlyConfig", 2, fields)
    fields["act_mapping_type"] = _mapping(activations.symmetric)
    return _object("Int8DynamicActivationIntxWeightConfig", 2, fields)


def _read(config: Mapping[str, Any], graph: LayerGraph) -> Mapping[LayerName, Scheme]:
    data = config["_data"]
    configs = data.get("fqn_to_config") or data["module_fqn_to_config"]
    found: dict[LayerName, Scheme] = {}
    for layer in graph.layers:
        key = _key(layer.name, list(configs))
        if key is not None:
            made = configs[key]
            found[layer.name] = as_it_is(layer) if made is None else _scheme(key, made)
    for key, made in configs.items():
        if made is not None and not any(_key(layer.name, [key]) for layer in graph.layers):
            raise InvalidInputError("import", f"key {key!r} matches no layer of the network")
    return found


def _key(name: str, keys: list[str]) -> str | None:
    """Return the key that torchao would use: parameter, module, patterns of both, default."""
    for exact in (f"{name}.weight", name):
        if exact in keys:
            return exact
    for tried in (f"{name}.weight", name):
        for key in keys:
            if key.startswith("re:") and re.fullmatch(key[3:], tried):
                return key
    return "_default" if "_default" in keys else None


def _scheme(key: str, config: Mapping[str, Any]) -> Scheme:
    kind, data = config["_type"], config["_data"]
    if kind == "Int8WeightOnlyConfig":
        return Scheme(_weights(key, 8, data.get("granularity") or _PER_ROW, True))
    if kind == "Int8DynamicActivationInt8WeightConfig":
        weights = _weights(key, 8, data.get("granularity") or _PER_ROW, True)
        return Scheme(weights, _activations(data))
    if kind not in ("IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig"):
        raise InvalidInputError("import", f"key {key!r}: no scheme stands for {kind}")
    dynamic = kind != "IntxWeightOnlyConfig"
    prefix = "weight_" if dynamic else ""
    weights = _weights(
        key,
        int(data["weight_dtype"]["_data"].removeprefix("int")),
        data[f"{prefix}granularity"],
        data[f"{prefix}mapping_type"]["_data"] != "ASYMMETRIC",
    )
    return Scheme(weights, _activations(data) if dynamic else FP32)


def _weights(key: str, bits: int, granularity: Mapping[str, Any], symmetric: bool) -> Format:
    kind, data = granularity["_type"], granularity["_data"]
    group = f"g{data.get('group_size')}"
    sizes = {"PerTensor": "t", "PerRow": "", "PerAxis": "", "PerGroup": group}
    if kind not in sizes:
        raise InvalidInputError("import", f"key {key!r}: no scheme has granularity {kind}")
    return parse_format(f"int{bits}{sizes[kind]}{'' if symmetric else 'a'}")


def _activations(data: Mapping[str, Any]) -> Format:
    symmetric = data["act_mapping_type"]["_data"] == "SYMMETRIC"
    return parse_format("int8s" if symmetric else "int8", "activations")
