"""Codes as they lie in a file: a stream of bits, or five ternary digits to a byte."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

_TRITS = 3 ** np.arange(5, dtype=np.int64)


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


def to_stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes in [0, 2^bits), bits <= 8, as a bit stream (uint8)."""
    return torch.from_numpy(pack_bits(codes.reshape(-1).to(torch.uint8).numpy(), bits))


def from_stream(stream: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return codes (int16) of a bit stream; inverse of `to_stream`."""
    return torch.from_numpy(unpack_bits(stream.numpy(), bits, count)).to(torch.int16)


def to_index_stream(indices: torch.Tensor, bits: int) -> torch.Tensor:
    """Return indices of any number of bits as a bit stream (uint8)."""
    values = indices.reshape(-1).to(torch.int64).numpy()
    planes = ((values[:, None] >> np.arange(bits)) & 1).astype(np.uint8)
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def from_index_stream(stream: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return indices (int64) of a bit stream; inverse of `to_index_stream`."""
    planes = np.unpackbits(stream.numpy(), count=count * bits, bitorder="little")
    places = 1 << np.arange(bits, dtype=np.int64)
    return torch.from_numpy((planes.reshape(count, bits) * places).sum(axis=1))


def to_trits(codes: torch.Tensor) -> torch.Tensor:
    """Return codes 0, 1, 2 as bytes of five ternary digits each (uint8)."""
    flat = codes.reshape(-1).to(torch.int64).numpy()
    padded = np.zeros(-(-len(flat) // 5) * 5, np.int64)
    padded[: len(flat)] = flat
    return torch.from_numpy((padded.reshape(-1, 5) * _TRITS).sum(axis=1).astype(np.uint8))


def from_trits(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Return codes (int16); inverse of `to_trits`."""
    digits = packed.numpy().astype(np.int64)[:, None] // _TRITS % 3
    return torch.from_numpy(digits.reshape(-1)[:count].astype(np.int16))
