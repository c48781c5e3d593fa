"""Small networks with outlier channels, for tests of transforms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 24


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class ViTBlock(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width, bias=False)
        self.attn = Attention(width, 3)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Pre-norm blocks, mean over tokens, a head after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.blocks = nn.Sequential(ViTBlock(), ViTBlock())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embed(x))).mean(dim=1))


class PostNorm(nn.Module):
    """As BERT: the norm's output is added to what its reader gives, so nothing folds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, WIDTH), nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x))
        return self.head(x + self.fc2(F.relu(self.fc1(x))))


class RMSNorm(nn.Module):
    """As transformers writes it: a weight, no bias, a class of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Gated(nn.Module):
    """As Llama's MLP: two layers read one RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, WIDTH), RMSNorm(WIDTH)
        self.gate_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.up_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down_proj = nn.Linear(2 * WIDTH, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vit": ViT,
    "post_norm": PostNorm,
    "gated": Gated,
}


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a network whose norms blow some channels up, as trained transformers do."""
    torch.manual_seed(3)
    network = NETWORKS[name]()
    for module in network.modules():
        if isinstance(module, nn.LayerNorm | RMSNorm):
            with torch.no_grad():
                module.weight.copy_(torch.rand(WIDTH) + 0.1)
                module.weight[::7] *= 30
                if getattr(module, "bias", None) is not None:
                    module.bias.copy_(torch.randn(WIDTH))
                    module.bias[2] = 12.0
    return network.to(dtype).eval()


def samples(batches: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(5)
    return [torch.randn(4, 7, 6, dtype=dtype) for _ in range(batches)]
