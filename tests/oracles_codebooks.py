"""Slow, obvious computations of codebooks, binary and ternary weights, k-means and logarithms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np


def half(number: float) -> float:
    """Return a positive number as IEEE half keeps it, never zero."""
    return float(np.float16(min(max(number, 2.0**-24), 65504.0)))


def slow_nearest(number: float, levels: Sequence[float], *, symmetric: bool) -> float:
    """Return the nearest level; in the middle the lower one, or the one of less magnitude."""
    least = min(abs(number - level) for level in levels)
    equal = [level for level in levels if abs(number - level) == least]
    return min(equal, key=abs) if symmetric else min(equal)


def slow_codebook(
    row: Sequence[float], levels: Sequence[float], scale: float, *, symmetric: bool
) -> list[float]:
    """Return a row as it reads back with a scale."""
    narrow = np.float32(scale)
    scaled = [float(np.float32(w) / narrow) for w in row]
    near = [slow_nearest(x, levels, symmetric=symmetric) for x in scaled]
    return [float(np.float32(n) * narrow) for n in near]


def slow_double_scales(scales: Sequence[float], block: int) -> list[float]:
    """Return scales as they read back from 8 bits, a second scale a block, and the mean."""
    mean = np.float32(sum(scales) / len(scales))
    read = []
    for first in range(0, len(scales), block):
        off = [np.float32(s) - mean for s in scales[first : first + block]]
        second = max(np.float32(max(abs(o) for o in off)) / np.float32(127), np.float32(1e-30))
        for o in off:
            code = np.float32(min(max(round(float(o / second)), -127), 127))
            read.append(max(float(code * second + mean), 2.0**-24))
    return read


def slow_ternary(row: Sequence[float], *, median: bool) -> list[float]:
    """Return a row rounded to -s, 0, s."""
    sizes = sorted(abs(w) for w in row)
    s = half(sizes[(len(sizes) - 1) // 2] if median else sum(sizes) / len(sizes))
    return [s * min(max(round(float(np.float32(w) / np.float32(s))), -1), 1) for w in row]


def slow_residual(row: Sequence[float], planes: int) -> tuple[list[float], list[float]]:
    """Return a row as planes of signs read back, and the scales of the planes."""
    rest = [np.float32(w) for w in row]
    back, scales = [np.float32(0) for _ in row], []
    for _ in range(planes):
        scale = np.float32(np.float16(sum(abs(float(r)) for r in rest) / len(rest)))
        for i, r in enumerate(rest):
            part = scale if r >= 0 else -scale
            back[i], rest[i] = back[i] + part, r - part
        scales.append(float(scale))
    return [float(b) for b in back], scales


def least_dual_error(row: Sequence[float]) -> float:
    """Return the least squared error of two planes of bits over all assignments of a tiny row."""
    w = np.array(row, dtype=np.float64)
    least = math.inf
    for codes in itertools.product(range(4), repeat=len(row)):
        planes = np.array([[c & 1, c >> 1] for c in codes], dtype=np.float64)
        scales = np.linalg.lstsq(planes, w, rcond=None)[0]
        least = min(least, float(((planes @ scales - w) ** 2).sum()))
    return least


def slow_starts(
    row: Sequence[float], weights: Sequence[float], count: int
) -> tuple[list[float], list[float]]:
    """Return the weighted quantiles of a row, and numbers evenly spaced over what counts in it."""
    order = sorted(range(len(row)), key=lambda i: row[i])
    quantiles = []
    for k in range(count):
        reached = 0.0
        for i in order:
            reached += weights[i]
            if reached >= (k + 0.5) / count * sum(weights):
                break
        quantiles.append(row[i])
    counted = [w for w, f in zip(row, weights, strict=True) if f > 0]
    low, high = min(counted), max(counted)
    return quantiles, [low + (high - low) * (k + 0.5) / count for k in range(count)]


def slow_lloyd(
    row: Sequence[float], weights: Sequence[float], start: Sequence[float], turns: int
) -> list[list[float]]:
    """Return ascending centroids after each turn of weighted k-means, those of the start first."""
    history = [list(start)]
    for _ in range(turns):
        old = history[-1]
        middles = [(a + b) / 2 for a, b in itertools.pairwise(old)]
        near = [sum(w > middle for middle in middles) for w in row]
        new = list(old)
        for k in range(len(old)):
            own = [i for i in range(len(row)) if near[i] == k]
            if (mass := sum(weights[i] for i in own)) > 0:
                new[k] = sum(weights[i] * row[i] for i in own) / mass
        history.append(new)
        if new == old:
            break
    return history


def weighted_error(
    row: Sequence[float], weights: Sequence[float], centroids: Sequence[float]
) -> float:
    """Return sum F (w - nearest centroid)^2."""
    return sum(f * min((w - c) ** 2 for c in centroids) for w, f in zip(row, weights, strict=True))


def least_kmeans_error(row: Sequence[float], weights: Sequence[float], count: int) -> float:
    """Return the least error over all partitions of a sorted row into `count` runs."""
    order = sorted(range(len(row)), key=lambda i: row[i])
    least = math.inf
    for cuts in itertools.combinations(range(1, len(row)), min(count, len(row)) - 1):
        edges = [0, *cuts, len(row)]
        error = 0.0
        for first, last in itertools.pairwise(edges):
            own = order[first:last]
            mass = sum(weights[i] for i in own)
            mean = sum(weights[i] * row[i] for i in own) / mass
            error += sum(weights[i] * (row[i] - mean) ** 2 for i in own)
        least = min(least, error)
    return least


def slow_largest(numbers: Sequence[float], count: int) -> list[bool]:
    """Return which numbers are the largest, of equal ones the first."""
    order = sorted(range(len(numbers)), key=lambda i: (-numbers[i], i))
    return [i in order[:count] for i in range(len(numbers))]


def slow_salience(matrix: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Return w^2 over what is left of H^-1 at each input when those before it are taken out."""
    hessian = gram.astype(np.float64) + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    left = [np.linalg.inv(hessian[q:, q:])[0, 0] for q in range(len(hessian))]
    return matrix.astype(np.float64) ** 2 / np.array(left)


def slow_log(value: float, largest: float, bits: int, *, root: bool) -> tuple[float, float]:
    """Return a value rounded on a logarithmic scale, and its exponent before rounding."""
    if value <= 0:
        return 0.0, math.inf
    exponent = -(2 if root else 1) * math.log2(min(value / largest, 1.0))
    q = round(exponent)
    if q >= 2**bits - 1:
        return 0.0, exponent
    if root:
        return largest * 2.0 ** -math.ceil(q / 2) * (math.sqrt(2) if q % 2 else 1.0), exponent
    return largest * 2.0**-q, exponent
