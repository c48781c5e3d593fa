"""The slow obvious computations that formats are compared with: lists of levels, one by one."""

from __future__ import annotations

import math

import numpy as np

from mpq.core.formats import Format

LevelOfCode = dict[int, float]  # exact: of few bits


def slow_float(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """Return what the bits of a minifloat say, all codes finite."""
    bias = 2 ** (exponent_bits - 1) - 1
    sign = -1 if code >> (exponent_bits + mantissa_bits) else 1
    field = (code >> mantissa_bits) % 2**exponent_bits
    fraction = (code % 2**mantissa_bits) / 2**mantissa_bits
    if field == 0:
        return sign * fraction * 2.0 ** (1 - bias)
    return sign * (1 + fraction) * 2.0 ** (field - bias)


def slow_levels(fmt: Format) -> LevelOfCode:
    """Return the level of each code that a format may make; of minus zero there is none."""
    b = fmt.bits
    match fmt.family:
        case "bipolar":
            return {
                c: float(sum((2 * (c >> i & 1) - 1) * 2**i for i in range(b))) for c in range(2**b)
            }
        case "fixed":
            return {c: float(c) for c in range(-(2 ** (b - 1)), 2 ** (b - 1))}
        case "uint":
            return {c: float(c) for c in range(2**b)}
        case "bfp":
            top = 2 ** (b - 1) - 1
            return {c: c / 2 ** (b - 2) for c in range(-top, top + 1)}
        case "mx" if fmt.variant == "int":
            return {c: c / 64 for c in range(-127, 128)}
    exponent_bits = b - 1 - fmt.mantissa
    levels = {c: slow_float(c, exponent_bits, fmt.mantissa) for c in range(2**b)}
    del levels[2 ** (b - 1)]
    if (b, fmt.mantissa) == (8, 3):  # E4M3FN: only the last code of each sign is NaN
        return {c: level for c, level in levels.items() if c not in (0x7F, 0xFF)}
    if (b, fmt.mantissa) == (8, 2):  # E5M2: the last exponent is infinity and NaN
        return {c: level for c, level in levels.items() if (c >> 2) % 32 != 31}
    return levels


def slow_nearest(value: float, fmt: Format, levels: LevelOfCode) -> float:
    """Return the nearest of all levels; of two the one with the even code.

    Bipolar numbers have no such rule and go up; a float without mantissa bits goes away from
    zero, as rounding to even multiples of a step has it.
    """
    distances = [(abs(level - value), code, level) for code, level in levels.items()]
    least = min(distances)[0]
    tied = [(code, level) for distance, code, level in distances if distance == least]
    if len(tied) == 1:
        return tied[0][1]
    if fmt.family == "bipolar":
        return max(level for _, level in tied)
    if fmt.family in ("float", "mx", "nvfp4") and fmt.variant != "int" and fmt.mantissa == 0:
        smallest = 2.0 ** (2 - 2 ** (fmt.bits - 2))
        if abs(value) < smallest:
            return 0.0
        return max((level for _, level in tied), key=abs)
    return next(level for code, level in tied if code % 2 == 0)


def slow_block_exponent(values: list[float]) -> int:
    """Return floor(log2 max|x|), of zeros the smallest exponent."""
    largest = max(abs(v) for v in values)
    return math.frexp(largest)[1] - 1 if largest else -126


def slow_e4m3(value: float) -> float:
    """Return the nearest positive OCP E4M3 number."""
    fmt = Format(family="float", bits=8, mantissa=3)
    levels = {c: level for c, level in slow_levels(fmt).items() if level > 0}
    return slow_nearest(value, fmt, levels)


def slow_block_scales(rows: np.ndarray, fmt: Format) -> list[np.float32]:
    """Return the scale of each block of a tensor in mx, nvfp4 or bfp."""
    if fmt.family == "nvfp4":
        shared = np.float32(np.abs(rows).max()) / np.float32(448 * 6)
        blocks = [np.float32(np.abs(row).max()) / np.float32(6) / shared for row in rows]
        return [np.float32(slow_e4m3(float(block))) * shared for block in blocks]
    top = 0
    if fmt.family == "mx" and fmt.variant != "int":
        largest = max(slow_levels(fmt).values())
        top = math.frexp(largest)[1] - 1
    return [np.float32(2.0 ** (slow_block_exponent(list(map(float, row))) - top)) for row in rows]


def slow_blocks(rows: np.ndarray, fmt: Format) -> np.ndarray:
    """Return rows, each a block, as they read back from mx, nvfp4 or bfp."""
    levels = slow_levels(fmt)
    back = np.zeros_like(rows)
    for n, scale in enumerate(slow_block_scales(rows, fmt)):
        for k, value in enumerate(rows[n]):
            nearest = slow_nearest(float(np.float32(value) / scale), fmt, levels)
            back[n, k] = np.float32(nearest) * scale
    return back


def slow_one_scale(values: np.ndarray, fmt: Format, largest: float) -> np.ndarray:
    """Return activations whose largest magnitude becomes the largest level."""
    levels = slow_levels(fmt)
    top = max(levels.values())
    scale = np.float32(largest) / np.float32(top)
    back = [slow_nearest(float(np.float32(v) / scale), fmt, levels) for v in values.ravel()]
    return np.array(back, np.float32).reshape(values.shape) * scale
