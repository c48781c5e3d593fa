"""Orthogonal matrices that spread outliers over all channels: Hadamard where there is one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_LARGEST_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Rotation:
    """R = H_p (x) B of size p m, with H_p the Walsh-Hadamard matrix / sqrt(p), B orthogonal."""

    power: int
    block: torch.Tensor  # (m, m), float64

    @property
    def size(self) -> int:
        """Rows of the matrix."""
        return self.power * len(self.block)

    @property
    def additions(self) -> int:
        """Additions (products, in a block that is no Hadamard matrix) for one vector."""
        order = len(self.block)
        return self.size * (int(math.log2(self.power)) + (order if order > 1 else 0))

    def rotated(self, rows: torch.Tensor, block: torch.Tensor | None = None) -> torch.Tensor:
        """Return x R for the last axis; the fast transform, p log2(p) additions a column of B."""
        block = self.block if block is None else block
        order = len(block)
        y = rows.reshape(-1, self.power, order)
        half = 1
        while half < self.power:
            pairs = y.reshape(-1, self.power // (2 * half), 2, half, order)
            y = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
            half *= 2
        y = y.reshape(-1, self.power, order) / math.sqrt(self.power)
        if order > 1:
            y = y @ block.to(y)
        return y.reshape(rows.shape)


def rotation(size: int, seed: int = 0) -> Rotation | None:
    """Return the rotation of a size, None where it would need a block larger than 512.

    A power of two is a Walsh-Hadamard matrix. Else the smallest block is taken that is Hadamard by
    Paley's first construction (12, 20, 24, 44, ...), or one of the odd part of the size, random
    orthogonal from `seed`.
    """
    odd = size
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return Rotation(size, torch.ones(1, 1, dtype=torch.float64))
    order = odd
    while size % order == 0 and order <= _LARGEST_BLOCK:
        if (block := paley(order)) is not None:
            return Rotation(size // order, block / math.sqrt(order))
        order *= 2
    if odd > _LARGEST_BLOCK:
        return None
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(odd, odd, generator=generator, dtype=torch.float64)
    block, upper = torch.linalg.qr(square)
    return Rotation(size // odd, (block * torch.sign(upper.diagonal())).contiguous())


def paley(order: int) -> torch.Tensor | None:
    """Return a Hadamard matrix of +-1 of this order, None where order - 1 is no prime 3 mod 4.

    I + S with S = [[0, 1], [-1, Q]], Q_ij the Legendre symbol of i - j: Paley 1933, I.
    """
    prime = order - 1
    if prime % 4 != 3 or any(prime % d == 0 for d in range(2, math.isqrt(prime) + 1)):
        return None
    squares = {i * i % prime for i in range(1, prime)}
    symbol = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, prime)])
    places = torch.arange(prime)
    matrix = torch.ones(order, order, dtype=torch.float64)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = symbol.double()[(places[:, None] - places[None, :]) % prime]
    matrix[0, 0] = 0
    return matrix + torch.eye(order, dtype=torch.float64)
