"""How far quantization moves a layer's input."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpq.core.formats import Scheme
from mpq.core.layers import Layer
from mpq.nn.quantizers import fake_quantize_activation


def squared_input_changes(
    inputs: torch.Tensor, layer: Layer, schemes: Sequence[Scheme], samples: int
) -> torch.Tensor:
    """Return |Q(a) - a|^2 of each scheme's activation format and sample, float64.

    The shape is (schemes, samples); 0 where activations stay as they are.
    """
    of_format = {
        fmt: (fake_quantize_activation(inputs, fmt, layer.static_range(fmt)).double() - inputs)
        .reshape(samples, -1)
        .square()
        .sum(1)
        .cpu()
        for fmt in {scheme.activations for scheme in schemes if not scheme.activations.is_native}
    }
    same = torch.zeros(samples, dtype=torch.float64)
    return torch.stack([of_format.get(scheme.activations, same) for scheme in schemes])
