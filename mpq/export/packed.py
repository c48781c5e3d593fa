"""The packed checkpoint: one safetensors file that holds a quantized network to the last bit.

A searched weight "layer.weight" becomes "layer.weight.codes" (codes of b bits in one little-endian
bit stream), "layer.weight.scales" (IEEE half) and, where asymmetric, "layer.weight.zero_points";
everything else is stored as it is, tied tensors once. Metadata holds the allocation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mpq.core.errors import InvalidInputError
from mpq.core.layers import LayerGraph
from mpq.core.problem import Allocation
from mpq.nn.quantizers import IntegerWeight, WeightQuantizer

_NATIVE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pack_bits(values: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Return values of `bits` bits each as one little-endian bit stream, padded to whole bytes."""
    planes = (values[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.reshape(-1), bitorder="little")


def unpack_bits(stream: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Return the first `count` values of a bit stream; inverse of `pack_bits`."""
    planes = np.unpackbits(stream, count=count * bits, bitorder="little").reshape(count, bits)
    places = (1 << np.arange(bits)).astype(np.uint8)
    values: npt.NDArray[np.uint8] = (planes * places).sum(axis=1, dtype=np.uint8)
    return values


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
                tensors |= _tensors_of(layer.weight_id, packed)
    metadata = {"format": "mpq-packed-1", "allocation": json.dumps(allocation.text())}
    save_file(tensors, path, metadata)
    return PackedFile(
        path=Path(path),
        tensor_bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
        file_bytes=Path(path).stat().st_size,
    )


def _tensors_of(name: str, weight: IntegerWeight) -> dict[str, torch.Tensor]:
    bits = weight.fmt.bits
    offset = 2 ** (bits - 1) if weight.fmt.symmetric else 0  # signed codes are stored shifted
    codes = (weight.codes.reshape(-1) + offset).to(torch.uint8).numpy()
    tensors = {
        f"{name}.codes": torch.from_numpy(pack_bits(codes, bits)),
        f"{name}.scales": weight.scales.reshape(-1).half(),
    }
    if weight.zero_points is not None:
        zero_points = weight.zero_points.reshape(-1).to(torch.uint8).numpy()
        tensors[f"{name}.zero_points"] = torch.from_numpy(pack_bits(zero_points, bits))
    return tensors


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
            codes = _read_codes(
                tensors.pop(f"{layer.weight_id}.codes"), fmt.bits, layer.num_weights
            )
            scales = tensors.pop(f"{layer.weight_id}.scales").float().reshape(-1, 1)
            zero_points = None
            if not fmt.symmetric:
                stream = tensors.pop(f"{layer.weight_id}.zero_points")
                zero_points = _read_codes(stream, fmt.bits, len(scales)).reshape(-1, 1)
            offset = 2 ** (fmt.bits - 1) if fmt.symmetric else 0
            tensors[layer.weight_id] = IntegerWeight(
                codes=codes.reshape(len(scales), -1) - offset,
                scales=scales,
                zero_points=zero_points,
                fmt=fmt,
                shape=layer.weight_shape,
                channel_axis=layer.channel_axis,
            ).dequantize()
    return tensors


def _read_codes(stream: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    return torch.from_numpy(unpack_bits(stream.numpy(), bits, count)).to(torch.int16)
