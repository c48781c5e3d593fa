"""SmoothQuant: outliers of activations move into the weights that read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mpq.core.errors import InvalidInputError
from mpq.nn.batches import Batch
from mpq.nn.transforms.folding import Channels, Fold, fold_norms
from mpq.nn.transforms.report import TransformReport


def smooth(
    model: nn.Module, batches: Sequence[Batch], strength: float = 0.5, *, seed: int = 0
) -> TransformReport:
    """Scale channels between norms and linear layers by s_j = max|X_j|^a / max|W_j|^(1-a).

    `strength` is a in [0, 1]; W_j is column j of all weights that read the norm. Folded into the
    norm (gamma / s, beta / s) and the readers (W diag(s)), so that the network computes the same.
    Changes `model`; draws nothing. Xiao et al. 2023, SmoothQuant, eq. 4. Raises
    InvalidInputError (`transform`) for a strength outside [0, 1].
    """
    check_strength("smooth", strength)

    def fold_of(channels: Channels, weights: Sequence[torch.Tensor]) -> Fold:
        return Fold(balance(channels.largest, weights, strength))

    return fold_norms(model, batches, f"smooth({strength:g})", fold_of)


def check_strength(transform: str, strength: float) -> None:
    """Raise InvalidInputError (`transform`) where a strength is not in [0, 1]."""
    if not 0 <= strength <= 1:
        raise InvalidInputError(
            "transform",
            f"{transform}({strength:g}): the strength is between 0 (all in the activations) and 1 "
            f"(all in the weights); 0.5 is usual",
        )


def balance(
    largest: torch.Tensor, weights: Sequence[torch.Tensor], strength: float
) -> torch.Tensor:
    """Return max|X_j|^a / max|W_j|^(1-a) of each channel, float64.

    A channel that is never anything but zero on either side keeps its scale.
    """
    columns = torch.stack([weight.double().abs().amax(0) for weight in weights]).amax(0)
    scale = largest**strength / columns ** (1 - strength)
    usable = (largest > 0) & (columns > 0) & torch.isfinite(scale)
    return torch.where(usable, scale, torch.ones_like(scale)).clamp(1e-5, 1e5)
