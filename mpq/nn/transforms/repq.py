"""RepQ-ViT / RepQuant: ranges of channels after a norm become one range for the layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from mpq.core.errors import InvalidInputError
from mpq.nn.batches import Batch
from mpq.nn.transforms.folding import Channels, Fold, fold_norms
from mpq.nn.transforms.report import TransformReport

_LARGEST_RATIO = 1e4


def repq(
    model: nn.Module, batches: Sequence[Batch], largest: float = math.inf, *, seed: int = 0
) -> TransformReport:
    """Give every channel that leaves a norm the same range, of the mean scale and zero point.

    With s_j = max_j - min_j (in steps of any grid), z_j = -min_j / s_j, their means s~ and z~ (cut
    to [0, 1], as ranges here hold zero), min~ = -z~ s~, r = s / s~ and b = min / r - min~, the norm
    becomes (gamma / r, beta / r - b) and its readers W diag(r) with bias + W diag(r) b; one without
    a bias gets one. Afterwards each channel lies in [min~, min~ + s~], so that one static range
    per tensor serves as well as one per channel did. `largest` bounds r to [1 / largest, largest]:
    clipped channels, as in our reading of LRP-QViT. A norm without a bias (RMSNorm) stays. Changes
    `model`; draws nothing. Li et al. 2023, RepQ-ViT. Raises InvalidInputError (`transform`) for a
    bound below 1.
    """
    if not largest >= 1:
        raise InvalidInputError(
            "transform", f"repq({largest:g}): the largest ratio of scales is a number from 1 on"
        )

    def fold_of(channels: Channels, weights: Sequence[torch.Tensor]) -> Fold:
        spans = channels.high - channels.low
        usable = spans > 0
        if not usable.any():
            return Fold(torch.ones_like(spans))
        scales = torch.where(usable, spans, spans[usable].mean())
        scale = scales.mean()
        bound = min(largest, _LARGEST_RATIO)
        ratio = (scales / scale).clamp(1 / bound, bound)
        zero = (-channels.low / scales)[usable].mean().clamp(0, 1)
        lowest = -zero * scale
        return Fold(ratio, channels.low - ratio * lowest)

    text = "repq" if math.isinf(largest) else f"repq({largest:g})"
    return fold_norms(model, batches, text, fold_of)
