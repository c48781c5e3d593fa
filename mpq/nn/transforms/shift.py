"""SQ-b of MPTQ-ViT: channels are centred and then smoothed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mpq.nn.batches import Batch
from mpq.nn.transforms.folding import Channels, Fold, fold_norms
from mpq.nn.transforms.report import TransformReport
from mpq.nn.transforms.smooth import balance, check_strength


def shift(
    model: nn.Module, batches: Sequence[Batch], strength: float = 0.5, *, seed: int = 0
) -> TransformReport:
    """Centre channels at b_j = (max_j + min_j) / 2, then smooth what is left.

    With s_j = max|X_j - b_j|^a / max|W_j|^(1-a), a the `strength`, the norm becomes (gamma / s,
    (beta - b) / s) and its readers W diag(s) with bias + W b; one without a bias gets one. A norm
    that has no bias (RMSNorm) stays. Changes `model`; draws nothing. Our reading of SQ-b in
    MPTQ-ViT (2024). Raises InvalidInputError (`transform`) for a strength outside [0, 1].
    """
    check_strength("shift", strength)

    def fold_of(channels: Channels, weights: Sequence[torch.Tensor]) -> Fold:
        centre = (channels.high + channels.low) / 2
        half = (channels.high - channels.low) / 2
        return Fold(balance(half, weights, strength), centre)

    return fold_norms(model, batches, f"shift({strength:g})", fold_of)
