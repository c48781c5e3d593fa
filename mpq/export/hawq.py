"""HAWQ: a bit_config, the dict of module names to bits that its quant_train.py reads.

HAWQ puts "quant_" before the last part of a layer's name; the input of a layer is quantized by the
module "quant_act" of its block, "quant_act1" before the second layer of a block, and so on. Every
layer has as many bits in its weights as in its activations: the kernels are int4 and int8.
Source: bit_config.py and quant_train.py of the HAWQ release (ICML 2021).
"""

from __future__ import annotations

import pprint
import re
from collections.abc import Mapping

from mpq.core.chosen import Chosen
from mpq.core.errors import InvalidInputError
from mpq.core.formats import Scheme, parse_scheme
from mpq.core.layers import Layer, LayerGraph, LayerName
from mpq.export.modelopt import literal

_SCHEMES = {4: "int4:int4", 8: "int8:int8"}


class Hawq:
    """Bits of convolutions and linear layers."""

    name = "hawq"
    suffix = ".py"
    fuses = False
    keeps_static = False
    every_format = False

    def refusal(self, layer: Layer, scheme: Scheme) -> str:
        """Return the rule that a scheme breaks on a layer."""
        if layer.kind not in ("linear", "conv2d"):
            return f"quantizes linear layers and convolutions, this is of kind {layer.kind}"
        if str(scheme) not in _SCHEMES.values():
            return "has kernels for int4:int4 and int8:int8 and leaves no layer as it is"
        return ""

    def stored_bytes(self, layer: Layer, scheme: Scheme) -> None:
        """Return None: the file is made by HAWQ."""

    def text(self, chosen: Chosen) -> str:
        """Return a Python file with bit_config."""
        bits: dict[str, int] = {}
        for layer, scheme in chosen.searched:
            weights, activations = _modules(layer.name)
            if bits.setdefault(activations, scheme.activations.bits) != scheme.activations.bits:
                raise InvalidInputError(
                    "export",
                    f"layer {layer.name!r} is {scheme}: hawq quantizes its input once for all "
                    f"layers of the block that read it ({activations!r}); nearest: "
                    f"{_SCHEMES[bits[activations]]}",
                )
            bits[weights] = scheme.weights.bits
        return f"bit_config = {pprint.pformat(bits, width=100, sort_dicts=False)}\n"

    def read(self, text: str, graph: LayerGraph) -> Mapping[LayerName, Scheme]:
        """Return the schemes; modules that are no layer of the network quantize activations."""
        bits = literal(text, "bit_config")
        found = {}
        for layer in graph.layers:
            weights, activations = _modules(layer.name)
            if weights in bits:
                wanted = (bits[weights], bits.get(activations))
                if wanted[0] not in _SCHEMES or wanted[0] != wanted[1]:
                    raise InvalidInputError(
                        "import",
                        f"no scheme stands for {weights!r} with {wanted[0]} bits and "
                        f"{activations!r} with {wanted[1]}",
                    )
                found[layer.name] = parse_scheme(_SCHEMES[wanted[0]])
        return found


def _modules(layer: LayerName) -> tuple[str, str]:
    """Return the modules that quantize the weights and the input of a layer."""
    parent, dot, leaf = layer.rpartition(".")
    place = re.search(r"[2-9]\d*$|1\d+$", leaf)
    number = int(place[0]) - 1 if place else ""
    return f"{parent}{dot}quant_{leaf}", f"{parent}{dot}quant_act{number}"
