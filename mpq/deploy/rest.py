"""The time of what is between the searched layers: the fp32 network minus their kernels."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from mpq.core.errors import InvalidInputError
from mpq.core.latency import REST_INCLUDED, KernelLatency
from mpq.core.layers import LayerGraph
from mpq.core.quantities import quantity
from mpq.core.tables import CostTable
from mpq.deploy.target import Target, get_target
from mpq.deploy.timing import network_case, time_networks
from mpq.nn.batches import Batch, describe
from mpq.nn.fingerprint import digest, model_digest
from mpq.store.store import Store

_VERSION = 1  # part of the key of a time: raise it when networks are exported otherwise


def with_rest(
    table: CostTable,
    model: nn.Module,
    graph: LayerGraph,
    sample: Batch,
    store: Store,
    *,
    target: str = "onnxruntime",
    device: str,
    seconds: float,
    seed: int = 0,
) -> CostTable:
    """Return a latency table of kernels whose fixed part is the rest of the network.

    A total is then the time of the whole network with some layers in other formats, and a
    percentage one of the whole network. The rest is the time of the fp32 network in the target
    minus the fp32 kernels of its searched layers, once for each network, sample and device. It
    is what runs between the layers, less what the runtime gains by fusing across them.
    Raises InvalidInputError where the network cannot be exported, or runs in less time than its
    layers take one by one, so that a sum over layers says nothing of it.
    """
    unit_layers = [unit.layers for unit in graph.units]
    key = digest(_VERSION, model_digest(model), describe(sample), unit_layers)
    runtime = get_target(target)
    case = network_case(runtime, "fp32", f"{describe(sample)} {key}")
    known = store.kernel_latencies(device).get(case)
    whole = known or _timed(runtime, model, graph, sample, seconds, seed, case.shape)
    if known is None:
        store.put_kernel_latency(whole)
    layers_s = table.baseline - table.fixed
    if whole.median_s < layers_s:
        raise InvalidInputError(
            "no_rest",
            f"the whole fp32 network takes {quantity(whole.median_s, 's')}, its searched layers "
            f"one by one {quantity(layers_s, 's')}: the runtime fuses what is between them",
        )
    return replace(
        table,
        fixed=whole.median_s - layers_s,
        baseline=whole.median_s,
        provenance=f"{table.provenance}, {REST_INCLUDED}",
    )


def _timed(
    runtime: Target,
    model: nn.Module,
    graph: LayerGraph,
    sample: Batch,
    seconds: float,
    seed: int,
    shape: str,
) -> KernelLatency:
    network = runtime.export(model, graph, sample).fp32
    read = sum(la.weight_bytes for la in graph.layers if la.calls and la.kind != "embedding")
    (whole,) = time_networks(
        runtime,
        {network_case(runtime, "fp32", shape): network},
        sample,
        [read],
        seconds=seconds,
        seed=seed,
    )
    return whole
