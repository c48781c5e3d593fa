"""What a source of synthetic data returns."""

from __future__ import annotations

from dataclasses import dataclass

from mpq.nn.batches import Batch


@dataclass(frozen=True, slots=True)
class Made:
    """Synthetic batches, and in a few words how well they came out."""

    batches: tuple[Batch, ...]
    told: str


def batch_sizes(samples: int, batch: int) -> list[int]:
    """Return the sizes of batches of at most `batch` that hold `samples` together."""
    return [min(batch, samples - start) for start in range(0, samples, batch)]
