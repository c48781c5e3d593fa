"""HIGGS's score: how fast the output diverges with noise on a layer, times the noise of a scheme.

    score(l, c) = alpha_l t_l(c)^2,     t_l(c) = ||Q_c(W_l) - W_l||_F / ||W_l||_F
    D(W_l + t ||W_l||_F g / ||g||_F) ~ alpha_l t^2   for Gaussian g and small t

(Malinovskii et al. 2024, "Pushing the Limits of LLM Quantization via the Linearity Theorem"; our
reading, with the workload's output divergence D as the loss). Each alpha_l is fitted by least
squares through the origin to noise of three relative sizes t, `num_probes` draws of each, the
same for all samples. It does not depend on the schemes, and treats every error of a layer as if
its direction were random. Weights only.

Cost: at most 3 num_probes forward passes for each layer and batch, however many schemes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
import torch
from torch import nn

from mpq.core.layers import Layer
from mpq.core.protocols import Partial, Scores, Task
from mpq.core.tables import Cells, Floats, SensitivityTable
from mpq.nn.batches import Batch, position_mask
from mpq.nn.patch import reweighted
from mpq.nn.workload import Workload
from sensitivity.sweep import Variant, sweep
from sensitivity.tasks import batch_tasks, refuse_activations, refuse_apart
from sensitivity.weight_error import relative_error

_VERSION = 1
_SIZES = (0.05, 0.1, 0.2)  # of the noise, relative to the weight; int4 is near 0.1


class Higgs:
    """The metric `higgs`, for weights: one task for each calibration batch."""

    name = "higgs"

    def tasks(self, workload: Workload) -> Sequence[Task]:
        """Return one task per batch; its key holds model, data, cells, draws and seed.

        Raises InvalidInputError for schemes that quantize activations, and what is searched apart.
        """
        refuse_apart(self.name, workload)
        refuse_activations(self.name, workload)
        return batch_tasks(workload, self.name, _VERSION, _SIZES)

    def run(self, workload: Workload, task: Task) -> Partial:
        """Return divergences of (layers, draws, samples), and which layers are in which cells.

        "sizes" is t of each draw; "cell", "layer" and "squared" (t^2) list what adds up.
        """
        (number,) = task.part
        layers = [
            (unit, layer)
            for unit in range(len(workload.graph.units))
            for layer in workload.graph.stored_layers(workload.graph.units[unit])
        ]
        sizes = np.repeat(_SIZES, workload.num_probes)
        variants = [
            Variant(
                f"noise of {size:g} on layer {layer.name!r}",
                unit,
                partial(_noisy, workload, layer, size, (place, draw)),
            )
            for place, (unit, layer) in enumerate(layers)
            for draw, size in enumerate(sizes.tolist())
        ]

        def between(original: torch.Tensor, changed: torch.Tensor, batch: Batch) -> torch.Tensor:
            mask = position_mask(batch, original)
            return workload.divergence.between(original, changed, mask)

        found = sweep(workload, number, variants, {"divergence": between})["divergence"]
        terms = [
            (int(workload.cells.offsets[unit]) + i, place, relative_error(workload, layer, scheme))
            for place, (unit, layer) in enumerate(layers)
            for i, scheme in enumerate(workload.cells.schemes[unit])
        ]
        cell, of_layer, squared = (np.array(column) for column in zip(*terms, strict=True))
        return {
            "divergence": found.reshape(len(layers), len(sizes), found.shape[1]),
            "sizes": sizes,
            "cell": cell,
            "layer": of_layer,
            "squared": squared,
        }

    def combine(self, cells: Cells, partials: Sequence[Partial]) -> Scores:
        """Return the score of every cell.

        The error bar is that of alpha: over samples, and over draws by the residuals of the fit.
        """
        parts = [p["divergence"].astype(np.float64) for p in partials]
        first = partials[0]
        alpha, error = fit(np.concatenate(parts, axis=2), first["sizes"].astype(np.float64))
        cell, layer = first["cell"].astype(np.int64), first["layer"].astype(np.int64)
        squared = first["squared"].astype(np.float64)
        values, variance = np.zeros(len(cells)), np.zeros(len(cells))
        np.add.at(values, cell, alpha[layer] * squared)
        np.add.at(variance, cell, np.square(error[layer] * squared))
        table = SensitivityTable(
            metric=self.name, cells=cells, values=values, stderr=np.sqrt(variance)
        )
        return Scores(sensitivity=table)


def fit(divergence: Floats, sizes: Floats) -> tuple[Floats, Floats]:
    """Return alpha of D ~ alpha t^2 and its standard error for each layer.

    `divergence` is (layers, draws, samples), `sizes` t of each draw. alpha = sum t^2 D / sum t^4.
    Two variances add up: that of the mean of alpha over samples, and, because all samples see the
    same draws, sum (t^2 e)^2 / (sum t^4)^2 n / (n - 1) with the residuals e of the n draws, whose
    size may grow with t (White 1980).
    """
    squared = np.square(sizes)
    weights = squared / np.square(squared).sum()
    of_sample = np.einsum("ldn,d->ln", divergence, weights)
    alpha: Floats = of_sample.mean(axis=1)
    samples, draws = of_sample.shape[1], len(sizes)
    variance = of_sample.var(axis=1, ddof=1) / samples if samples > 1 else np.zeros(len(alpha))
    if draws > 1:
        residuals = divergence.mean(axis=2) - alpha[:, None] * squared
        variance = variance + np.square(residuals * weights).sum(axis=1) * draws / (draws - 1)
    return alpha, np.sqrt(variance)


def _noisy(
    workload: Workload, layer: Layer, size: float, stream: tuple[int, int]
) -> AbstractContextManager[nn.Module]:
    """Return the network with noise of relative size `size` on one weight."""
    place, draw = stream
    generator = torch.Generator().manual_seed(
        ((workload.seed * 1_000_003 + place) * 1_000_003 + draw) % 2**63
    )
    weight = workload.model.get_parameter(layer.weight_id).detach()
    wide = torch.promote_types(weight.dtype, torch.float32)
    noise = torch.randn(weight.shape, generator=generator, dtype=wide).to(weight.device)
    scale = size * weight.to(wide).norm() / noise.norm().clamp_min(1e-30)
    noisy = weight.to(wide) + scale * noise
    return reweighted(workload.model, {layer.weight_id: noisy.to(weight.dtype)})
