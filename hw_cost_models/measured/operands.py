"""Weights in the layout that the integer kernels of ONNX Runtime read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

CENTRE = 128  # the code of zero in an unsigned 8-bit weight


@dataclass(frozen=True, slots=True)
class Blockwise:
    """A quantized matrix.

    Packed codes (rows, blocks, bytes), scales (rows, blocks), packed zero points (rows, bytes).
    """

    codes: Bytes
    scales: Float32
    zero_points: Bytes | None


def centred_u8(weight: Float32, *, per_channel: bool) -> tuple[Bytes, Float32]:
    """Return codes of the weight's shape and scales, w ~ scale * (code - 128).

    The first axis counts channels; scales are (channels,) or (1,).
    """
    rows = weight.reshape(len(weight), -1) if per_channel else weight.reshape(1, -1)
    scales = np.maximum(np.abs(rows).max(axis=1) / 127, 1e-12).astype(np.float32)
    codes = np.clip(np.rint(rows / scales[:, None]), -127, 127) + CENTRE
    return codes.astype(np.uint8).reshape(weight.shape), scales


def blockwise(weight: Float32, bits: int, block: int, *, symmetric: bool) -> Blockwise:
    """Return a (rows, columns) weight in blocks along its columns, w ~ scale * (code - zero).

    The zero of a symmetric block is 2^(bits - 1) and not stored. Codes and zero points are
    packed from the low bits of each byte upwards.
    """
    rows, columns = weight.shape
    blocks = weight.reshape(rows, columns // block, block)
    if symmetric:
        scales = np.abs(blocks).max(axis=2) / max(2 ** (bits - 1) - 1, 1)
        zeros = np.full(scales.shape, 2.0 ** (bits - 1))
    else:
        low, high = blocks.min(axis=2).clip(max=0), blocks.max(axis=2).clip(min=0)
        scales = (high - low) / (2**bits - 1)
        zeros = np.rint(-low / np.maximum(scales, 1e-12))
    scales = np.maximum(scales, 1e-12).astype(np.float32)
    codes = np.clip(np.rint(blocks / scales[..., None]) + zeros[..., None], 0, 2**bits - 1)
    zero_points = None if symmetric else pack_fields(zeros, bits)
    return Blockwise(pack_fields(codes, bits), scales, zero_points)


def pack_fields(codes: npt.NDArray[Any], bits: int) -> Bytes:
    """Pack codes of 2, 4 or 8 bits along the last axis, the first in the low bits of a byte."""
    per_byte = 8 // bits
    missing = -codes.shape[-1] % per_byte
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)]).astype(np.uint8)
    fields = padded.reshape(*codes.shape[:-1], -1, per_byte)
    packed = np.zeros(fields.shape[:-1], np.uint8)
    for i in range(per_byte):
        packed |= fields[..., i] << np.uint8(bits * i)
    return packed
