"""ModelOpt: the `quant_cfg` list of `mtq.quantize`, and hf_quant_config.json of a checkpoint.

The list is a Python literal, because its keys are numbers: everything is switched off first, then
the weight quantizer of each layer, and its input quantizer where activations are quantized; later
entries win. Activations are quantized dynamically with one scale; ModelOpt has no zero points.
hf_quant_config.json names the few algorithms that TensorRT-LLM runs.
Source: ModelOpt 0.47, torch/quantization/config.py and torch/export/quant_utils.py.
"""

from __future__ import annotations

import ast
import fnmatch
import json
import pprint
from collections.abc import Mapping
from typing import Any

from mpq.core.chosen import Chosen
from mpq.core.errors import InvalidInputError
from mpq.core.formats import PerGroup, PerTensor, Scheme, parse_scheme
from mpq.core.layers import Layer, LayerGraph, LayerName
from mpq.export.rules import refuse_native

_HEAD = "# import modelopt.torch.quantization as mtq; mtq.quantize(model, CONFIG, forward_loop)\n"


class ModelOpt:
    """The config of `mtq.quantize`."""

    name = "modelopt"
    suffix = ".py"
    fuses = True
    keeps_static = False
    every_format = False

    def refusal(self, layer: Layer, scheme: Scheme) -> str:
        """Return the rule that a scheme breaks on a layer."""
        weights, activations = scheme.weights, scheme.activations
        if weights.is_native:
            return refuse_native(layer, scheme)
        if layer.kind not in ("linear", "conv1d", "conv2d"):
            return f"quantizes linear layers and convolutions, this is of kind {layer.kind}"
        if weights.bits < 2:
            return "has 2 to 8 bits"
        if not weights.symmetric:
            return "has no zero points"
        if isinstance(weights.granularity, PerGroup) and layer.kind != "linear":
            return "has groups of the columns of linear layers"
        if not activations.is_native and not activations.symmetric:
            return "has symmetric activations only"
        return ""

    def stored_bytes(self, layer: Layer, scheme: Scheme) -> None:
        """Return None: the checkpoint is made by ModelOpt."""

    def text(self, chosen: Chosen) -> str:
        """Return a Python file with CONFIG."""
        entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
        for layer, scheme in chosen.searched:
            if scheme.is_native:
                continue
            entries.append(_entry(f"{layer.name}.weight_quantizer", _weights(scheme)))
            if not scheme.activations.is_native:
                cfg = {"num_bits": scheme.activations.bits, "axis": None, "type": "dynamic"}
                entries.append(_entry(f"{layer.name}.input_quantizer", cfg))
        config = {"quant_cfg": entries, "algorithm": "max"}
        return f"{_HEAD}CONFIG = {pprint.pformat(config, width=100, sort_dicts=False)}\n"

    def read(self, text: str, graph: LayerGraph) -> Mapping[LayerName, Scheme]:
        """Return the schemes of a CONFIG; names are shell patterns, later entries win."""
        entries = literal(text, "CONFIG")["quant_cfg"]
        found: dict[LayerName, Scheme] = {}
        for layer in graph.layers:
            weights = _last(entries, f"{layer.name}.weight_quantizer")
            if weights is not None:
                inputs = _last(entries, f"{layer.name}.input_quantizer")
                activations = f":int{inputs['num_bits']}s" if inputs else ""
                found[layer.name] = parse_scheme(_weights_text(weights) + activations)
        _refuse_unmatched(entries, graph)
        return found


