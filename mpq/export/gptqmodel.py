r"""GPTQModel: a quantize_config.json whose `dynamic` rules give every layer its bits.

`bits`, `group_size` and `sym` at the top are those of most layers; a rule "+:^name$" overrides
them for one, "-:^name$" leaves one alone. Patterns are matched from the start of a name, so they
end with "$" and escape dots. Layers outside the search are left alone by name, or they would get
what is at the top. 5, 6 and 7 bits make the whole checkpoint planar ("gptq_p"); asymmetric ones
need "gptq_v2". vLLM and SGLang load it, transformers does not read `dynamic`.
Source: GPTQModel 7.7, quantization/config.py and nn_modules/qlinear.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mpq.core.chosen import Chosen
from mpq.core.errors import InvalidInputError
from mpq.core.formats import Format, PerGroup, PerTensor, Scheme, parse_scheme
from mpq.core.layers import Layer, LayerGraph, LayerName
from mpq.export.rules import as_it_is, refuse_native

_GROUPS = (16, 32, 64, 128, 256, 512, 1024)


class GptqModel:
    """Weights only, of linear layers."""

    name = "gptqmodel"
    suffix = ".json"
    fuses = True
    keeps_static = False
    every_format = False

    def refusal(self, layer: Layer, scheme: Scheme) -> str:
        """Return the rule that a scheme breaks on a layer."""
        weights = scheme.weights
        if weights.is_native:
            return refuse_native(layer, scheme)
        if not scheme.activations.is_native:
            return "quantizes weights only"
        if layer.kind != "linear":
            return f"quantizes linear layers, this is of kind {layer.kind}"
        if weights.bits < 2:
            return "has 2 to 8 bits"
        match weights.granularity:
            case PerTensor():
                return "has scales per channel or per group"
            case PerGroup(size) if size not in _GROUPS:
                return f"has groups of {', '.join(map(str, _GROUPS))}"
        return ""

    def stored_bytes(self, layer: Layer, scheme: Scheme) -> None:
        """Return None: the checkpoint is made by GPTQModel."""

    def text(self, chosen: Chosen) -> str:
        """Return quantize_config.json."""
        schemes = {layer.name: s.weights for layer, s in chosen.searched if not s.is_native}
        if not schemes:
            raise InvalidInputError(
                "export", "gptqmodel needs at least one quantized layer, this allocation has none"
            )
        most = Counter(schemes.values()).most_common(1)[0][0]
        alone = [layer.name for layer in chosen.left_alone if layer.kind == "linear"]
        dynamic: dict[str, dict[str, Any]] = {f"-:{_pattern(name)}": {} for name in alone}
        for name, weights in schemes.items():
            if weights != most:
                dynamic[f"+:{_pattern(name)}"] = _fields(weights)
        planar = any(weights.bits in (5, 6, 7) for weights in schemes.values())
        asymmetric = any(not weights.symmetric for weights in schemes.values())
        form = "gptq_p" if planar else "gptq_v2" if asymmetric else "gptq"
        config = {
            **_fields(most),
            "desc_act": False,
            "lm_head": any(name.rpartition(".")[2] == "lm_head" for name in schemes),
            "method": "gptq",
            "quant_method": "gptq",
            "format": form,
            "checkpoint_format": form,
            "pack_dtype": "int32",
            "dynamic": dynamic,
        }
        return json.dumps(config, indent=2) + "\n"

    def read(self, text: str, graph: LayerGraph) -> Mapping[LayerName, Scheme]:
        """Return the schemes; rules that leave layers alone come first, then in order."""
        config = json.loads(text)
        dynamic = config.get("dynamic") or {}
        rules = sorted(dynamic, key=lambda rule: not rule.startswith("-"))
        compiled = [
            (re.compile(rule.removeprefix("+:").removeprefix("-:")), rule) for rule in rules
        ]
        linear = [layer for layer in graph.layers if layer.kind == "linear"]
        for pattern, key in compiled:
            if not any(pattern.match(layer.name) for layer in linear):
                raise InvalidInputError("import", f"rule {key!r} matches no layer of the network")
        found = {}
        for layer in linear:
            key = next((key for pattern, key in compiled if pattern.match(layer.name)), None)
            if key is not None and key.startswith("-"):
                found[layer.name] = as_it_is(layer)
            elif layer.name.rpartition(".")[2] != "lm_head" or config.get("lm_head"):
                found[layer.name] = _scheme({**config, **(dynamic[key] if key else {})})
        return found


def _pattern(name: LayerName) -> str:
    return f"^{re.escape(name)}$"


def _fields(weights: Format) -> dict[str, Any]:
    size = weights.granularity.size if isinstance(weights.granularity, PerGroup) else -1
    return {"bits": weights.bits, "group_size": size, "sym": weights.symmetric}


def _scheme(fields: Mapping[str, Any]) -> Scheme:
    size = int(fields.get("group_size", 128))
    group = "" if size == -1 else f"g{size}"
    return parse_scheme(f"int{fields['bits']}{group}{'' if fields.get('sym', True) else 'a'}")
