"""Binary weights but for a share of salient ones in 8 bits (PB-LLM, Shang et al., ICLR 2024).

Exactly the share of the tensor's weights with the largest salience are salient, of equal ones the
first; they are symmetric int8 with a scale max|w| / 127 over the salient ones of each row. Others
are a sign(w), a = mean|w| over the others of the row. A mask, a bit a weight, says which are which.

Salience is |w|, or where the layer's inputs are known w^2 / u_q^2, with u the diagonal of the upper
Cholesky factor of H^-1, H = X^T X and 1 % of its mean diagonal added on it: what GPTQ loses by
rounding the weight at input q, inputs before q being rounded already. No clipping is applied.
"""

from __future__ import annotations

import torch

from mpq.core.format_parts import count_of
from mpq.core.formats import Format
from mpq.core.granularity import ChannelAxis
from mpq.nn.quantizers.bit_streams import from_stream, to_stream
from mpq.nn.quantizers.family import Factor
from mpq.nn.quantizers.grid import as_half
from mpq.nn.quantizers.largest import mask_of_largest
from mpq.nn.quantizers.rows import channels_of, from_rows, rows_of
from mpq.nn.quantizers.stored import LayerData, StoredWeight

_TOP = 127
_DAMPING = 0.01
_MASK, _SALIENT_SCALES = "mask", "salient_scales"


class PartialBinary:
    """The family of binary weights with salient ones; codes are 0, 1, or of salient ones int8."""

    def store(
        self,
        weight: torch.Tensor,
        fmt: Format,
        channel_axis: ChannelAxis = 0,
        factor: Factor = 1.0,
        data: LayerData | None = None,
    ) -> StoredWeight:
        """Return signs, int8 codes of salient weights and their mask; `factor` is not used."""
        shape = tuple(weight.shape)
        fmt.num_scales(shape, channel_axis)  # refuses groups that do not divide
        here = weight.detach().float().cpu()
        matrix = channels_of(here, channel_axis)
        salience = matrix.abs()
        if data is not None and data.gram is not None:
            salience = salience / _inverse_diagonal(data.gram)
        rows = rows_of(here, fmt.granularity, channel_axis)
        mask = mask_of_largest(salience, count_of(fmt.share, matrix.numel())).reshape(rows.shape)
        size = rows.abs()
        others = (~mask).sum(1, keepdim=True).clamp_min(1)
        scales = as_half(size.masked_fill(mask, 0.0).sum(1, keepdim=True) / others)
        salient_scales = as_half(size.masked_fill_(~mask, 0.0).amax(1, keepdim=True) / _TOP)
        high = (rows / salient_scales).round_().clamp_(-_TOP - 1, _TOP)
        codes = torch.where(mask, high, (rows >= 0).float()).to(torch.int16)
        extra = {_MASK: mask, _SALIENT_SCALES: salient_scales}
        return StoredWeight(codes, scales, None, fmt, shape, channel_axis, extra)

    def fake_quantize(
        self, weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis, factor: Factor = 1.0
    ) -> torch.Tensor:
        """Return the weight as it reads back, float32."""
        return self.dequantize(self.store(weight, fmt, channel_axis)).to(weight.device)

    def dequantize(self, stored: StoredWeight) -> torch.Tensor:
        """Return the float32 weight that codes stand for."""
        codes = stored.codes.float()
        low = (2 * codes - 1) * stored.scales
        rows = torch.where(stored.extra[_MASK], codes * stored.extra[_SALIENT_SCALES], low)
        return from_rows(rows, stored.shape, stored.channel_axis)

    def pack(self, stored: StoredWeight) -> dict[str, torch.Tensor]:
        """Return signs, mask, salient codes and both scales, in the order of the rows."""
        mask = stored.extra[_MASK]
        arrays = {
            "codes": to_stream(stored.codes[~mask], 1),
            "scales": stored.scales.reshape(-1).half(),
            _MASK: to_stream(mask, 1),
            _SALIENT_SCALES: stored.extra[_SALIENT_SCALES].reshape(-1).half(),
        }
        if mask.any():
            arrays["salient"] = stored.codes[mask].to(torch.int8)
        return arrays

    def unpack(
        self,
        arrays: dict[str, torch.Tensor],
        fmt: Format,
        shape: tuple[int, ...],
        channel_axis: ChannelAxis = 0,
    ) -> StoredWeight:
        """Return the stored weight of the arrays of a file; inverse of `pack`."""
        scales = arrays["scales"].float().reshape(-1, 1)
        count = torch.Size(shape).numel()
        mask = from_stream(arrays[_MASK], 1, count).bool().reshape(len(scales), -1)
        codes = torch.empty(mask.shape, dtype=torch.int16)
        codes[~mask] = from_stream(arrays["codes"], 1, count - int(mask.sum()))
        if "salient" in arrays:
            codes[mask] = arrays["salient"].to(torch.int16)
        extra = {_MASK: mask, _SALIENT_SCALES: arrays[_SALIENT_SCALES].float().reshape(-1, 1)}
        return StoredWeight(codes, scales, None, fmt, shape, channel_axis, extra)


def _inverse_diagonal(gram: torch.Tensor) -> torch.Tensor:
    """Return the diagonal of the upper Cholesky factor of the damped gram's inverse, (inputs,)."""
    wide = gram.cpu().double()
    damping = (_DAMPING * wide.diagonal().mean()).clamp_min(1e-12)
    wide = wide + damping * torch.eye(len(wide), dtype=wide.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
    upper: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper.diagonal().float()


PARTIAL_BINARY = PartialBinary()
