"""A codebook for each output channel by weighted k-means (SqueezeLLM, Kim et al., ICML 2024).

sum_i F_i (w_i - c(w_i))^2 is minimised over 2^bits centroids of each output channel; F is the
Fisher information of each weight where it is known, else 1. Lloyd's turns start once from weighted
quantiles (those of (k + 1/2) / 2^bits), once from numbers evenly spaced over the range, and end
when no weight moves, after 50 at most; no turn raises the error, and the better result is kept.
Centroids are rounded to IEEE half, then each weight takes the nearest, of two the lower one.

A share of the tensor's weights, those with the largest F w^2 (without Fisher information: the
largest |w|; of equal ones the first), takes no part in that and stays in IEEE half, as rows of
compressed sparse columns. Their codes are stored, too, as zeros. No clipping is applied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpq.core.format_parts import count_of, index_bits
from mpq.core.formats import Format
from mpq.core.granularity import ChannelAxis, matrix_of
from mpq.nn.quantizers.bit_streams import (
    from_index_stream,
    from_stream,
    to_index_stream,
    to_stream,
)
from mpq.nn.quantizers.family import Factor
from mpq.nn.quantizers.grid import LARGEST_SCALE
from mpq.nn.quantizers.largest import mask_of_largest
from mpq.nn.quantizers.rows import channels_of, from_rows
from mpq.nn.quantizers.sorted_rows import SortedRows, middles
from mpq.nn.quantizers.stored import LayerData, StoredWeight

_TURNS = 50
_BLOCK = 2**20  # weights whose codebooks are made at once
_SPARSE = ("outliers", "columns", "row_ends")


@dataclass(frozen=True, slots=True)
class KMeans:
    """The family of codebooks of output channels."""

    turns: int = _TURNS

    def store(
        self,
        weight: torch.Tensor,
        fmt: Format,
        channel_axis: ChannelAxis = 0,
        factor: Factor = 1.0,
        data: LayerData | None = None,
    ) -> StoredWeight:
        """Return codes (channels, weights) with codebooks and outliers in `extra`.

        There are no scales: those of the stored weight are ones. `factor` is not used.
        """
        shape = tuple(weight.shape)
        rows = channels_of(weight.detach().float().cpu(), channel_axis)
        fisher = None
        if data is not None and data.fisher is not None:
            fisher = channels_of(data.fisher.float().cpu(), channel_axis)
        extra, outlying = {}, None
        if fmt.share:
            size = rows.abs() if fisher is None else rows.abs() * fisher.sqrt()
            outlying = mask_of_largest(size, count_of(fmt.share, rows.numel()))
            extra = _sparse(rows, outlying)
        height = max(1, _BLOCK // max(1, rows.shape[1]))
        made = [
            self._codebooks(rows[own], _counted(rows, fisher, outlying, own), fmt.bits)
            for own in (slice(first, first + height) for first in range(0, len(rows), height))
        ]
        codes, extra["codebooks"] = (torch.cat(parts) for parts in zip(*made, strict=True))
        if outlying is not None:
            codes[outlying] = 0
        scales = torch.ones(len(rows), 1)
        return StoredWeight(codes, scales, None, fmt, shape, channel_axis, extra)

    def _codebooks(
        self, rows: torch.Tensor, weights: torch.Tensor | None, bits: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        centroids = self.centroids(rows, weights, 2**bits).clamp(-LARGEST_SCALE, LARGEST_SCALE)
        books = centroids.half()
        places = torch.searchsorted(middles(books.double()), rows.contiguous())
        return places.to(torch.int16), books

    def centroids(
        self, rows: torch.Tensor, weights: torch.Tensor | None, count: int
    ) -> torch.Tensor:
        """Return ascending centroids (rows, count), float64: of both starts the better ones."""
        in_order = SortedRows(rows, weights)
        fits = [self._lloyd(in_order, start) for start in _starts(in_order, count)]
        (first, its_error), (second, error) = fits
        return torch.where((error < its_error)[:, None], second, first)

    def _lloyd(
        self, rows: SortedRows, centroids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return centroids and their error, less what no centroids change."""
        before = torch.empty(0, dtype=torch.int64)
        for turn in range(self.turns + 1):
            weight, moment, ends = rows.segments(middles(centroids))
            if turn == self.turns or torch.equal(ends, before):
                break
            before = ends
            centroids = torch.where(weight > 0, moment / weight, centroids)
        return centroids, (weight * centroids.square() - 2 * moment * centroids).sum(1)

    def fake_quantize(
        self, weight: torch.Tensor, fmt: Format, channel_axis: ChannelAxis, factor: Factor = 1.0
    ) -> torch.Tensor:
        """Return the weight as it reads back, float32."""
        return self.dequantize(self.store(weight, fmt, channel_axis)).to(weight.device)

    def dequantize(self, stored: StoredWeight) -> torch.Tensor:
        """Return the centroid of each code, and outliers in their places."""
        rows = stored.extra["codebooks"].float().gather(1, stored.codes.long())
        if stored.fmt.share:
            values, columns, ends = (stored.extra[name] for name in _SPARSE)
            counts = ends.long().diff(prepend=ends.new_zeros(1))
            channels = torch.arange(len(rows)).repeat_interleave(counts)
            rows[channels, columns] = values.float()
        return from_rows(rows, stored.shape, stored.channel_axis)

    def pack(self, stored: StoredWeight) -> dict[str, torch.Tensor]:
        """Return codes and codebooks, and values, columns and row ends of outliers."""
        arrays = {
            "codes": to_stream(stored.codes, stored.fmt.bits),
            "codebooks": stored.extra["codebooks"].reshape(-1),
        }
        if stored.fmt.share:
            arrays["row_ends"] = stored.extra["row_ends"]
            if len(columns := stored.extra["columns"]):
                width = index_bits(matrix_of(stored.shape, stored.channel_axis)[1])
                arrays["outliers"] = stored.extra["outliers"]
                arrays["columns"] = to_index_stream(columns, width)
        return arrays

    def unpack(
        self,
        arrays: dict[str, torch.Tensor],
        fmt: Format,
        shape: tuple[int, ...],
        channel_axis: ChannelAxis = 0,
    ) -> StoredWeight:
        """Return the stored weight of the arrays of a file; inverse of `pack`."""
        channels, width = matrix_of(shape, channel_axis)
        extra = {"codebooks": arrays["codebooks"].reshape(channels, 2**fmt.bits)}
        if fmt.share:
            extra["row_ends"] = arrays["row_ends"]
            extra["outliers"] = arrays.get("outliers", torch.empty(0, dtype=torch.float16))
            extra["columns"] = torch.empty(0, dtype=torch.int64)
            if count := len(extra["outliers"]):
                extra["columns"] = from_index_stream(arrays["columns"], index_bits(width), count)
        codes = from_stream(arrays["codes"], fmt.bits, channels * width).reshape(channels, width)
        scales = torch.ones(channels, 1)
        return StoredWeight(codes, scales, None, fmt, shape, channel_axis, extra)


