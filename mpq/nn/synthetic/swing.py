"""Strided convolutions that begin at a random place, so that gradients reach every pixel alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn


@contextmanager
def swinging(model: nn.Module, generator: torch.Generator) -> Iterator[nn.Module]:
    """Shift the input of every strided 2-D convolution by a random number of pixels at each call.

    "Swing convolution" (Jeon et al., "Genie"): reflect-pad by stride - 1 on each side and crop
    at a random place; our reading for strides above 2. An input that is too small to reflect
    is left as it is. The hooks are gone afterwards.
    """

    def shifted(conv: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        assert isinstance(conv, nn.Conv2d)
        values, *rest = args
        height, width = values.shape[-2:]
        down, right = (stride - 1 for stride in conv.stride)
        if down >= height or right >= width:
            return args
        padded = F.pad(values, (right, right, down, down), mode="reflect")
        top = int(torch.randint(2 * down + 1, (), generator=generator))
        left = int(torch.randint(2 * right + 1, (), generator=generator))
        return (padded[..., top : top + height, left : left + width], *rest)

    handles = [
        module.register_forward_pre_hook(shifted)
        for module in model.modules()
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
