"""A small denoiser of 8x8 digits: a U-Net whose skips are concatenated, sampled in 20 steps (DDIM).

Calibration batches are its own inputs over the timesteps of a sampling loop (Q-Diffusion). Train
it again with: python -m examples.digits_diffusion (half a minute on one core)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from examples.digits_data import CHECKPOINTS, load_checkpoint
from examples.splits import check_split
from mpq.nn.timesteps import TimestepBatches, timestep_calibration

DIVERGENCE = "mse"

TIMES, STEPS, IMAGES = 200, 20, 32
SAMPLES = 64
TEST_IMAGES = 597
_ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.05, TIMES), 0)

Batch = dict[str, Tensor]


class Denoiser(nn.Module):
    """Noisy images (n, 1, 8, 8) and their times to the noise in them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2 * width))
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 2 * width)
        self.mid = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.Conv2d(4 * width, 2 * width, 3, padding=1)
        self.last = nn.Conv2d(3 * width, width, 3, padding=1)
        self.out = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Predict the noise; `timestep` is one number or one for each image."""
        rates = torch.exp(torch.arange(self.width // 2) * (-math.log(1000) / (self.width // 2)))
        angles = timestep.reshape(-1, 1).to(x.dtype) * rates.to(x.dtype)
        when = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))[..., None, None]
        wide = F.silu(self.enter(x))
        low = F.silu(self.down(wide) + when)
        middle = F.silu(self.mid(self.norm(low)))
        joined = F.silu(self.up(torch.cat([middle, low], dim=1)))
        grown = F.interpolate(joined, scale_factor=2.0)
        noise: Tensor = self.out(F.silu(self.last(torch.cat([grown, wide], dim=1))))
        return noise


def images(split: str) -> Tensor:
    """Return digits in -1..1: 1200 to train on, 597 others held out."""
    check_split(split)
    pixels = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8 - 1
    return pixels[-TEST_IMAGES:] if split == "held_out" else pixels[:-TEST_IMAGES]


def noised(clean: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    """Return images at their times: sqrt(alpha) x + sqrt(1 - alpha) noise."""
    alpha = _ALPHAS[times].view(-1, 1, 1, 1)
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


def sample_loop(model: nn.Module, count: int = IMAGES) -> Tensor:
    """Sample images by DDIM without noise of its own; the first draw is the global generator's."""
    x = torch.randn(count, 1, 8, 8)
    for time in range(TIMES - 1, -1, -TIMES // STEPS):
        alpha = _ALPHAS[time]
        before = _ALPHAS[time - TIMES // STEPS] if time >= TIMES // STEPS else torch.tensor(1.0)
        noise = model(x, torch.full((count,), time))
        clean = ((x - (1 - alpha).sqrt() * noise) / alpha.sqrt()).clamp(-1, 1)
        x = before.sqrt() * clean + (1 - before).sqrt() * noise
    return x


def make_model() -> nn.Module:
    """Return the trained network: float32, eval mode, a fresh object on each call."""
    return load_checkpoint(Denoiser, "diffusion")


def chosen_batches(split: str) -> TimestepBatches:
    """Return inputs of the network over its timesteps, of other images in each split."""
    check_split(split)
    seed = int(split == "held_out")
    return timestep_calibration(make_model(), sample_loop, samples=SAMPLES, every=2, seed=seed)


def make_batches(split: str = "calibration") -> list[Batch]:
    """Return 10 batches of a timestep each, 60 samples together."""
    return list(chosen_batches(split).batches)


def calibration_batches() -> list[Batch]:
    """Return the batches on which sensitivity is measured."""
    return make_batches("calibration")


def held_out_batches() -> list[Batch]:
    """Return the batches on which the result is judged."""
    return make_batches("held_out")


def evaluate(model: nn.Module) -> dict[str, float]:
    """Return the mean squared error of the noise in 597 test images at random times."""
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    clean = images("held_out")
    times = torch.randint(TIMES, (len(clean),), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    with torch.no_grad():
        error = F.mse_loss(model(noised(clean, times, noise), times), noise)
    model.train(was_training)
    return {"noise error": float(error)}


def train(steps: int = 1200, told: Callable[[str], None] = print) -> nn.Module:
    """Train on 1200 digits and return the model in eval mode."""
    torch.manual_seed(0)
    model = Denoiser().train()
    clean = images("calibration")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        some = clean[torch.randint(len(clean), (64,))]
        times, noise = torch.randint(TIMES, (64,)), torch.randn_like(some)
        loss = F.mse_loss(model(noised(some, times, noise), times), noise)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 300 == 299:
            told(f"step {step + 1}: {float(loss.detach()):.4f}")
    return model.eval()


def main() -> None:
    """Train the network, print its error and write its checkpoint."""
    torch.set_num_threads(1)
    model = train()
    print(evaluate(model))
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, CHECKPOINTS / "digits_diffusion.safetensors")


if __name__ == "__main__":
    main()
