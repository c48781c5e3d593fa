"""Images by a generator that is trained, with its latents, to match batch norms."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau

from mpq.core.errors import InvalidInputError
from mpq.nn.batches import Batch
from mpq.nn.patch import evaluating, frozen
from mpq.nn.synthetic.inputs import FloatInput
from mpq.nn.synthetic.made import Made, batch_sizes
from mpq.nn.synthetic.statistics import NormStatistics
from mpq.nn.synthetic.swing import swinging

_LATENT, _WIDE, _NARROW = 256, 128, 64
_LATENT_RATE, _GENERATOR_RATE = 0.1, 0.01
_PATIENCE = 100
_DECAY, _DECAYS = 0.95, 40  # over a whole training, as 4000 steps with 0.95 each 100


class _Generator(nn.Module):
    """Latents (n, 256) to images (n, channels, 4h, 4w) of mean 0 and std 1 over the batch."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.small = (_WIDE, height // 4, width // 4)
        self.linear = nn.Linear(_LATENT, _WIDE * self.small[1] * self.small[2])
        self.layers = nn.Sequential(
            nn.BatchNorm2d(_WIDE),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(_WIDE, _WIDE, 3, padding=1),
            nn.BatchNorm2d(_WIDE),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(_WIDE, _NARROW, 3, padding=1),
            nn.BatchNorm2d(_NARROW),
            nn.LeakyReLU(0.2),
            nn.Conv2d(_NARROW, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.layers(self.linear(latent).unflatten(1, self.small))
        return made


def genie(
    model: nn.Module, sample: Batch | None, *, samples: int, batch: int, steps: int, seed: int
) -> Made:
    """Make images by a new generator for each batch, trained jointly with its latents.

    Minimises `NormStatistics` over the whole batch, with strided convolutions that swing
    (Jeon et al., "Genie", CVPR 2023; constants of its code): latents by Adam (rate 0.1, plateau),
    the generator by Adam (rate 0.01, times 0.95 forty times in a training; there 4000 steps, here
    `steps`). Inputs are (samples, channels, height, width) with sides that 4 divides, of mean 0
    and std 1 over a batch, in the dtype of `sample`. Costs a forward and a backward pass of the
    network and of a small generator a step. Raises InvalidInputError (`sample`) for other shapes.
    """
    statistics = NormStatistics(model, "genie", per_sample=False)
    given = FloatInput.of(model, sample, "genie")
    _check_shape(given.shape)
    sizes = batch_sizes(samples, batch)
    if sizes[-1] == 1:
        raise InvalidInputError(
            "data_option", "genie: a batch of one sample has no statistics: change samples or batch"
        )
    generator = torch.Generator().manual_seed(seed)
    made, first, last = [], 0.0, 0.0
    with evaluating(model, seed), frozen(model), statistics:
        for size in sizes:
            found, losses = _trained(model, statistics, given, size, steps, generator)
            made.append(given.batch(found))
            first, last = first + losses[0], last + losses[-1]
    told = f"batch norm distance {first / len(made):.3g} to {last / len(made):.3g} in {steps} steps"
    return Made(tuple(made), told)


def _check_shape(shape: tuple[int, ...]) -> None:
    if len(shape) != 3 or shape[1] % 4 or shape[2] % 4:
        raise InvalidInputError(
            "sample",
            f"genie makes images (samples, channels, height, width) whose sides 4 divides, and the "
            f"sample's input is {[1, *shape]}: use zeroq, which takes any shape",
        )


def _trained(
    model: nn.Module,
    statistics: NormStatistics,
    given: FloatInput,
    size: int,
    steps: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, list[float]]:
    """Return the images of a batch, and their distance before and after."""
    latent = torch.randn(size, _LATENT, generator=generator).to(given.device, given.dtype)
    latent.requires_grad_(True)
    network = _Generator(*given.shape).to(given.device, given.dtype)
    of_latent = torch.optim.Adam([latent], lr=_LATENT_RATE)
    of_network = torch.optim.Adam(network.parameters(), lr=_GENERATOR_RATE)
    plateau = ReduceLROnPlateau(of_latent, min_lr=1e-4, patience=_PATIENCE)
    decay = ExponentialLR(of_network, gamma=_DECAY ** (_DECAYS / max(steps, 1)))
    losses = []
    with torch.enable_grad(), swinging(model, generator):
        for _ in range(steps):
            images = network(latent)
            distance = statistics.distance(given.batch(images), images)
            losses.append(float(distance.detach()))
            of_latent.zero_grad()
            of_network.zero_grad()
            torch.autograd.backward(distance)
            of_latent.step()
            of_network.step()
            plateau.step(losses[-1])
            decay.step()
    with torch.no_grad():
        images = network(latent).detach()
        final = float(statistics.distance(given.batch(images), images))
    if not torch.isfinite(images).all():
        raise InvalidInputError(
            "output_not_finite", "genie: images are not finite: check the weights of the network"
        )
    return images, [*losses[:1], final]
