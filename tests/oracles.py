"""Slow, obvious computations that the fast ones are tested against."""

from __future__ import annotations

import numpy as np

from mpq.core.formats import Format, PerGroup, PerTensor

# --- formats ---------------------------------------------------------------------------------


def slow_storage_bits(fmt: Format, shape: tuple[int, ...], channel_axis: int) -> int:
    """Count the bits of each element, and those of a new scale wherever one begins."""
    bits = 0
    weight = np.moveaxis(np.zeros(shape), channel_axis, 0)
    for number, channel in enumerate(weight):
        for place in range(channel.size):
            bits += fmt.bits
            match fmt.granularity:
                case PerTensor():
                    begins = number == 0 and place == 0
                case PerGroup(size):
                    begins = place % size == 0
                case _:
                    begins = place == 0
            if begins:
                bits += 16 + (0 if fmt.symmetric else fmt.bits)
    return bits


# --- tables ----------------------------------------------------------------------------------


def slow_own_scores(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return 1/2 mean u^2 of each cell and the standard error of that mean over samples."""
    cells, samples, probes = vectors.shape
    values, errors = np.zeros(cells), np.zeros(cells)
    for c in range(cells):
        of_sample = [
            sum(0.5 * float(vectors[c, n, k]) ** 2 for k in range(probes)) / probes
            for n in range(samples)
        ]
        values[c] = sum(of_sample) / samples
        if samples > 1:
            variance = sum((x - values[c]) ** 2 for x in of_sample) / (samples - 1)
            errors[c] = (variance / samples) ** 0.5
    return values, errors


def slow_interactions(vectors: np.ndarray, shrunk: bool = True) -> np.ndarray:
    """Return G[i, j] = 1/2 mean u_i u_j, off-diagonals times max(0, 1 - stderr^2 / G^2)."""
    cells, samples, probes = vectors.shape
    found = np.zeros((cells, cells))
    for i in range(cells):
        for j in range(cells):
            of_sample = []
            for n in range(samples):
                products = [
                    0.5 * float(vectors[i, n, k]) * float(vectors[j, n, k]) for k in range(probes)
                ]
                of_sample.append(sum(products) / probes)
            mean = sum(of_sample) / samples
            keep = 1.0
            if shrunk and i != j:
                keep = 0.0
                if samples > 1 and mean:
                    variance = sum((x - mean) ** 2 for x in of_sample) / (samples - 1)
                    keep = max(0.0, 1 - variance / samples / mean**2)
            found[i, j] = mean * keep
    return found
