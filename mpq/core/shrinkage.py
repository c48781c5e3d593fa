"""Products of response vectors, shrunk by their own sampling error."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]

_ROUNDING = 1e-15  # of a product of two numbers of a long sum
_ROWS = 64  # at once


def shrunk_products(
    vectors: Singles, slopes: Singles | None, trust: float, *, single: bool
) -> tuple[Floats, float]:
    """Return what `Responses.bounded_interactions` says of vectors (cells, samples, probes)."""
    num_cells, samples, probes = vectors.shape
    unit = vectors.reshape(num_cells, samples * probes).astype(np.float64)
    norms = np.sqrt(np.einsum("ij,ij->i", unit, unit))
    unit /= np.where(norms > 0, norms, 1.0)[:, None]
    scale = norms * np.sqrt(0.5 / max(samples * probes, 1))
    if samples > 1 and trust:
        found = unit @ unit.T
        doubt = _ROUNDING * unit.shape[1]
        precision = np.float32 if single else np.float64
        doubt += _shrink(found, unit.reshape(vectors.shape).astype(precision), scale)
        found *= trust
    else:  # one sample carries no error estimate: stay additive
        found, doubt = np.zeros((num_cells, num_cells)), 0.0
    own = np.square(scale)
    if slopes is not None:  # x^2 = x for a one-hot x: linear terms lie on the diagonal
        own += slopes.mean(axis=1, dtype=np.float64)
    np.fill_diagonal(found, own)
    return found, trust * doubt


def _shrink(found: Floats, unit: npt.NDArray[np.floating], scale: Floats) -> float:
    """Multiply products of unit vectors by max(0, 1 - s^2/g^2) and by the scales of both.

    With a = sum_nk u_i u_j and b = sum_n (sum_k u_i u_j)^2 over N samples, s^2/g^2 = v/a^2 for
    v = (N b - a^2) / (N - 1). Returns what rounding adds to a product: an error d of v moves
    a - v/a by at most d/|a|, and by |a|.
    """
    num_cells, samples, probes = unit.shape
    # b = sum_nkl (u_ik u_il) (u_jk u_jl), where k, l and l, k are the same: one product as well
    first, second = np.triu_indices(probes)
    outer = np.empty((num_cells, len(first), samples), unit.dtype)
    for place, (one, other) in enumerate(zip(first, second, strict=True)):
        np.multiply(unit[:, :, one], unit[:, :, other], out=outer[:, place])
        outer[:, place] *= 1.0 if one == other else np.sqrt(2.0)
    outer = outer.reshape(num_cells, len(first) * samples)
    largest = float(np.einsum("ij,ij->i", outer, outer).max(initial=0.0))
    squares = outer @ outer.T
    precision = float(np.finfo(unit.dtype).eps)
    error = precision * (outer.shape[1] + 16) * largest * samples / (samples - 1)
    least = 1.0
    for begin in range(0, num_cells, _ROWS):  # few rows at once stay in the cache
        end = min(begin + _ROWS, num_cells)
        a = found[begin:end, :end]  # the rest is its mirror image
        square = np.square(a.astype(unit.dtype))
        v = squares[begin:end, :end]
        v *= samples / (samples - 1)
        v -= square / (samples - 1)
        kept = v <= square + error
        kept &= square > _ROUNDING**2 * 1e4
        least = min(least, float(np.where(kept, square, 1.0).min(initial=1.0)))
        np.maximum(square, 1e-30, out=square)
        np.maximum(v, 0.0, out=v)
        v /= square
        np.subtract(1.0, v, out=v)
        np.maximum(v, 0.0, out=v)
        a *= v
        a *= scale[begin:end, None]
        a *= scale[:end]
        found[:begin, begin:end] = a[:, :begin].T
    return float(error / max(np.sqrt(least), np.sqrt(error), 1e-300)) + 4 * precision
