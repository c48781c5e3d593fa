"""Twin uniform activations for what comes out of GELU: a small negative lobe, a long positive part.

Half of the codes, 2^(b-1) levels k = 0, 1, ..., are for negative values, -k s, half for positive
ones, k s 2^m, so that kernels need a shift only (PTQ4ViT, Yuan et al., ECCV 2022). OPT-m (MPTQ-ViT)
searches m and s for each layer instead of fixing them; our reading of it, `search_steps`:

- from a calibrated range (low, high): s covers low with its levels, m is the least integer with
  which the positive levels cover high. Without negative values the positive step covers high.
- without a range, each sample by the squared error on its own values, of the pairs: s so that it
  covers low, or so that s 2^m covers high; m that of the range, or one or two less.
"""

from __future__ import annotations

import torch

from mpq.core.formats import Format

_SMALLEST = 1e-12  # a step of nothing
_SAMPLED = 4096  # values of a sample, evenly spaced, that its steps are searched on


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

    `samples` is (samples, values), steps are (samples, 1); the positive one is the negative one
    times a power of two where a sample has values of both signs.
    """
    top = 2 ** (bits - 1) - 1
    low = samples.amin(1, keepdim=True).clamp_max(0.0)
    high = samples.amax(1, keepdim=True).clamp_min(0.0)
    some = samples[:, :: -(-samples.shape[1] // _SAMPLED)]
    negative, positive = _covering(low, high, bits)
    covering = (high / top).clamp_min(_SMALLEST)
    both = (low < 0) & (high > 0)
    least = torch.full_like(low, torch.inf)
    best = negative, positive
    for less in range(3):
        ratio = positive / negative * 2.0**-less
        for step in (negative, covering / ratio):
            tried = torch.where(both, step, negative), torch.where(both, step * ratio, positive)
            error = (_rounded(some, *tried, bits) - some).square_().sum(1, keepdim=True)
            better = error < least
            best = (
                torch.where(better, tried[0], best[0]),
                torch.where(better, tried[1], best[1]),
            )
            least = torch.where(better, error, least)
    return best


def _covering(
    low: torch.Tensor, high: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the negative step that covers low <= 0, and the positive one that covers high >= 0."""
    top = 2 ** (bits - 1) - 1
    negative, covering = ((end / top).clamp_min(_SMALLEST) for end in (-low, high))
    _, exponent = torch.frexp(covering / negative)
    power = torch.ldexp(torch.ones_like(low), exponent)  # above the ratio, or twice it
    power = torch.where(power / 2 >= covering / negative, power / 2, power)
    return negative, torch.where((low < 0) & (high > 0), negative * power, covering)


def _rounded(
    values: torch.Tensor, negative: torch.Tensor, positive: torch.Tensor, bits: int
) -> torch.Tensor:
    top = 2 ** (bits - 1) - 1
    step = torch.where(values < 0, negative, positive)
    return (values / step).round_().clamp_(-top, top).mul_(step)
