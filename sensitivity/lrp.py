"""LRP importance: how much of the output's relevance arrives at each layer, and what it loses.

Relevance is traced back from the output (sensitivity.relevance) with the rules of AttnLRP
(Achtibat et al. 2024) in transformers and z^B, z+ and epsilon rules (Montavon et al. 2019) in
CNNs. With R_l(x) the relevance at the output of layer l, on its own branch,

    A_l(x) = sum |R_l(x)|,      c_l = E_x A_l(x) / sum_k E_x A_k(x)

is the layer's contribution, our reading of LRP-QViT (Ranjan & Savakis 2024). It is traced from the
logit of the largest class at each real position (kl), or from the inner product of the output
with itself (cosine, mse); positions of a sample are averaged.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mpq.core.errors import MpqWarning
from mpq.core.formats import Scheme
from mpq.core.layers import LayerGraph
from mpq.core.protocols import Partial, Scores, Task
from mpq.core.tables import Cells, Floats, SensitivityTable
from mpq.nn.batches import position_mask
from mpq.nn.patch import frozen
from mpq.nn.weights import layer_modules
from mpq.nn.workload import Workload
from sensitivity.calls import Calls, Part, parts
from sensitivity.changes import Change
from sensitivity.relevance.ledger import Ledger
from sensitivity.relevance.mode import relevance
from sensitivity.relevance.rules import CNN, TRANSFORMER, Composite
from sensitivity.tasks import batch_tasks, refuse_experts

_VERSION = 1  # part of every content key: raise it when results change
_TOLD_SHARE = 1e-3  # of the relevance: losses above it are told

_Array = npt.NDArray[np.float64]


class Lrp:
    """The metrics `lrp` and `lrp_importance`: one task for each calibration batch.

    `lrp`: sum_l c_l err_l(s) over the layers of a unit, with err_l(s) = |dY|^2 / |Y|^2 the
    relative error of the layer's output in scheme s on the original network's own input, weights
    and activations both. Relevance and error are multiplied for each sample, so the value is
    E_x sum_l A_l(x) err_l(s, x) / sum_k E_x A_k(x).

    `lrp_importance` (`error=False`), as in the paper: minimising c_u (most bits offered - bits),
    with bits those of weight elements plus those of activations where any choice quantizes them,
    maximises sum_u c_u bits_u. It does not ask how an error falls with bits.

    Both are ratios of means over samples; the error bar is their standard error over samples by
    the delta method (numerator and denominator vary together). Cost for each batch: one forward
    and one backward pass, and for `lrp` a replay of each layer for each scheme.
    """

    def __init__(self, *, error: bool = True, composite: Composite | None = None) -> None:
        self._error = error
        self._composite = composite  # None: by the kinds of layers
        self.name = "lrp" if error else "lrp_importance"

    def tasks(self, workload: Workload) -> Sequence[Task]:
        """Return one task per batch; its key holds model, data, cells, divergence and rules.

        Raises InvalidInputError where experts are searched.
        """
        refuse_experts(self.name, workload)
        rules = repr(self._rules(workload))
        return batch_tasks(workload, self.name, _VERSION, workload.divergence.kind, rules)

    def run(self, workload: Workload, task: Task) -> Partial:
        """Return, for each sample, what arrived at units and what it says of cells.

        "arrived" is A of (units, samples), "lost" its product with the error, (cells, samples);
        "operations" and "shares" name what has no rule, with its share of the relevance.
        """
        (number,) = task.part
        composite = self._rules(workload)
        with workload.evaluating(number), frozen(workload.model):
            found = [
                _arrived(workload, part, composite, self._error)
                for part in parts(workload, number, 1)
            ]
        leaks: defaultdict[str, float] = defaultdict(float)
        for one in found:
            for operation, amount in one.unexplained.items():
                leaks[operation] += amount
        total = sum(one.total for one in found) or 1.0
        return {
            "arrived": np.concatenate([one.arrived for one in found], axis=1),
            "lost": np.concatenate([one.lost for one in found], axis=1),
            "operations": np.array(list(leaks), dtype=np.str_),
            "shares": np.array([abs(amount) / total for amount in leaks.values()]),
        }

    def combine(self, cells: Cells, partials: Sequence[Partial]) -> Scores:
        """Return the table; warns of operations that lose or make relevance."""
        arrived = np.concatenate([p["arrived"] for p in partials], axis=1).astype(np.float64)
        if self._error:
            lost = np.concatenate([p["lost"] for p in partials], axis=1).astype(np.float64)
        else:
            spared = [np.max(bits) - bits for bits in map(_bits, cells.schemes)]
            counts = [len(schemes) for schemes in cells.schemes]
            lost = np.repeat(arrived, counts, axis=0) * np.concatenate(spared)[:, None]
        _warn(partials)
        values, stderr = ratios(lost, arrived.sum(axis=0))
        table = SensitivityTable(metric=self.name, cells=cells, values=values, stderr=stderr)
        return Scores(sensitivity=table)

    def _rules(self, workload: Workload) -> Composite:
        return composite_of(workload.graph) if self._composite is None else self._composite


def composite_of(graph: LayerGraph) -> Composite:
    """Return the rules for a network: those of CNNs where most layers are convolutions."""
    matrices = [layer.kind for layer in graph.layers if layer.kind != "embedding"]
    convolutions = sum(kind.startswith("conv") for kind in matrices)
    return CNN if 2 * convolutions > len(matrices) else TRANSFORMER


def ratios(numerators: Floats, denominator: Floats) -> tuple[Floats, Floats]:
    """Return mean(numerator) / mean(denominator) over samples, and its standard error.

    `numerators` is (rows, samples), `denominator` (samples,). The error is that of the mean of
    (numerator - ratio * denominator) / mean(denominator), the delta method; 0 for one sample.
    """
    samples = len(denominator)
    scale = denominator.mean()
    if scale == 0:
        return np.zeros(len(numerators)), np.zeros(len(numerators))
    ratio = numerators.mean(axis=1) / scale
    if samples == 1:
        return ratio, np.zeros(len(numerators))
    rest = numerators - ratio[:, None] * denominator
    return ratio, rest.std(axis=1, ddof=1) / (scale * math.sqrt(samples))


def start(workload: Workload, part: Part, head: torch.Tensor) -> torch.Tensor:
    """Return the messenger gradient at the head: head times it is the relevance to share."""
    seen = head.detach()
    if workload.divergence.kind == "kl":
        seed = torch.zeros_like(seen).scatter_(-1, seen.argmax(-1, keepdim=True), 1.0)
    else:
        seed = seen.clone()
    mask = position_mask(part.batch, head)
    real = torch.ones_like(seen[..., 0]) if mask is None else mask.to(seen)
    total = real.flatten(1).sum(1) if real.ndim > 1 else torch.ones_like(real)
    weights = real / total.clamp_min(1).reshape(-1, *(1,) * (real.ndim - 1))
    return seed * weights.unsqueeze(-1)


@dataclass(frozen=True, slots=True)
class _Found:
    """Of some samples: A by units, its product with the error by cells, and the leaks."""

    arrived: _Array
    lost: _Array
    unexplained: dict[str, float]
    total: float


def _arrived(workload: Workload, part: Part, composite: Composite, error: bool) -> _Found:
    with (
        Calls(workload) as calls,
        torch.enable_grad(),
        relevance(workload.model, composite) as ledger,
    ):
        output = workload.output(part.number, part.batch)
        head = workload.divergence.head(output)
    seed = start(workload, part, head)
    gradients = calls.gradients(head, iter([seed])) if head.requires_grad else {}
    units, cells = workload.graph.units, workload.cells
    arrived = np.zeros((len(units), part.samples))
    lost = np.zeros((len(cells) if error else 0, part.samples))
    modules, layers = layer_modules(workload.model, workload.graph), workload.graph.by_name
    with torch.no_grad():
        for number, unit in enumerate(units):
            rows = slice(int(cells.offsets[number]), int(cells.offsets[number + 1]))
            choices = cells.schemes[number]
            for name in unit.layers:
                change = Change(workload, layers[name], modules[name], choices) if error else None
                for (inputs, y), row in zip(calls.of(name), gradients.get(name, []), strict=False):
                    if row is None:  # the output does not depend on this call
                        continue
                    here = _per_sample((y.detach() * row[0]).abs(), part.samples)
                    arrived[number] += here
                    if change is not None:
                        lost[rows] += here * _errors(change, inputs, y, part, len(choices))
    return _Found(arrived, lost, *_leaks(ledger, head, seed))


def _errors(
    change: Change, inputs: torch.Tensor, output: torch.Tensor, part: Part, choices: int
) -> _Array:
    """Return |dY|^2 / |Y|^2 of (choices, samples), over real positions."""
    mask = position_mask(part.batch, output)
    real = None if mask is None else mask.to(output).unsqueeze(-1)

    def squared(values: torch.Tensor) -> _Array:
        seen = values if real is None else values * real
        return _per_sample(seen.square(), part.samples)

    found = np.zeros((choices, part.samples))
    size = np.maximum(squared(output.detach()), np.finfo(np.float64).tiny ** 0.5)
    for choice, difference in change.outputs(inputs):
        found[choice] = squared(difference) / size
    return found


def _leaks(
    ledger: Ledger, head: torch.Tensor, seed: torch.Tensor
) -> tuple[dict[str, float], float]:
    """Return what operations without a rule lost or made, and all relevance that started."""
    started = float((head.detach() * seed).abs().sum(dtype=torch.float64))
    return dict(ledger.unexplained), started


def _per_sample(values: torch.Tensor, samples: int) -> _Array:
    sums: _Array = values.reshape(samples, -1).sum(1, dtype=torch.float64).cpu().numpy()
    return sums


def _bits(schemes: Sequence[Scheme]) -> _Array:
    """Return the bits of each scheme's elements; activations count if any choice rounds them."""
    rounded = any(not scheme.activations.is_native for scheme in schemes)
    return np.array([s.weights.bits + (s.activations.bits if rounded else 0.0) for s in schemes])


def _warn(partials: Sequence[Partial]) -> None:
    """Warn of operations without a rule, with the mean share of relevance over batches."""
    shares: defaultdict[str, float] = defaultdict(float)
    for operation, share in _told(partials):
        shares[operation] += share / len(partials)
    told = [f"{name} ({share:.1%})" for name, share in shares.items() if share > _TOLD_SHARE]
    if told:
        warnings.warn(
            f"relevance is not conserved by operations without a rule: {', '.join(told)} of it "
            f"lost or made there; layers before them are scored by plain gradients: compare with "
            f"metric='gauss_newton'",
            MpqWarning,
            stacklevel=3,
        )


def _told(partials: Sequence[Partial]) -> Iterator[tuple[str, float]]:
    for partial in partials:
        for operation, share in zip(partial["operations"], partial["shares"], strict=True):
            yield str(operation), float(share)
