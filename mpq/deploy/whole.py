"""Latency of whole networks: a table of layers, corrected by what some mixes really take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import nn

from hw_cost_models.measured.correction import Parts, Run, corrected
from hw_cost_models.measured.interval import NORMAL
from mpq.core.formats import Scheme
from mpq.core.latency import REST_INCLUDED, KernelCase, KernelLatency
from mpq.core.layers import LayerGraph, LayerName
from mpq.core.problem import Allocation
from mpq.core.tables import Cells, CostTable
from mpq.deploy.placed import is_static, writes_codes
from mpq.deploy.target import Exported, Loaded, Target
from mpq.deploy.timing import network_case, time_networks
from mpq.nn.batches import Batch, cut, describe
from mpq.nn.fingerprint import digest, model_digest
from mpq.nn.quantizers import WeightQuantizer
from mpq.store.store import Store

_VERSION = 2  # part of the key of a time: raise it when networks are exported otherwise
_MIXES = 10
_TOGETHER = 5  # mixes in memory at once
_CALIBRATION = 4  # samples for static ranges, which no time depends on
_LIKING = 0.5  # of a Dirichlet distribution: most mixes like a few formats best
Schemes = Mapping[LayerName, Scheme]


def with_whole(
    table: CostTable,
    parts: Parts,
    network: WholeNetwork,
    *,
    seed: int = 0,
) -> CostTable:
    """Return a latency table of layers as one of the whole network.

    Its fixed part is what the fp32 network takes beyond the fp32 kernels of its searched layers,
    and then some random mixes say how sums of layers differ from networks (`corrected`): a total
    is the time of the whole network with some layers in other formats, a percentage one of the
    whole fp32 network. Every time is kept, by network, sample, mix and device. Raises
    InvalidInputError where the network cannot be exported.
    """
    mixes = list(dict.fromkeys(random_mixes(table.cells, _MIXES, np.random.default_rng(seed))))
    fp32, *mixed = network.times([None, *mixes])
    layers_s = table.baseline - table.fixed
    rest = replace(table, fixed=max(fp32.median_s - layers_s, 0.0), baseline=fp32.median_s)
    runs = [
        Run(
            choice=mix.choice(table.cells),
            seconds=took.median_s,
            sd=np.log(took.high_s / took.median_s) / NORMAL,
        )
        for mix, took in zip(mixes, mixed, strict=True)
    ]
    found, error = corrected(rest, parts, _meeting(table.cells, network), runs)
    told = f"corrected by {len(runs)} mixes (error of one left out {100 * error:.1f} %)"
    return replace(found, provenance=f"{table.provenance}, {REST_INCLUDED}, {told}")


def random_mixes(cells: Cells, count: int, rng: np.random.Generator) -> list[Allocation]:
    """Return allocations of all kinds: each has its own liking of every place in the lists."""
    mixes = []
    for _ in range(count):
        liking = rng.dirichlet(np.full(max(map(len, cells.schemes)), _LIKING))
        chosen = {}
        for unit, schemes in zip(cells.units, cells.schemes, strict=True):
            weights = liking[: len(schemes)] + 1e-9
            chosen[unit] = schemes[rng.choice(len(schemes), p=weights / weights.sum())]
        mixes.append(Allocation(chosen))
    return mixes


@dataclass(frozen=True, kw_only=True)
class WholeNetwork:
    """A network of which mixes are timed in a runtime, each once; exported when it must be."""

    target: Target
    model: nn.Module
    graph: LayerGraph
    sample: Batch
    calibration: Sequence[Batch]
    store: Store
    seconds: float
    seed: int = 0

    @cached_property
    def exported(self) -> Exported:
        """The network as the runtime takes it."""
        return self.target.export(self.model, self.graph, self.sample)

    def times(self, mixes: Sequence[Allocation | None]) -> list[KernelLatency]:
        """Return the time of each mix, None being the fp32 network: known, or measured and kept."""
        cases = [self._case(mix) for mix in mixes]
        known = self.store.kernel_latencies(self.target.device)
        missing = {c: m for c, m in zip(cases, mixes, strict=True) if c not in known}
        for latency in self._timed(missing, known.get(self._case(None))):
            known[latency.case] = latency
            self.store.put_kernel_latency(latency)
        return [known[case] for case in cases]

    @cached_property
    def _key(self) -> str:
        units = [unit.layers for unit in self.graph.units]
        return digest(_VERSION, model_digest(self.model), describe(self.sample), units)

    def _case(self, mix: Allocation | None) -> KernelCase:
        shape = f"{describe(self.sample)} {self._key}"
        text = "" if mix is None else json.dumps(mix.text(), sort_keys=True)
        precision = "fp32" if mix is None else f"mix {digest(text)}"
        return network_case(self.target, precision, shape)

    def _timed(
        self, mixes: Mapping[KernelCase, Allocation | None], fp32: KernelLatency | None
    ) -> list[KernelLatency]:
        """Time mixes beside the fp32 network, whose time the first of them, or `fp32`, is."""
        found: list[KernelLatency] = []
        wanted = list(mixes.items())
        for start in range(0, len(wanted), _TOGETHER):
            group: dict[KernelCase, Allocation | None] = {self._case(None): None}
            group |= dict(wanted[start : start + _TOGETHER])
            took, *others = time_networks(
                self.target,
                {case: self._loaded(mix) for case, mix in group.items()},
                self.sample,
                [self._read_bytes(mix) for mix in group.values()],
                seconds=self.seconds * len(group) / (len(wanted) + 1),
                seed=self.seed,
            )
            if fp32 is None:
                fp32 = took
                found.append(took)
            found += [_scaled(one, fp32.median_s / took.median_s) for one in others]
        return found

    def _loaded(self, mix: Allocation | None) -> Loaded:
        if mix is None:
            return self.exported.fp32
        few = [cut(batch, 0, _CALIBRATION) for batch in self.calibration[:1]]
        return self.exported.mixed(_to_nearest(self._schemes(mix)), WeightQuantizer(), few)

    def _schemes(self, mix: Allocation) -> Schemes:
        return {layer: mix[unit.name] for unit in self.graph.units for layer in unit.layers}

    def _read_bytes(self, mix: Allocation | None) -> int:
        return read_bytes(self.graph, {} if mix is None else self._schemes(mix))


def _to_nearest(schemes: Schemes) -> Schemes:
    """Return the schemes without their roundings, on which no time depends."""
    return {
        layer: replace(scheme, weights=replace(scheme.weights, rounding="nearest"))
        for layer, scheme in schemes.items()
    }


def _scaled(latency: KernelLatency, factor: float) -> KernelLatency:
    """Return a time at another speed of the machine."""
    return replace(
        latency,
        median_s=latency.median_s * factor,
        low_s=latency.low_s * factor,
        high_s=latency.high_s * factor,
    )


def read_bytes(graph: LayerGraph, schemes: Schemes) -> int:
    """Return the bytes of weights that a pass reads, embeddings aside; layers not named in fp32."""
    sizes = {}
    for layer in graph.layers:
        if layer.calls and layer.kind != "embedding":
            bits = 32 * layer.num_weights
            if layer.name in schemes:
                fmt = schemes[layer.name].weights
                bits = fmt.storage_bits(layer.weight_shape, layer.channel_axis)
            sizes[layer.weight_id] = bits // 8
    return sum(sizes.values())


def _meeting(cells: Cells, network: WholeNetwork) -> list[tuple[int, int]]:
    """Return the pairs of cells in which two neighbours pass each other 8-bit codes."""
    layers = network.graph.by_name
    writing: dict[LayerName, list[int]] = {}
    reading: dict[LayerName, list[int]] = {}
    numbers = {unit: number for number, unit in enumerate(cells.units)}
    for unit in network.graph.units:
        start = int(cells.offsets[numbers[unit.name]])
        for name in unit.layers:
            for cells_of, does in ((writing, writes_codes), (reading, is_static)):
                cells_of[name] = [
                    start + place
                    for place, scheme in enumerate(cells.schemes[numbers[unit.name]])
                    if does(layers[name], scheme)
                ]
    if not any(writing.values()):
        return []
    of_layer = {layer: unit.name for unit in network.graph.units for layer in unit.layers}
    return [
        (one, other)
        for a, b in network.exported.neighbours()
        if of_layer[a] != of_layer[b]
        for one in writing[a]
        for other in reading[b]
    ]
