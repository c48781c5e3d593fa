r"""NNCF: a Python script that compresses an OpenVINO model, one call for each format.

`nncf.compress_weights` gives a whole model one format, so each call ignores the nodes of all other
modules: "^__module\.(?!(?:a|b)/)", as OpenVINO names what it converts from PyTorch (its constants
are named differently; to ignore those is to ignore all). What an earlier call has compressed stays.
Calls with 8 bits take no other option.
Source: NNCF 3.4, quantization/quantize_model.py, scopes.py and
quantization/algorithms/weight_compression/algorithm.py.
"""

from __future__ import annotations

import pprint
from collections.abc import Mapping

from mpq.core.chosen import Chosen
from mpq.core.formats import PerChannel, PerGroup, PerTensor, Scheme, parse_scheme
from mpq.core.layers import Layer, LayerGraph, LayerName
from mpq.export.modelopt import literal
from mpq.export.rules import refuse_native

_SCRIPT = '''"""Compress the weights of an OpenVINO model that was converted from PyTorch."""

import re

import nncf

# Layer: (mode, weights that share a scale; -1 is a whole channel).
LAYERS = {layers}


def compress(model, prefix="__module."):
    """Return the model with the weights of every layer above compressed."""
    for mode, group_size in sorted(set(LAYERS.values())):
        chosen = [name for name, of in LAYERS.items() if of == (mode, group_size)]
        names = "|".join(re.escape(name) for name in chosen)
        options = {{}}
        if mode.startswith("int4"):
            options = {{"ratio": 1.0, "group_size": group_size, "all_layers": True}}
        model = nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode(mode),
            ignored_scope=nncf.IgnoredScope(patterns=[f"^{{re.escape(prefix)}}(?!(?:{{names}})/)"]),
            **options,
        )
    return model
'''


class Nncf:
    """Weights of 4 and 8 bits."""

    name = "nncf"
    suffix = ".py"
    fuses = False
    keeps_static = False
    every_format = False

    def refusal(self, layer: Layer, scheme: Scheme) -> str:
        """Return the rule that a scheme breaks on a layer."""
        weights = scheme.weights
        if weights.is_native:
            return refuse_native(layer, scheme)
        if not scheme.activations.is_native:
            return "compresses weights only"
        if layer.kind == "experts":
            return "names modules, and experts are a parameter"
        if weights.bits not in (4, 8):
            return "has 4 and 8 bits"
        if weights.granularity == PerTensor():
            return "has scales per channel or per group"
        if weights.bits == 8 and weights.granularity != PerChannel():
            return "has 8 bits per channel"
        if weights.bits == 4 and layer.kind != "linear":
            return "has 4 bits for linear layers"
        return ""

    def stored_bytes(self, layer: Layer, scheme: Scheme) -> None:
        """Return None: the file is made by OpenVINO."""

    def text(self, chosen: Chosen) -> str:
        """Return the script."""
        modes = {la.name: _mode(scheme) for la, scheme in chosen.searched if not scheme.is_native}
        return _SCRIPT.format(layers=pprint.pformat(modes, width=100, sort_dicts=False))

    def read(self, text: str, graph: LayerGraph) -> Mapping[LayerName, Scheme]:
        """Return the schemes of a script; nothing is run."""
        return {name: _scheme(*mode) for name, mode in literal(text, "LAYERS").items()}


def _mode(scheme: Scheme) -> tuple[str, int]:
    weights = scheme.weights
    size = weights.granularity.size if isinstance(weights.granularity, PerGroup) else -1
    return f"int{weights.bits}_{'sym' if weights.symmetric else 'asym'}", size


def _scheme(mode: str, group_size: int) -> Scheme:
    bits, _, kind = mode.partition("_")
    zero_point = {"sym": "", "asym": "a"}[kind]
    return parse_scheme(f"{bits}{'' if group_size == -1 else f'g{group_size}'}{zero_point}")
