"""How metrics cut their work: a task for each calibration batch, or one for each unit.

A metric may be asked to stop after any round of its tasks (see `Task.round`): batches come in
rounds of 1, 1, 2, 4, 8, ... so that looking after each round costs little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mpq.core.errors import InvalidInputError
from mpq.core.protocols import Partial, Task
from mpq.core.tables import Cells, SensitivityTable
from mpq.nn.batches import num_samples
from mpq.nn.fingerprint import digest
from mpq.nn.workload import Workload


def batch_tasks(workload: Workload, *setting: object) -> list[Task]:
    """Return a task per calibration batch, `part` is its number.

    The key holds `setting` (the metric's name, version and own parameters), model, cells, seed,
    the batch and how many samples come before it, which choose its random signs.
    """
    cells = [(unit, str(scheme)) for unit, scheme in workload.cells]
    of_all = (setting, workload.key, cells, workload.num_probes, workload.seed)
    counts = [num_samples(batch) for batch in workload.calibration]
    firsts = np.cumsum([0, *counts])[:-1]
    return [
        Task(
            digest(of_all, key, int(first)),
            (number,),
            round=number.bit_length(),
            label=f"calibration batch {number}",
            samples=counts[number],
        )
        for number, (key, first) in enumerate(zip(workload.batch_keys, firsts, strict=True))
    ]


def unit_tasks(workload: Workload, *setting: object) -> list[Task]:
    """Return a task per unit, `part` is its number; the key holds all calibration batches.

    Its samples are those of the largest batch: with a loss they cannot be fewer, as it is asked
    of whole batches.
    """
    of_all = (setting, workload.key, workload.batch_keys, workload.num_probes, workload.seed)
    cells = workload.cells
    largest = max(map(num_samples, workload.calibration))
    samples = largest if workload.loss is None else None
    return [
        Task(
            digest(of_all, unit, list(map(str, schemes)), number),
            (number,),
            label=f"unit {unit!r}",
            samples=samples,
        )
        for number, (unit, schemes) in enumerate(zip(cells.units, cells.schemes, strict=True))
    ]


def refuse_activations(metric: str, workload: Workload) -> None:
    """Raise InvalidInputError for schemes that quantize activations."""
    for unit, scheme in workload.cells:
        if not scheme.activations.is_native:
            raise InvalidInputError(
                "weights_only",
                f"{metric} scores weights only, but {scheme} of unit {unit!r} quantizes "
                f"activations: use metric='gauss_newton' or weights-only schemes",
            )


def refuse_experts(metric: str, workload: Workload) -> None:
    """Raise InvalidInputError where experts are searched: their output is not that of a layer."""
    named = workload.graph.by_name
    for unit in workload.graph.units:
        for name in unit.layers:
            if named[name].kind == "experts":
                raise InvalidInputError(
                    "layer_outputs",
                    f"{metric} needs the output of every layer, but experts {name!r} are a "
                    f"parameter that its module uses in its own way: use metric='gauss_newton' or "
                    f"'kl', or leave it out with skip=[{name!r}]",
                )


def refuse_apart(metric: str, workload: Workload, *, inputs: bool = True) -> None:
    """Raise InvalidInputError where KV caches, or inputs too, are searched: they hold no weight."""
    named = workload.graph.by_name
    for unit in workload.graph.units:
        for name in unit.layers:
            if named[name].is_cache or (inputs and named[name].is_input):
                raise InvalidInputError(
                    "weights_only",
                    f"{metric} scores weights, but unit {name!r} is "
                    f"{'a KV cache' if named[name].is_cache else 'the input of a layer'}: use "
                    f"metric='gauss_newton' or 'kl'",
                )


def mean_over_samples(metric: str, cells: Cells, partials: Sequence[Partial]) -> SensitivityTable:
    """Return the table of partials "scores" of (cells, samples): the mean and its error."""
    scores = np.concatenate([p["scores"] for p in partials], axis=1).astype(np.float64)
    samples = scores.shape[1]
    spread = scores.std(axis=1, ddof=1) if samples > 1 else np.zeros(len(scores))
    return SensitivityTable(
        metric=metric,
        cells=cells,
        values=scores.mean(axis=1),
        stderr=spread / math.sqrt(samples),
    )
