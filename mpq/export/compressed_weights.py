"""The weights of a compressed-tensors checkpoint: packed into int32 as vLLM loads them.

A weight becomes "weight_packed" (rows, ceil(columns * bits / 32)), "weight_scale" (rows, groups),
"weight_shape" and, asymmetric, "weight_zero_point" (ceil(rows * bits / 32), groups); with 8-bit
activations an int8 "weight" instead of the packed one. Packed codes are unsigned: a symmetric one
is shifted by 2^(bits - 1). Source: compressed_tensors 0.20, compressors/pack_quantized.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from mpq.core.chosen import Chosen
from mpq.core.formats import PerTensor, Scheme
from mpq.export import get_exporter
from mpq.export.compressed_tensors import INTEGER, group_format, refuse_tied
from mpq.export.packed import PackedFile
from mpq.export.rules import as_told, check_runs
from mpq.nn.quantizers import StoredWeight, WeightQuantizer


def write_compressed(
    path: str | Path,
    model: nn.Module,
    chosen: Chosen,
    quantizer: WeightQuantizer | None = None,
    target: str = "compressed-tensors",
) -> PackedFile:
    """Write model.safetensors of a network as allocated, and count its bytes.

    Raises InvalidInputError, before anything is written, for what the target cannot run.
    """
    from safetensors.torch import save_file

    exporter = get_exporter(target)
    check_runs(exporter, as_told(exporter, chosen))
    refuse_tied(chosen)
    quantizer = quantizer or WeightQuantizer()
    stored = {part.name for part in chosen.graph.unsearched}
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name in stored
    }
    parameters = dict(model.named_parameters())
    for unit in chosen.graph.units:
        for layer in chosen.graph.stored_layers(unit):
            weight, scheme = parameters[layer.weight_id].detach(), chosen.schemes[layer.name]
            if scheme.weights.is_native:
                tensors[layer.weight_id] = weight.contiguous()
            else:
                packed = quantizer.store(layer.weight_id, weight, scheme.weights)
                named = _tensors_of(packed, scheme)
                tensors |= {f"{layer.name}.{name}": tensor for name, tensor in named.items()}
    save_file(tensors, path, {"format": "pt"})
    return PackedFile(
        path=Path(path),
        tensor_bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
        file_bytes=Path(path).stat().st_size,
    )


def _tensors_of(weight: StoredWeight, scheme: Scheme) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    bits, half = weight.fmt.bits, 2 ** (weight.fmt.bits - 1)
    codes = weight.codes.reshape(rows, columns)
    scales = weight.scales.half()
    if weight.fmt.granularity == PerTensor():
        scales = scales.reshape(1)
    else:
        scales = scales.reshape(rows, -1)
    zero_points = weight.zero_points
    if group_format(scheme) == INTEGER:
        shift = 0 if zero_points is None else half
        made = {"weight": (codes - shift).to(torch.int8), "weight_scale": scales}
        if zero_points is not None:
            made["weight_zero_point"] = (zero_points.reshape(rows, -1) - half).to(torch.int8)
        return made
    unsigned = codes + half if zero_points is None else codes
    made = {
        "weight_packed": pack_words(unsigned, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if zero_points is not None:
        by_group = zero_points.reshape(rows, -1).T
        made["weight_zero_point"] = pack_words(by_group, bits).T.contiguous()
    return made


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Return each row of unsigned values as one little-endian bit stream of int32 words."""
    unsigned = values.to(torch.uint8).numpy()
    planes = (unsigned[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    stream = np.packbits(planes.reshape(len(unsigned), -1), axis=1, bitorder="little")
    whole = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 4)))
    return torch.from_numpy(np.ascontiguousarray(whole).view("<i4"))