def _counted(
    rows: torch.Tensor, fisher: torch.Tensor | None, outlying: torch.Tensor | None, own: slice
) -> torch.Tensor | None:
    """Return by how much each weight counts; all alike in a channel where none would."""
    if fisher is None and outlying is None:
        return None
    weights = torch.ones_like(rows[own]) if fisher is None else fisher[own]
    if outlying is not None:
        weights = weights.masked_fill(outlying[own], 0.0)
    return weights.masked_fill(weights.sum(1, keepdim=True) == 0, 1.0)


def _sparse(rows: torch.Tensor, outlying: torch.Tensor) -> dict[str, torch.Tensor]:
    values = rows[outlying].clamp(-LARGEST_SCALE, LARGEST_SCALE).half()
    ends = outlying.sum(1).cumsum(0).to(torch.int32)
    return dict(zip(_SPARSE, (values, outlying.nonzero()[:, 1], ends), strict=True))


def _starts(rows: SortedRows, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weighted quantiles, and evenly spaced numbers between the ends of what counts."""
    parts = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    reached = rows.weight[:, 1:].contiguous()
    total = reached[:, -1:].contiguous()
    last = rows.values.shape[1] - 1
    quantiles = torch.searchsorted(reached, parts * total).clamp_max_(last)
    low = torch.searchsorted(reached, torch.zeros_like(total), right=True).clamp_max_(last)
    high = torch.searchsorted(reached, total)
    least, most = (rows.values.gather(1, place).double() for place in (low, high))
    return rows.values.gather(1, quantiles).double(), least + (most - least) * parts


KMEANS = KMeans()
