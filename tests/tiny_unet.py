"""A tiny denoiser with skip concatenations, and how it samples."""

from __future__ import annotations

import torch
from torch import nn


class TinyUNet(nn.Module):
    """Images (n, 2, 8, 8) and a time to images; both shortcuts are concatenated channels."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.time = nn.Linear(1, width)
        self.enter = nn.Conv2d(2, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.mid = nn.Conv2d(width, width, 3, padding=1)
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.out = nn.Conv2d(2 * width, 2, 1, bias=False)
        self.up2 = nn.Upsample(scale_factor=2)

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor | None = None
    ) -> torch.Tensor:
        when = torch.as_tensor(timestep, dtype=x.dtype).reshape(-1, 1) / 10
        first = torch.relu(self.enter(x) + self.time(when)[:, :, None, None])
        second = torch.relu(self.down(first))
        middle = torch.relu(self.mid(second))
        if label is not None:
            middle = middle + label[:, None, None, None]
        joined = torch.relu(self.up(torch.cat([middle, second], dim=1)))
        return self.out(torch.cat([self.up2(joined), first], dim=-3))


def tiny_unet() -> TinyUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TinyUNet()


def sample_loop(model: nn.Module, images: int = 6, steps: int = 10) -> torch.Tensor:
    """Denoise noise with times 9..0; draws from the global generator, as samplers do."""
    x = torch.randn(images, 2, 8, 8)
    for time in range(steps - 1, -1, -1):
        noise = model(x, timestep=torch.tensor(time))
        x = x - 0.1 * noise + (0.05 * torch.randn_like(x) if time else 0.0)
    return x
