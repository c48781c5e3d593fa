"""Scales that are quantized themselves ("double quantization", QLoRA, Dettmers et al., 2023).

The mean of all scales of the tensor is taken away; what is left is symmetric int8 in blocks of 256
with a float32 second scale each: s ~ mean + c t, c in [-127, 127], t = max|s - mean| / 127. Our
reading: bitsandbytes has a floating 8-bit codebook for c. A scale that would be read back below
the smallest number of IEEE half is read as that.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mpq.core.format_parts import SCALES_BLOCK
from mpq.core.formats import Format
from mpq.nn.quantizers.grid import LARGEST_SCALE, SMALLEST_SCALE, Scales
from mpq.nn.quantizers.stored import StoredWeight

_TOP = 127
_SMALLEST_STEP = 1e-30  # scales that are all equal need some second scale


class DoubleScales:
    """Scales of a grid that are stored in 8 bits each."""

    def scales(self, wanted: torch.Tensor) -> Scales:
        """Return scales (rows, 1) as they will be read, and the arrays that they are read from."""
        flat = wanted.reshape(-1).clamp(SMALLEST_SCALE, LARGEST_SCALE)
        offset = flat.double().mean().float().reshape(1)
        off = F.pad(flat - offset, (0, -len(flat) % SCALES_BLOCK)).reshape(-1, SCALES_BLOCK)
        second = (off.abs().amax(1) / _TOP).clamp_min(_SMALLEST_STEP)
        codes = (off / second[:, None]).round().clamp(-_TOP, _TOP).to(torch.int8)
        arrays = {
            "scales": codes.reshape(-1)[: len(flat)].contiguous(),
            "second_scales": second,
            "offset": offset,
        }
        return Scales(_read(arrays), None, arrays)

    def pack_scales(self, stored: StoredWeight) -> dict[str, torch.Tensor]:
        """Return the codes of scales (int8), second scales and the offset (float32)."""
        return {name: stored.extra[name] for name in ("scales", "second_scales", "offset")}

    def unpack_scales(self, arrays: dict[str, torch.Tensor], fmt: Format) -> Scales:
        """Return the scales."""
        own = {name: arrays[name] for name in ("scales", "second_scales", "offset")}
        return Scales(_read(own), None, own)


def _read(arrays: dict[str, torch.Tensor]) -> torch.Tensor:
    codes = arrays["scales"].float()
    second = arrays["second_scales"].repeat_interleave(SCALES_BLOCK)[: len(codes)]
    return (codes * second + arrays["offset"]).clamp_min(SMALLEST_SCALE).reshape(-1, 1)
