"""How far two outputs of the network are apart, and the square root of its curvature.

For outputs z of the original and z' of the quantized network the divergence of a sample is

    kl      mean over positions of KL(softmax z || softmax z')
    cosine  mean over positions of 1 - cos(z, z')
    mse     mean over positions and features of (z - z')^2

To second order each is 1/2 |S^T dh|^2 with h = head(z) and a known S (kl: S S^T = diag p - p p^T
at each position), which is what the response sketch probes with random signs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

Kind = Literal["kl", "cosine", "mse"]
_SMALL = 2**24  # elements


def detect(output: torch.Tensor) -> Kind:
    """Return "mse" for single numbers, "cosine" for unit vectors (embeddings), else "kl"."""
    if output.ndim < 2 or output.shape[1 if output.ndim == 4 else -1] == 1:
        return "mse"  # the softmax of one class is always 1
    norms = output.detach().float().norm(dim=-1)
    return "cosine" if torch.allclose(norms, torch.ones_like(norms), atol=1e-3) else "kl"


@dataclass(frozen=True, slots=True)
class OutputDivergence:
    """One of the three divergences; classes are on axis 1 of image maps, else on the last.

    A mask (samples, positions) tells which positions are real; the others count for nothing.
    """

    kind: Kind

    def head(self, output: torch.Tensor) -> torch.Tensor:
        """Return the differentiable h(z): normalised for cosine, classes last for kl."""
        if output.ndim == 1:
            return output.unsqueeze(-1)
        if self.kind == "cosine":
            return F.normalize(output, dim=-1)
        if self.kind == "kl" and output.ndim == 4:
            return output.movedim(1, -1)
        return output

    def between(
        self, original: torch.Tensor, output: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the divergence of each sample, shape (N,).

        Computed in float64 where the outputs are small: at 8 bits the divergence is near the
        rounding error of float32.
        """
        wide = torch.float64 if original.numel() <= _SMALL else torch.float32
        return self.between_heads(self.head(original.to(wide)), self.head(output.to(wide)), mask)

    def between_heads(
        self, reference: torch.Tensor, changed: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the divergence of each sample from h(z) and h(z'), shape (N,)."""
        if self.kind == "mse":
            at_position = (reference - changed).square().mean(-1)
        elif self.kind == "cosine":
            at_position = 0.5 * (reference - changed).square().sum(-1)  # = 1 - cos, without
        else:  # the cancellation of 1 - cos
            log_p, log_q = reference.log_softmax(-1), changed.log_softmax(-1)
            at_position = (log_p.exp() * (log_p - log_q)).sum(-1)
        return self._per_sample(at_position * self._position_weights(at_position, mask))

    def seeds(
        self, head: torch.Tensor, signs: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return S r for sign vectors r of the shape of `head`, ready to be back-propagated.

        E_r (S r)(S r)^T = S S^T, so 1/2 E_r <S r, dh>^2 is the divergence to second order.
        """
        weights = self._position_weights(head[..., 0], mask).sqrt().unsqueeze(-1)
        if self.kind == "mse":
            return torch.mul(signs * weights, (2.0 / head.shape[-1]) ** 0.5)
        if self.kind == "cosine":
            return signs * weights
        root = head.softmax(-1).sqrt()
        projected = signs - root * (root * signs).sum(-1, keepdim=True)
        return root * projected * weights

    def columns(
        self, head: torch.Tensor, mask: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        """Yield the columns of S, one for each element of a sample, ready to be back-propagated.

        Sums over them are exact where means over random `seeds` are estimates: sum_e (S e)(S e)^T
        = S S^T.
        """
        for element in range(head[0].numel()):
            unit = head.new_zeros(head.shape)
            unit.view(len(head), -1)[:, element] = 1
            yield self.seeds(head, unit, mask)

    @staticmethod
    def _per_sample(positions: torch.Tensor) -> torch.Tensor:
        return positions.flatten(1).sum(1) if positions.ndim > 1 else positions

    @staticmethod
    def _position_weights(positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return weights that average the real positions of each sample."""
        real = torch.ones_like(positions) if mask is None else mask.to(positions)
        total = real.flatten(1).sum(1) if real.ndim > 1 else real
        shape = (-1,) + (1,) * (real.ndim - 1)
        return real / total.clamp_min(1e-9).reshape(shape)
