"""GGUF: lines for `llama-quantize --tensor-type-file`, one for each tensor, and exact bytes.

llama.cpp reads a line "name=type" as a regular expression to search for; the first that matches
wins, so every name is written whole, with its dots escaped and both ends anchored. Types with
blocks of 256 fall back to a larger one without a word where 256 does not divide the columns: such
a layer is refused. Each scheme stands for the type with its grid (bits, group, zero point), which
is never larger than the scheme: K types pack their scales.
Source: llama.cpp tools/quantize and gguf 0.19 (block sizes: constants.GGML_QUANT_SIZES).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from mpq.core.chosen import Chosen
from mpq.core.errors import InvalidInputError, unknown
from mpq.core.formats import Scheme, parse_scheme
from mpq.core.layers import Layer, LayerGraph, LayerName


class Block(NamedTuple):
    """A type of llama.cpp: its name, and the elements and bytes of one block."""

    name: str
    elements: int
    bytes: int


TYPES = {
    "fp32": Block("f32", 1, 4),
    "fp16": Block("f16", 1, 2),
    "bf16": Block("bf16", 1, 2),
    "int8g32": Block("q8_0", 32, 34),
    "int5g32": Block("q5_0", 32, 22),
    "int4g32": Block("q4_0", 32, 18),
    "int6g16": Block("q6_K", 256, 210),
    "int5g32a": Block("q5_K", 256, 176),
    "int4g32a": Block("q4_K", 256, 144),
    "int3g16": Block("q3_K", 256, 110),
    "int2g16a": Block("q2_K", 256, 84),
}
_SCHEMES = {block.name.lower(): text for text, block in TYPES.items()}
_SCHEMES |= {"q4_1": "int4g32a", "q5_1": "int5g32a"}  # read, never written: larger than K types


class Gguf:
    """Tensor types of a language model; `arch` is one of gguf.MODEL_ARCH_NAMES ("llama").

    Without it layers are named as most architectures do that have all of them.
    """

    name = "gguf"
    suffix = ".txt"
    fuses = False
    keeps_static = False
    every_format = False

    def __init__(self, arch: str | None = None) -> None:
        self._arch = arch

    def refusal(self, layer: Layer, scheme: Scheme) -> str:
        """Return the rule that a scheme breaks on a layer."""
        if not scheme.activations.is_native:
            return "has no types for activations"
        columns = layer.weight_shape[-1]
        fitting = {text: b for text, b in TYPES.items() if columns % b.elements == 0}
        block = TYPES.get(str(scheme))
        if block is None:
            types = ", ".join(_told(text, b) for text, b in fitting.items() if b.elements > 1)
            return f"has {types or 'no integer type'} for {columns} columns"
        if columns % block.elements:
            return f"has {block.name} in blocks of {block.elements}, not for {columns} columns"
        return ""

    def stored_bytes(self, layer: Layer, scheme: Scheme) -> int:
        """Return the bytes of the tensor's blocks."""
        block = TYPES[str(scheme)]
        return layer.num_weights // block.elements * block.bytes

    def text(self, chosen: Chosen) -> str:
        """Return one line for each searched tensor."""
        names = gguf_names(chosen.graph, self._arch)
        return "".join(
            f"^{re.escape(names[layer.name])}$={TYPES[str(scheme)].name}\n"
            for layer, scheme in chosen.searched
        )

    def read(self, text: str, graph: LayerGraph) -> Mapping[LayerName, Scheme]:
        """Return the schemes of the lines; of several that match the first wins."""
        names = gguf_names(graph, self._arch)
        found: dict[LayerName, Scheme] = {}
        for line in text.split():
            pattern, equals, kind = line.rpartition("=")
            if not equals:
                raise InvalidInputError("import", f"a line is NAME=TYPE, got {line!r}")
            if kind.lower() not in _SCHEMES:
                raise unknown("GGUF type", kind, _SCHEMES)
            hits = [layer for layer, name in names.items() if re.search(pattern, name)]
            if not hits:
                raise InvalidInputError("import", f"{pattern!r} matches no tensor of the network")
            for layer in hits:
                found.setdefault(layer, parse_scheme(_SCHEMES[kind.lower()]))
        return found


def gguf_names(graph: LayerGraph, arch: str | None = None) -> dict[LayerName, str]:
    """Return the GGUF tensor of every searched layer.

    Without an architecture the names are those that most architectures have which have all of the
    layers. Raises InvalidInputError where none has.
    """
    layers = tuple(name for unit in graph.units for name in unit.layers)
    return dict(zip(layers, _tensors(layers, arch), strict=True))


@cache
def _tensors(layers: tuple[LayerName, ...], arch: str | None) -> tuple[str, ...]:
    known: Counter[tuple[str, ...]] = Counter()
    missing: list[int] = []  # the first layer that each architecture has no name for
    for tensors in _architectures(layers, arch):
        named = tuple(f"{tensor}.weight" for tensor in tensors if tensor)
        if len(named) == len(layers):
            known[named] += 1
        else:
            missing.append(tensors.index(None))
    if not known:
        where = "any architecture of llama.cpp" if arch is None else f"architecture {arch!r}"
        raise InvalidInputError(
            "export", f"layer {layers[max(missing)]!r} has no GGUF name in {where}"
        )
    return known.most_common(1)[0][0]


def _architectures(layers: Sequence[LayerName], arch: str | None) -> Iterator[list[str | None]]:
    """Yield the tensors of all layers in each architecture, None where it has none."""
    try:
        import gguf
    except ImportError as error:
        raise InvalidInputError("export", "GGUF names need gguf: pip install gguf") from error

    archs = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if arch is not None and arch not in archs:
        raise unknown("GGUF architecture", arch, archs)
    numbers = [int(part) for name in layers for part in name.split(".") if part.isdecimal()]
    for name in archs if arch is None else [arch]:
        names = gguf.get_tensor_name_map(archs[name], max(numbers, default=0) + 1)
        yield [_tensor(names.mapping, layer) for layer in layers]


def _tensor(mapping: Mapping[str, tuple[object, str]], layer: LayerName) -> str | None:
    """Look a layer up as converters do: with the prefix of its class put on or taken off."""
    for name in (layer, f"model.{layer}", layer.partition(".")[2]):
        if name in mapping:
            return mapping[name][1]
    return None


def _told(text: str, block: Block) -> str:
    return f"{block.name} ({text}, {8 * block.bytes / block.elements:g} bits)"
