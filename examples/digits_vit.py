"""A small vision transformer on 16x16 digits: patch 2 (64 tokens), dim 64, depth 6, 4 heads.

38 layers carry weights: the patch convolution, six linears in each of six blocks (q_proj, k_proj,
v_proj, out_proj, fc1, fc2), and the head. Attention is written out with matmul and softmax, so
second derivatives (Hessian-vector products) work on CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.digits_data import (
    IMAGE_SIZE,
    NUM_CLASSES,
    Batch,
    evaluate,
    evaluate_both,
    load_checkpoint,
    loss,
    make_batches,
)

__all__ = [
    "DIVERGENCE",
    "build_model",
    "calibration_batches",
    "evaluate",
    "evaluate_both",
    "held_out_batches",
    "loss",
    "make_batches",
    "make_model",
]

DIVERGENCE = "kl"

PATCH = 2
TOKENS = (IMAGE_SIZE // PATCH) ** 2
DIM = 64
DEPTH = 6
HEADS = 4
MLP_DIM = 4 * DIM


class Attention(nn.Module):
    """Multi-head self-attention with separate projections; (N, T, 64) to (N, T, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(DIM, DIM)
        self.k_proj = nn.Linear(DIM, DIM)
        self.v_proj = nn.Linear(DIM, DIM)
        self.out_proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the tokens of each image: (N, T, 64) to (N, T, 64)."""
        q, k, v = (
            proj(x).unflatten(-1, (HEADS, DIM // HEADS)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = torch.matmul(q, k.transpose(-2, -1)) * (DIM // HEADS) ** -0.5
        mixed = torch.matmul(scores.softmax(dim=-1), v)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Two linears with GELU between them; (N, T, 64) to (N, T, 64) through 256."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(DIM, MLP_DIM)
        self.fc2 = nn.Linear(MLP_DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        """Map each token on its own: (N, T, 64) to (N, T, 64)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block; (N, T, 64) to (N, T, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(DIM)
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        """Add attention, then the MLP, to the tokens (N, T, 64)."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """Patch embedding, learned positions, six blocks, mean over tokens, linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, DIM, PATCH, PATCH)
        self.pos_embed = nn.Parameter(torch.randn(1, TOKENS, DIM) * 0.02)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 1, 16, 16) to logits (N, 10)."""
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        return logits


def build_model() -> VisionTransformer:
    """Return an untrained network, initialised from the global random state."""
    return VisionTransformer()


def make_model() -> nn.Module:
    """Return the trained network: float32, eval mode, a fresh object on each call."""
    return load_checkpoint(build_model, "vit")


def calibration_batches() -> list[Batch]:
    """Return 512 training images in 8 batches of 64."""
    return make_batches("calibration")


def held_out_batches() -> list[Batch]:
    """Return the 719 test images in 12 batches of at most 64."""
    return make_batches("held_out")
