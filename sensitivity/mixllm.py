"""MixLLM's score: the change of the loss to second order, one output channel at a time.

    S_c = mean_x | s_c + s_c^2 / 2 |,     s_c(x) = < d loss(x) / d Y_c , Y'_c - Y_c >
    score(l) = sum_c S_c

(Zheng et al. 2024, eq. 4) over the output channels c of the layers of unit l, with Y' the output
in a scheme on the original network's own input; for weights s_c is the inner product of the
channel's weight gradient and change. The Hessian is replaced by the empirical Fisher matrix of
the channel, so its quadratic form is s_c^2. Gradients are those of the user's loss, sample by
sample, or without one random probes of the output divergence (sensitivity.local), over whose mean
the first-order term averages out. Calls of one weight add up before the square. The channels of
an embedding are its tokens. Weights and activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mpq.core.formats import Scheme
from mpq.core.layers import LayerName
from mpq.core.protocols import Partial, Scores, Task
from mpq.core.tables import Cells, Floats
from mpq.nn.batches import num_samples
from mpq.nn.fingerprint import function_digest
from mpq.nn.workload import Workload
from sensitivity.local import LocalCall, LocalPart, local, local_scores
from sensitivity.tasks import batch_tasks, mean_over_samples, refuse_experts

_VERSION = 1


class MixLlm:
    """The metric `mixllm`: one task for each calibration batch."""

    name = "mixllm"

    def tasks(self, workload: Workload) -> Sequence[Task]:
        """Return one task per batch; its key holds model, data, cells, loss, probes and seed.

        Raises InvalidInputError where experts are searched.
        """
        refuse_experts(self.name, workload)
        return batch_tasks(workload, self.name, _VERSION, function_digest(workload.loss))

    def run(self, workload: Workload, task: Task) -> Partial:
        """Return "scores" of (cells, samples)."""
        (number,) = task.part
        return {"scores": local_scores(workload, number, _all_channels)}

    def combine(self, cells: Cells, partials: Sequence[Partial]) -> Scores:
        """Return the mean score of every cell; the error bar is over samples, probes included."""
        return Scores(sensitivity=mean_over_samples(self.name, cells, partials))


def channel_scores(workload: Workload) -> Mapping[tuple[LayerName, Scheme], Floats]:
    """Return S_c of every output channel of every layer, to rank channels of all layers together.

    Arrays are (channels,), means over all calibration samples. Tied layers are under the first of
    them; a layer that never reaches the output, or a scheme that changes nothing, is left out.
    """
    refuse_experts("mixllm", workload)
    totals: dict[tuple[LayerName, Scheme], Floats] = {}
    samples = sum(num_samples(batch) for batch in workload.calibration)

    def add(part: LocalPart) -> None:
        for calls, schemes in zip(part.units(), workload.cells.schemes, strict=True):
            for (layer, choice), terms in _channels(calls, part.samples).items():
                mean = terms.sum(0).double().cpu().numpy() / samples
                key = (layer, schemes[choice])
                totals[key] = totals.get(key, np.zeros(len(mean))) + mean

    for number in range(len(workload.calibration)):
        local(workload, number, add)
    return totals


def _all_channels(calls: Sequence[LocalCall], choices: int, samples: int) -> torch.Tensor:
    found = torch.zeros(choices, samples, dtype=torch.float64)
    for (_, choice), terms in _channels(calls, samples).items():
        found[choice] += terms.sum(1).cpu()
    return found


def _channels(
    calls: Sequence[LocalCall], samples: int
) -> Mapping[tuple[LayerName, int], torch.Tensor]:
    """Return |s + s^2 / 2|, averaged over gradients, of (samples, channels) for each weight."""
    first: dict[str, LayerName] = {}
    sums: dict[tuple[LayerName, int], torch.Tensor] = {}
    for call in calls:
        layer = first.setdefault(call.layer.weight_id, call.layer.name)
        for choice, gradient, change in call.terms():
            inner = _by_channel(call, gradient * change, samples)
            key = (layer, choice)
            sums[key] = sums[key] + inner if key in sums else inner
    return {key: (s + s.square() / 2).abs().mean(0) for key, s in sums.items()}


def _by_channel(call: LocalCall, products: torch.Tensor, samples: int) -> torch.Tensor:
    """Return products (rows, samples, ...) summed over positions: (rows, samples, channels)."""
    if call.layer.kind == "embedding":
        tokens = call.inputs.reshape(1, samples, -1).expand(len(products), -1, -1)
        at_token = products.sum(-1).reshape(len(products), samples, -1)
        shape = (len(products), samples, call.layer.weight_shape[0])
        return products.new_zeros(shape).scatter_add_(2, tokens, at_token)
    if call.layer.convolution is not None:
        products = products.movedim(-1 - len(call.layer.convolution.kernel), -1)
    return products.reshape(len(products), samples, -1, products.shape[-1]).sum(2)
