"""Static ranges of layer inputs: from what a layer sees to the range that its codes span.

An observer takes a histogram and returns a range inside the smallest and largest value that holds
zero. Values outside it are cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from mpq.core.called import parse_called
from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_format
from mpq.nn.quantizers import fake_quantize_activation

NUM_BINS = 2048
_SHARES = 64  # ranges that are tried for each end

Limits = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts (float64) of values in equal bins between `low` <= 0 and `high` >= 0."""

    counts: torch.Tensor
    low: float
    high: float

    @property
    def width(self) -> float:
        """The width of a bin."""
        return (self.high - self.low) / len(self.counts)

    @property
    def centres(self) -> torch.Tensor:
        """The value that stands for each bin, float64: its centre, but 0 for the bin of zero.

        Zero is exact in every format, and most values of a rectified layer.
        """
        bins = torch.arange(len(self.counts), dtype=torch.float64)
        centres = self.low + (bins + 0.5) * self.width
        return torch.where(centres.abs() <= self.width / 2, 0.0, centres)


Observer = Callable[[Histogram, int], Limits]  # (what was seen, bits of the codes)


def minmax(seen: Histogram, bits: int) -> Limits:
    """Return the smallest and largest value."""
    return seen.low, seen.high


def percentile(seen: Histogram, bits: int, percent: float = 99.99) -> Limits:
    """Return the range that leaves out (100 - percent) % of the values at each end."""
    if not 50 < percent <= 100:
        raise InvalidInputError(
            "observer", f"percentile({percent:g}): a percentage above 50 and up to 100"
        )
    total = float(seen.counts.sum())
    if not total:
        return seen.low, seen.high
    below = seen.counts.cumsum(0) / total
    share = percent / 100

    def quantile(wanted: float) -> float:
        place = min(int((below < wanted).sum()), len(below) - 1)
        before = float(below[place - 1]) if place else 0.0
        inside = float(below[place]) - before
        part = (wanted - before) / inside if inside > 0 else 0.0
        return seen.low + (place + min(max(part, 0.0), 1.0)) * seen.width

    return min(0.0, quantile(1 - share)), max(0.0, quantile(share))


def mse(seen: Histogram, bits: int) -> Limits:
    """Return the range with the least expected squared error of codes of `bits`.

    Both ends are shrunk together to i / 64 of the range, i = 64, ..., 1; then the largest and then
    the smallest value alone, in the same steps.
    """
    fmt = parse_format(f"int{min(bits, 8)}static", "activations")
    values, counts = seen.centres.float(), seen.counts

    def error(limits: Limits) -> float:
        off = fake_quantize_activation(values, fmt, limits).double() - values
        return float((counts * off.square()).sum())

    def best(tried: Callable[[float], Limits]) -> Limits:
        return min((tried(i / _SHARES) for i in range(_SHARES, 0, -1)), key=error)

    low, high = best(lambda share: (seen.low * share, seen.high * share))
    low, high = min(best(lambda share: (low, seen.high * share)), (low, high), key=error)
    return min(best(lambda share: (seen.low * share, high)), (low, high), key=error)


def kl(seen: Histogram, bits: int) -> Limits:
    """Return the range whose codes tell most of the distribution of the values.

    Of ranges i / 64 of the whole one, i = 64, ..., 1, that with the least KL(P || Q): P are the
    counts inside with those outside in the bins at the ends, Q the counts inside merged into
    2^bits levels and spread over the bins of each level where P is not empty. The entropy
    calibration of Migacz 2017 (8-bit inference with TensorRT), in our reading for two ends.
    """
    levels = 2**bits
    best, least = (seen.low, seen.high), float("inf")
    for share in range(_SHARES, 0, -1):
        limits = seen.low * share / _SHARES, seen.high * share / _SHARES
        first = round((limits[0] - seen.low) / seen.width) if seen.width else 0
        stop = round((limits[1] - seen.low) / seen.width) if seen.width else 0
        if stop - first < levels:
            break
        inside = seen.counts[first:stop]
        reference = inside.clone()
        reference[0] += seen.counts[:first].sum()
        reference[-1] += seen.counts[stop:].sum()
        divergence = _divergence(reference, inside, levels)
        if divergence < least:
            best, least = limits, divergence
    return best


def _divergence(reference: torch.Tensor, inside: torch.Tensor, levels: int) -> float:
    """Return KL of the reference from what `levels` codes make of the counts inside."""
    total, kept = reference.sum(), inside.sum()
    if not kept > 0:
        return float("inf")
    level = torch.arange(len(inside)) * levels // len(inside)
    filled = (reference > 0).double()
    sums = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, inside)
    bins = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, filled)
    spread = (sums / bins.clamp_min(1))[level] * filled / kept
    share = reference / total
    told = share > 0
    if bool((spread[told] <= 0).any()):
        return float("inf")
    return float((share[told] * (share[told] / spread[told]).log()).sum())


OBSERVERS: dict[str, Callable[..., Limits]] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
    "kl": kl,
}


def get_observer(text: str) -> Observer:
    """Return the observer that "percentile(99.9)" or the like names.

    Raises InvalidInputError (`unknown_observer`, `observer`) for a name or settings that are none.
    """
    name, settings = parse_called("observer", text, OBSERVERS)
    if len(settings) > (name == "percentile"):
        raise InvalidInputError("observer", f"observer {text!r} has too many settings")
    observer = OBSERVERS[name]
    found = partial(observer, percent=settings[0]) if settings else partial(observer)
    found(Histogram(torch.zeros(1, dtype=torch.float64), 0.0, 0.0), 8)  # refuses wrong settings
    return found
