"""Write an allocation for others to load, and read theirs: one target per file."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from mpq.core.chosen import Chosen
from mpq.core.errors import InvalidInputError, unknown
from mpq.core.formats import Scheme
from mpq.core.layers import LayerGraph, LayerName
from mpq.core.problem import Allocation
from mpq.core.protocols import Exporter
from mpq.export.names import chosen_without, graph_without
from mpq.export.rules import as_it_is, as_told, check_runs

_MALFORMED = (
    AttributeError,
    LookupError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
    re.error,
)

EXPORTERS: dict[str, str] = {
    "mpq": "mpq.export.allocation_json:AllocationJson",
    "compressed-tensors": "mpq.export.compressed_tensors:CompressedTensors",
    "compressed-tensors-hf": "mpq.export.compressed_tensors:CompressedTensorsHf",
    "torchao": "mpq.export.torchao:TorchAo",
    "torchao-hf": "mpq.export.torchao:TorchAoHf",
    "gguf": "mpq.export.gguf:Gguf",
    "gptqmodel": "mpq.export.gptqmodel:GptqModel",
    "modelopt": "mpq.export.modelopt:ModelOpt",
    "modelopt-hf": "mpq.export.modelopt:ModelOptHf",
    "onnxruntime": "mpq.export.onnxruntime:OnnxRuntime",
    "nncf": "mpq.export.nncf:Nncf",
    "hawq": "mpq.export.hawq:Hawq",
}


def get_exporter(target: str, **options: Any) -> Exporter:
    """Return the exporter of that name, made with `options`; raises InvalidInputError."""
    if target not in EXPORTERS:
        raise unknown("export target", target, EXPORTERS)
    module, _, attribute = EXPORTERS[target].partition(":")
    return cast(Exporter, getattr(importlib.import_module(module), attribute)(**options))


def export_allocation(
    target: str,
    chosen: Chosen,
    path: str | Path | None = None,
    *,
    strip: str = "",
    **options: Any,
) -> Path:
    """Write an allocation for a target and return the path; default "mpq-TARGET" here.

    `strip` is taken off the names of layers: "encoder." where the search saw the network as a part
    of another module and the target loads it alone. `options` are those of the exporter.
    Raises InvalidInputError, before anything is written, for what the target cannot run.
    """
    name, text = export_text(target, chosen, strip=strip, **options)
    place = Path(name) if path is None else Path(path)
    try:
        place.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInputError("export", f"cannot write {place}: {error.strerror}") from error
    return place


def export_text(target: str, chosen: Chosen, *, strip: str = "", **options: Any) -> tuple[str, str]:
    """Return the usual name of the file that `export_allocation` writes, and its content."""
    exporter = get_exporter(target, **options)
    named = as_told(exporter, chosen_without(strip, chosen))
    check_runs(exporter, named)
    return f"mpq-{target}{exporter.suffix}", exporter.text(named)


def import_allocation(
    target: str, path: str | Path, graph: LayerGraph, *, strip: str = "", **options: Any
) -> Mapping[LayerName, Scheme]:
    """Return the scheme that a target's file gives to each searched layer of a network.

    Layers it leaves alone keep the format they have; `strip` is a prefix of the network's names
    that the file does without. Raises InvalidInputError for a file that cannot be read, names other
    layers or holds what no scheme stands for.
    """
    exporter, named = get_exporter(target, **options), graph_without(strip, graph)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError("import", f"cannot read {path}: {error}") from error
    try:
        found = exporter.read(text, named)
    except _MALFORMED as error:
        told = " ".join(str(error).split())
        raise InvalidInputError(
            "import", f"{path} is no file of {target}: {type(error).__name__} {told}"
        ) from error
    if other := sorted(set(found) - set(named.by_name)):
        raise InvalidInputError(
            "import", f"{path} names layer {other[0]!r}, which the network does not have"
        )
    layers = graph.by_name
    searched = [n for u in graph.units for n in u.layers if not layers[n].is_input]
    return Allocation(
        graph.expanded({n: found.get(n.removeprefix(strip), as_it_is(layers[n])) for n in searched})
    )


def predicted_bytes(target: str, chosen: Chosen, **options: Any) -> int | None:
    """Return the bytes of all tensors of the network in a target's own file, headers left out.

    Tied weights count once. None where the target stores no network.
    """
    exporter = get_exporter(target, **options)
    chosen = as_told(exporter, chosen)
    check_runs(exporter, chosen)
    total = chosen.graph.fixed_bytes
    for unit in chosen.graph.units:
        for layer in chosen.graph.stored_layers(unit):
            stored = exporter.stored_bytes(layer, chosen.schemes[layer.name])
            if stored is None:
                return None
            total += stored
    return total
