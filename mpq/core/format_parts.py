"""What a stored tensor consists of, to the bit: codes, scales, masks, codebooks, branches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mpq.core.errors import InvalidInputError
from mpq.core.granularity import ChannelAxis, PerGroup, matrix_of, num_scales

if TYPE_CHECKING:
    from mpq.core.formats import Format

SCALES_BLOCK = 256  # double-quantized scales that share a second scale
_HALF, _SINGLE, _BYTE = 16, 32, 8
_TRITS_PER_BYTE = 5  # 3^5 = 243 of 256

Parts = dict[str, int]  # bits of each stored array; each array is padded to whole bytes


def stored_parts(fmt: Format, shape: tuple[int, ...], channel_axis: ChannelAxis = 0) -> Parts:
    """Return the bits of every array that a weight of `shape` is stored as, by name.

    Raises InvalidInputError where groups do not divide a channel's weights (`group_size`) or a
    branch has a higher rank than the weight (`rank`).
    """
    if fmt.is_native:
        return {"values": math.prod(shape) * fmt.bits}
    channels, columns = matrix_of(shape, channel_axis)
    if fmt.high is not None:
        return _mixed(fmt, channels, columns)
    parts = _parts(fmt, shape, channel_axis)
    if fmt.rank:
        if fmt.rank > min(channels, columns):
            raise InvalidInputError(
                "rank",
                f"{fmt.text('weights')}: a weight of shape {list(shape)} has rank "
                f"{min(channels, columns)} at most",
            )
        parts |= {
            "left": channels * fmt.rank * _HALF,
            "right": fmt.rank * columns * _HALF,
        }
    return parts


def count_of(share: float, total: int) -> int:
    """Return how many of `total` a share in percent is."""
    return math.floor(total * share / 100 + 1e-9)


def _parts(fmt: Format, shape: tuple[int, ...], channel_axis: ChannelAxis) -> Parts:
    elements, scales = math.prod(shape), num_scales(fmt.granularity, shape, channel_axis)
    channels, columns = matrix_of(shape, channel_axis)
    parts = {"codes": elements * fmt.bits}
    if fmt.scale_bits:
        parts["scales"] = scales * fmt.scale_bits
    match fmt.family:
        case "int" if not fmt.symmetric:
            parts["zero_points"] = scales * fmt.bits
        case "nvfp4":
            parts["tensor_scale"] = _SINGLE
        case "bfp" if fmt.variant == "reordered":
            parts["order"] = columns * index_bits(columns)
        case "nf" | "bnb" if fmt.variant == "double":
            parts["scales"] = scales * _BYTE
            parts["second_scales"] = -(-scales // SCALES_BLOCK) * _SINGLE
            parts["offset"] = _SINGLE
        case "ternary":
            parts["codes"] = -(-elements // _TRITS_PER_BYTE) * _BYTE
        case "binary" if fmt.variant in ("residual", "dual"):
            parts["scales"] = scales * fmt.bits * fmt.scale_bits
        case "binary" if fmt.variant == "partial":
            salient = count_of(fmt.share, elements)
            parts |= {
                "codes": elements - salient,
                "mask": elements,
                "salient": salient * _BYTE,
                "salient_scales": scales * fmt.scale_bits,
            }
        case "kmeans":
            parts = {"codes": elements * fmt.bits, "codebooks": channels * 2**fmt.bits * _HALF}
            outliers = count_of(fmt.share, elements)
            if fmt.share:
                parts |= {
                    "outliers": outliers * _HALF,
                    "columns": outliers * index_bits(columns),
                    "row_ends": channels * _SINGLE,
                }
    return {name: bits for name, bits in parts.items() if bits or name in ("codes", "scales")}


def _mixed(fmt: Format, channels: int, columns: int) -> Parts:
    """Return the parts of the low and the high share, and the mask of the high one."""
    assert fmt.high is not None
    low = fmt.low
    if fmt.variant == "groups":
        assert isinstance(fmt.granularity, PerGroup)
        size = fmt.granularity.size
        groups = num_scales(fmt.granularity, (channels, columns))
        high = count_of(fmt.share, groups)
        sizes = {"low": (low, groups - high, size), "high": (fmt.high, high, size)}
        mask = groups
    else:
        high = count_of(fmt.share, channels)
        sizes = {"low": (low, channels - high, columns), "high": (fmt.high, high, columns)}
        mask = channels
    parts = {
        f"{which}.{name}": bits
        for which, (part, rows, width) in sizes.items()
        if rows
        for name, bits in stored_parts(part, (rows, width)).items()
    }
    return {"mask": mask, **parts}


def index_bits(count: int) -> int:
    """Return the bits of an index below `count`."""
    return max(1, (count - 1).bit_length())
