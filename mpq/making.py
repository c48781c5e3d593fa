"""Weights whose formats take calibration data: made once, ahead of scoring, and kept with the run.

Whoever takes the chosen network later, without the data, finds its weights in the database.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence

import torch
from safetensors.torch import load, save

from mpq.core.formats import Format, parse_format
from mpq.core.jobs import Clip
from mpq.core.layers import Layer, LayerGraph
from mpq.core.problem import Allocation
from mpq.nn.patch import ParameterName
from mpq.nn.quantizers import WeightQuantizer
from mpq.nn.rounding import data_of, data_wanted, made_ahead
from mpq.nn.workload import Workload
from mpq.progress import Progress
from mpq.store.artifacts import read_artifact, write_artifact
from mpq.store.store import Store

MADE = "made"  # the kind of artifact

Made = dict[tuple[ParameterName, Format], dict[str, torch.Tensor]]


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
    taken: dict[str, torch.Tensor] = {}
    for allocation in allocations:
        for unit in graph.units:
            fmt = allocation[unit.name].weights
            for layer in graph.stored_layers(unit):
                for part, array in quantizer.made.get((layer.weight_id, fmt), {}).items():
                    name = f"{fmt.text('weights')}|{layer.weight_id}|{part}"
                    taken[name] = array.detach().cpu().contiguous()
    if taken:
        content = save(taken)
        digest = hashlib.sha256(content).hexdigest()
        write_artifact(store, digest, MADE, io.BytesIO(content))
        store.need_artifact(run_id, digest)


def quantizer_of(store: Store, run_id: str, clip: Clip) -> WeightQuantizer:
    """Return the quantizer of a run with the weights that were kept.

    Raises StorageError where the database lost or damaged them.
    """
    made: Made = {}
    for digest in store.artifacts_of(run_id, MADE):
        content = io.BytesIO()
        read_artifact(store, digest, content)
        for name, array in load(content.getvalue()).items():
            text, _, rest = name.partition("|")
            weight_id, _, part = rest.rpartition("|")
            made.setdefault((weight_id, parse_format(text)), {})[part] = array
    return WeightQuantizer(clip, made=made)
