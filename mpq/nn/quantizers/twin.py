"""Twin uniform activations for what comes out of GELU: a small negative lobe, a long positive part.

Half of the codes, 2^(b-1) levels k = 0, 1, ..., are for negative values, -k s, half for positive
ones, k s 2^m, so that kernels need a shift only (PTQ4ViT, Yuan et al., ECCV 2022). OPT-m (MPTQ-ViT)
searches m and s for each layer instead of fixing them; our reading of it, `search_steps`:

- from a calibrated range (low, high): the step of the longer side covers it exactly, and m is the
  largest integer (the smallest, if the negative side is the longer one) with which the other side
  is covered, too, so that its step is less than twice what it needs. A side without values is free.
- without a range, each sample takes, by the squared error on its own values, one of ten pairs of
  steps: those of its range times 1, 0.85, ... 0.4, the shorter side's halved or not.
"""

from __future__ import annotations

import torch

from mpq.core.formats import Format

_SMALLEST = 1e-12  # a step of nothing
_LARGEST_RATIO = 2.0**60  # of both steps; beyond that the shorter side is nothing
_SAMPLED = 4096  # values of a sample, evenly spaced, that its steps are searched on
_SHRUNK = (1.0, 0.85, 0.7, 0.55, 0.4)


def twin(
    values: torch.Tensor, fmt: Format, limits: tuple[float, float] | None = None
) -> torch.Tensor:
    """Return values (samples first; float32 or wider) rounded in both regions."""
    if limits is None:
        flat = values.flatten(1) if values.ndim > 1 else values.reshape(1, -1)
        negative, positive = search_steps(flat, fmt.bits)
        shape = (-1,) + (1,) * (values.ndim - 1)
        negative, positive = negative.reshape(shape), positive.reshape(shape)
    else:
        low, high = (values.new_tensor([limit]) for limit in limits)
        negative, positive = _covering(low.clamp_max(0.0), high.clamp_min(0.0), fmt.bits)
    return _rounded(values, negative, positive, fmt.bits)


def search_steps(samples: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the negative and the positive step with the least squared error of each sample.

    `samples` is (samples, values), steps are (samples, 1), their ratio is a power of two.
    """
    low = samples.amin(1, keepdim=True).clamp_max(0.0)
    high = samples.amax(1, keepdim=True).clamp_min(0.0)
    some = samples[:, :: max(1, -(-samples.shape[1] // _SAMPLED))]
    steps = _covering(low, high, bits)
    negative_is_short = -low <= high
    best, least = steps, torch.full_like(low, torch.inf)
    for halved in (1.0, 0.5):
        for shrunk in _SHRUNK:
            negative = steps[0] * torch.where(negative_is_short, halved * shrunk, shrunk)
            positive = steps[1] * torch.where(negative_is_short, shrunk, halved * shrunk)
            error = (_rounded(some, negative, positive, bits) - some).square_().sum(1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, negative, best[0]), torch.where(better, positive, best[1])
    return best


def _covering(
    low: torch.Tensor, high: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the negative and the positive step that cover low <= 0 and high >= 0."""
    top = 2 ** (bits - 1) - 1
    negative, positive = ((end / top).clamp_min(_SMALLEST) for end in (-low, high))
    longer = torch.maximum(negative, positive)
    ratio = (longer / torch.minimum(negative, positive)).clamp_max(_LARGEST_RATIO)
    _, exponent = torch.frexp(ratio)
    other = torch.ldexp(longer, 1 - exponent)  # divided by the largest power not above the ratio
    return (
        torch.where(negative < positive, other, negative),
        torch.where(positive < negative, other, positive),
    )


def _rounded(
    values: torch.Tensor, negative: torch.Tensor, positive: torch.Tensor, bits: int
) -> torch.Tensor:
    top = 2 ** (bits - 1) - 1
    step = torch.where(values < 0, negative, positive)
    return (values / step).round_().clamp_(-top, top).mul_(step)