class ModelOptHf:
    """hf_quant_config.json: one algorithm a layer, of those that TensorRT-LLM runs."""

    name = "modelopt-hf"
    suffix = ".json"
    fuses = True
    keeps_static = False
    every_format = False
    algorithms: Mapping[str, Mapping[str, Any]] = {
        "int8": {"quant_algo": "W8A16"},
        "int8:int8s": {"quant_algo": "W8A8_SQ_PER_CHANNEL"},
        "int4g64": {"quant_algo": "W4A16_AWQ", "group_size": 64},
        "int4g128": {"quant_algo": "W4A16_AWQ", "group_size": 128},
    }

    def refusal(self, layer: Layer, scheme: Scheme) -> str:
        """Return the rule that a scheme breaks on a layer."""
        if scheme.weights.is_native:
            return refuse_native(layer, scheme)
        if layer.kind != "linear":
            return f"quantizes linear layers, this is of kind {layer.kind}"
        if str(scheme) not in self.algorithms:
            known = ", ".join(f"{a['quant_algo']} ({s})" for s, a in self.algorithms.items())
            return f"has {known}"
        return ""

    def stored_bytes(self, layer: Layer, scheme: Scheme) -> None:
        """Return None: the checkpoint is made by ModelOpt."""

    def text(self, chosen: Chosen) -> str:
        """Return the file; a single algorithm for all layers is written at the top."""
        layers = {
            layer.name: dict(self.algorithms[str(scheme)])
            for layer, scheme in chosen.searched
            if not scheme.is_native
        }
        for algorithm in layers.values():
            if "group_size" in algorithm:
                algorithm |= {"has_zero_point": False, "pre_quant_scale": True}
        alone = [layer.name for layer in chosen.left_alone if layer.kind == "linear"]
        quantization: dict[str, Any] = {"quant_algo": None, "kv_cache_quant_algo": None}
        if len({str(algorithm) for algorithm in layers.values()}) > 1:
            quantization |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
        elif layers:
            quantization |= next(iter(layers.values()))
        quantization["exclude_modules"] = alone
        producer = {"name": "mpq", "version": str(chosen.provenance.get("mpq_version", ""))}
        return json.dumps({"producer": producer, "quantization": quantization}, indent=2) + "\n"

    def read(self, text: str, graph: LayerGraph) -> Mapping[LayerName, Scheme]:
        """Return the schemes; excluded modules are names or shell patterns."""
        config = json.loads(text)["quantization"]
        if config["quant_algo"] == "MIXED_PRECISION":
            return {name: self._scheme(name, a) for name, a in config["quantized_layers"].items()}
        excluded = config.get("exclude_modules") or []
        return {
            layer.name: self._scheme(layer.name, config)
            for layer in graph.layers
            if layer.kind == "linear"
            and config["quant_algo"] is not None
            and not any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in excluded)
        }

    def _scheme(self, name: str, algorithm: Mapping[str, Any]) -> Scheme:
        asked = (algorithm["quant_algo"], algorithm.get("group_size"))
        for text, known in self.algorithms.items():
            if asked == (known["quant_algo"], known.get("group_size")):
                return parse_scheme(text)
        raise InvalidInputError("import", f"layer {name!r}: no scheme stands for {asked[0]}")


def literal(text: str, name: str) -> Any:
    """Return the literal that a Python file assigns to `name`; nothing is run."""
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return ast.literal_eval(statement.value)
    raise InvalidInputError("import", f"the file assigns nothing to {name}")


def _entry(name: str, cfg: dict[str, Any]) -> dict[str, Any]:
    return {"quantizer_name": name, "cfg": cfg, "enable": True}


def _weights(scheme: Scheme) -> dict[str, Any]:
    bits = {"num_bits": scheme.weights.bits}
    match scheme.weights.granularity:
        case PerTensor():
            return {**bits, "axis": None}
        case PerGroup(size):
            return {**bits, "block_sizes": {-1: size, "type": "static"}}
    return {**bits, "axis": 0}


def _weights_text(cfg: Mapping[str, Any]) -> str:
    if not isinstance(cfg["num_bits"], int):
        raise InvalidInputError("import", f"no scheme stands for num_bits={cfg['num_bits']}")
    if cfg.get("block_sizes"):
        return f"int{cfg['num_bits']}g{cfg['block_sizes'][-1]}"
    return f"int{cfg['num_bits']}{'t' if cfg.get('axis') is None else ''}"


def _last(entries: list[dict[str, Any]], quantizer: str) -> dict[str, Any] | None:
    cfg: dict[str, Any] | None = None
    enabled = False
    for entry in entries:
        if fnmatch.fnmatchcase(quantizer, entry["quantizer_name"]):
            cfg, enabled = entry.get("cfg", cfg), entry.get("enable", True)
    return cfg if enabled else None


def _refuse_unmatched(entries: list[dict[str, Any]], graph: LayerGraph) -> None:
    quantizers = [
        f"{layer.name}.{kind}_quantizer" for layer in graph.layers for kind in ("weight", "input")
    ]
    for entry in entries:
        name = entry["quantizer_name"]
        if entry.get("cfg") and not any(fnmatch.fnmatchcase(q, name) for q in quantizers):
            raise InvalidInputError("import", f"{name!r} matches no layer of the network")
