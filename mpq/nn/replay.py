"""Run one layer alone on a remembered input: what its output would be with other weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mpq.nn.weights import CacheOf, ExpertWeight


def replay(
    module: nn.Module, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return the output of `module` on `inputs` with `weight` and `bias` in place of its own.

    Linear in the weight (without bias) for every layer kind, embeddings included. The output of
    experts is the weight itself, that of a KV cache its input.
    """
    if isinstance(module, nn.Linear):
        return F.linear(inputs, weight, bias)
    if isinstance(module, nn.Embedding):
        return F.embedding(inputs, weight)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        output: torch.Tensor = module._conv_forward(inputs, weight, bias)
        return output
    if isinstance(module, nn.ConvTranspose2d):
        geometry: dict[str, Any] = {
            "stride": module.stride,
            "padding": module.padding,
            "output_padding": module.output_padding,
            "groups": module.groups,
            "dilation": module.dilation,
        }
        return F.conv_transpose2d(inputs, weight, bias, **geometry)
    if isinstance(module, ExpertWeight):
        return weight
    if isinstance(module, CacheOf):
        return inputs
    raise TypeError(f"no replay of {type(module).__name__}")
