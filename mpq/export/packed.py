"""The packed checkpoint: one safetensors file that holds a quantized network to the last bit.

A searched weight "layer.weight" becomes "layer.weight.codes" (codes of b bits in one little-endian
bit stream), "layer.weight.scales" (IEEE half) and what else `Format.parts` of its format names
("layer.weight.zero_points"); everything else is stored as it is, tied tensors once. Metadata
holds the allocation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mpq.core.errors import InvalidInputError
from mpq.core.layers import LayerGraph
from mpq.core.problem import Allocation
from mpq.nn.quantizers import WeightQuantizer, family_of

_NATIVE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A written checkpoint: bytes of its tensors and of the whole file."""

    path: Path
    tensor_bytes: int
    file_bytes: int


def write_packed(
    path: str | Path,
    model: nn.Module,
    graph: LayerGraph,
    allocation: Allocation,
    quantizer: WeightQuantizer | None = None,
    corrected: Mapping[str, torch.Tensor] | None = None,
) -> PackedFile:
    """Write the network as `allocation` stores it and count the bytes on disk.

    `corrected` are biases and statistics that are stored in place of the network's, by name.
    """
    from safetensors.torch import save_file

    quantizer = quantizer or WeightQuantizer()
    stored = {part.name for part in graph.unsearched}
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in {**model.state_dict(keep_vars=True), **(corrected or {})}.items()
        if name in stored
    }
    parameters = dict(model.named_parameters())
    for unit in graph.units:
        fmt = allocation[unit.name].weights
        for layer in graph.stored_layers(unit):
            weight = parameters[layer.weight_id].detach()
            if fmt.is_native:
                tensors[layer.weight_id] = weight.to(_NATIVE[fmt.family]).contiguous()
            else:
                packed = quantizer.store(layer.weight_id, weight, fmt, layer.channel_axis)
                arrays = packed.pack()
                tensors |= {f"{layer.weight_id}.{part}": a for part, a in arrays.items()}
    metadata = {"format": "mpq-packed-1", "allocation": json.dumps(allocation.text())}
    save_file(tensors, path, metadata)
    return PackedFile(
        path=Path(path),
        tensor_bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
        file_bytes=Path(path).stat().st_size,
    )


def read_packed(path: str | Path, graph: LayerGraph) -> dict[str, torch.Tensor]:
    """Return every tensor of a packed checkpoint, dequantized, by parameter or buffer name.

    Raises InvalidInputError for a file that is not one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            allocation = Allocation.from_text(json.loads(file.metadata()["allocation"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise InvalidInputError(
            "packed_file", f"{path} is not a packed checkpoint: {error}"
        ) from error
    for unit in graph.units:
        fmt = allocation[unit.name].weights
        for layer in graph.stored_layers(unit):
            if fmt.is_native:
                continue
            parts = fmt.parts(layer.weight_shape, layer.channel_axis)
            arrays = {part: tensors.pop(f"{layer.weight_id}.{part}") for part in parts}
            tensors[layer.weight_id] = (
                family_of(fmt)
                .unpack(arrays, fmt, layer.weight_shape, layer.channel_axis)
                .dequantize()
            )
    return tensors
