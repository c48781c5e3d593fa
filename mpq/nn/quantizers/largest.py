"""The largest of many numbers."""

from __future__ import annotations

import torch


def mask_of_largest(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """Return a mask of exactly `count` largest numbers; of equal ones the first are taken.

    `numbers` has any shape, the mask the same; `count` is at most their number.
    """
    flat = numbers.reshape(-1)
    if not count:
        return torch.zeros(numbers.shape, dtype=torch.bool)
    least = flat.kthvalue(len(flat) - count + 1).values
    mask = flat > least
    equal = (flat == least).nonzero().reshape(-1)
    mask[equal[: count - int(mask.sum())]] = True
    return mask.reshape(numbers.shape)
