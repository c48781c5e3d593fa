"""Weights whose formats take calibration data: made once, ahead of scoring, and kept with the run.

Whoever takes the chosen network later, without the data, finds its weights in the database.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpq.artifacts import MADE, keep_arrays, restored
from mpq.core.formats import Format, parse_format
from mpq.core.jobs import Clip
from mpq.core.layers import Layer, LayerGraph
from mpq.core.live import ARTIFACT
from mpq.core.problem import Allocation
from mpq.nn.patch import ParameterName
from mpq.nn.quantizers import WeightQuantizer
from mpq.nn.rounding import data_of, data_wanted, made_ahead
from mpq.nn.workload import Workload
from mpq.progress import Progress
from mpq.store.store import Store


def make_ahead(workload: Workload, progress: Progress) -> None:
    """Make every weight that a choice stores with calibration data or a search, here, once.

    The packed arrays go into `workload.quantizer.made`, with which they travel to workers. The
    same data and seed give the same arrays.
    """
    wanted: dict[ParameterName, tuple[Layer, list[Format]]] = {}
    for unit, schemes in zip(workload.graph.units, workload.cells.schemes, strict=True):
        made = [s.weights for s in schemes if s.weights.made_ahead]
        for layer in workload.graph.stored_layers(unit) if made else ():
            wanted[layer.weight_id] = (layer, list(dict.fromkeys(made)))
    for layer, formats in wanted.values():
        for fmt in formats:
            if missing := data_wanted(fmt) - data_of(layer, fmt):
                progress.note(
                    f"{layer.kind} {layer.name!r} in {fmt.text('weights')} is stored without "
                    f"{' and '.join(sorted(missing))}: of such layers none is gathered"
                )
    total = sum(len(formats) for _, formats in wanted.values())
    if not total:
        return
    with progress.stage("weights made of calibration data", total) as advance:
        for name, fmt, stored in made_ahead(workload, wanted):
            workload.quantizer.made[name, fmt] = stored.pack()
            advance()


def keep_made(
    store: Store,
    run_id: str,
    graph: LayerGraph,
    quantizer: WeightQuantizer,
    allocations: Sequence[Allocation],
) -> None:
    """Keep the weights made ahead that these allocations take, as an artifact of the run."""
    taken: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for allocation in allocations:
        for unit in graph.units:
            fmt = allocation[unit.name].weights
            for layer in graph.stored_layers(unit):
                arrays = quantizer.made.get((layer.weight_id, fmt))
                if arrays is not None:
                    of_format = taken.setdefault(fmt.text("weights"), {})
                    of_format[layer.weight_id] = dict(arrays)
    if taken:
        store.need_artifact(run_id, keep_arrays(store, taken, "weights made ahead"))


def quantizer_of(store: Store, run_id: str, clip: Clip) -> WeightQuantizer:
    """Return the quantizer of a run with the weights that were kept.

    Raises StorageError where the database lost or damaged them.
    """
    made: dict[tuple[ParameterName, Format], dict[str, torch.Tensor]] = {}
    for digest in store.artifacts_of(run_id, MADE):
        for text, weights in restored(store, f"{ARTIFACT}{digest}").items():
            fmt = parse_format(text)
            made |= {(weight_id, fmt): arrays for weight_id, arrays in weights.items()}
    return WeightQuantizer(clip, made=made)
