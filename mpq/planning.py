"""Plan a network on a machine: bytes and modelled times from shapes, without weights or scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from hw_cost_models import get_cost_model, get_hardware, is_measured
from hw_cost_models.attention import decode_seconds, prefill_seconds
from hw_cost_models.memory import storable
from hw_cost_models.roofline import Roofline, presets
from mpq.choices import make_cells, parse_schemes
from mpq.core.attention import Attention
from mpq.core.budgets import Budget, BudgetText, resolved
from mpq.core.errors import InfeasibleError, InvalidInputError
from mpq.core.formats import NATIVE_BITS, Scheme, native_scheme, parse_scheme
from mpq.core.layers import Layer, LayerGraph
from mpq.core.plan import Plan, PlanRow
from mpq.core.problem import Allocation
from mpq.core.profiles import Profile, given_profiles, weighted_latency
from mpq.core.tables import Cells, CostTable
from mpq.models import load_batches, load_shapes
from mpq.nn.batches import checked_call
from mpq.nn.graph import build_graph
from mpq.nn.shapes import attention_of, generates, token_sample
from mpq.profiles import profile_batches, traced

# Of each line the first that every layer can store, beside the network as it is.
_DEFAULT = (
    ("int8",),
    ("int8:int8",),
    ("int6g128", "int6g64", "int6g32", "int6"),
    ("int5g128", "int5g64", "int5g32", "int5"),
    ("int4g128", "int4g64", "int4g32", "int4"),
    ("int4g128:int8", "int4g64:int8", "int4g32:int8", "int4:int8"),
    ("int3g128", "int3g64", "int3g32", "int3"),
    ("int2g32a", "int2g16a", "int2a"),
)


def plan(
    model: nn.Module | str,
    *,
    bits: float = 4.0,
    hardware: str = "roofline:H100",
    batch: int = 1,
    tokens: int = 2048,
    context: int | None = None,
    schemes: Sequence[str] | None = None,
    memory: str | None = None,
    skip: Sequence[str] = (),
    sample: Any = None,
    profiles: Mapping[str, Profile] | None = None,
    budgets: Sequence[str] = (),
) -> Plan:
    """Return what a network takes on a machine that need not be here; no weights are needed.

    `model` is a directory with a Hugging Face config.json, the entry point of a function that
    returns a config or a network (on any device, meta too), or a network. A network of tokens is
    planned for `batch` sequences of `tokens`, one that generates also for decoding after `context`
    tokens (default: `tokens`); any other needs a `sample` batch. `bits` is the mean over the
    searched weights with all that their schemes store; `memory`, such as "48 GB", replaces the
    machine's. With `profiles` each is a phase of its own instead: its `batch` and `tokens` (else
    those of the plan) of the `sample` or of a network of tokens; one token is decoded after
    `context`, and "latency" is their weighted mean. An allocation that breaks one of `budgets`,
    such as "decode <= 20 ms", does not fit. Times are a roofline and so a lower bound: modelled,
    not measured. Raises InvalidInputError for what cannot be planned, InfeasibleError where no
    scheme is as narrow as `bits`.
    """
    context = tokens if context is None else context
    for name, count in {"batch": batch, "tokens": tokens, "context": context}.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InvalidInputError(name, f"{name} is a whole number from 1 on, got {count!r}")
    for what, given in {"skip": skip, "budgets": budgets}.items():
        if isinstance(given, str):
            raise InvalidInputError(what, f"{what} is a list, got {given!r}: write [it]")
    machine = _roofline(hardware)
    asked = None if schemes is None else parse_schemes(schemes)
    budget = BudgetText.parse(f"memory <= {bits} bpw")
    network = load_shapes(model)
    served = given_profiles(profiles)
    phases, attention, notes = _phases(network, batch, tokens, context, sample, skip, served)
    graph = next(iter(phases.values())).graph
    cells = make_cells(graph, _choices(graph, asked))
    costs = _Costs.of(machine, phases, attention, cells, context, budgets)
    limit = costs.limit(memory, machine.machine.memory_bytes)
    uniform = _uniform(cells)
    limit_bytes = budget.resolve({"memory": costs.memory}).limit + _ROUNDING_BYTES
    name, numbers = _mix(costs.memory, uniform, limit_bytes)
    named = {str(scheme): chosen for scheme, chosen in uniform.items()}
    return Plan(
        model=model if isinstance(model, str) else type(model).__name__,
        machine=machine.machine.title,
        hardware=machine.provenance,
        layers=len(graph.layers),
        units=len(graph.units),
        parameters=graph.searched_weights + sum(part.elements for part in graph.unsearched),
        searched_weights=graph.searched_weights,
        native_bytes=graph.native_bytes,
        memory_bytes=limit,
        kv_cache_bytes=costs.kv_cache_bytes,
        batch=batch,
        tokens=tokens,
        context=context,
        uniform=tuple(costs.row(text, chosen, limit) for text, chosen in named.items()),
        chosen=costs.row(name, numbers, limit),
        allocation=Allocation.from_choice(cells, numbers),
        budgets=costs.budgets,
        notes=(*notes, *([_UNSCORED] if name not in named else []), *_NOTES),
    )


_ROUNDING_BYTES = 1e-3  # bytes are whole: what a mean over many weights loses is no byte
_UNSCORED = "the mix is by size alone, small units wider: unscored, a search chooses better"
_NOTES = (
    "times are modelled, a lower bound: no kernel reaches a data sheet's peaks",
    "norms, activation functions and sampling take no time here",
    "memory of activations and of the runtime itself is not counted",
)
Indices = npt.NDArray[np.int64]


def _roofline(hardware: str) -> Roofline:
    found = None if is_measured(hardware) else get_hardware(hardware)
    if not isinstance(found, Roofline):
        raise InvalidInputError(
            "hardware",
            f"a plan needs a machine with a memory, one of {', '.join(presets())}; "
            f"got {hardware!r}",
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Phase:
    """The network traced as it is run, `tokens` of each of `batch` sequences at once."""

    graph: LayerGraph
    batch: int
    tokens: int
    decodes: bool = False  # the tokens follow what is in the KV cache
    weight: float | None = None  # of a profile


def _phases(
    network: nn.Module,
    batch: int,
    tokens: int,
    context: int,
    sample: Any,
    skip: Sequence[str],
    profiles: Mapping[str, Profile],
) -> tuple[dict[str, _Phase], Attention | None, list[str]]:
    """Return the phases that are planned, the network's attention, and what to know of it."""
    attention, notes = None, ["attention between tokens takes no time here"]
    given = None if sample is None else load_batches(sample, "sample")
    if given is None and generates(network):
        attention, notes = attention_of(network, context)
    if given is not None:
        notes = []
    found: dict[str, _Phase] = {}
    for name, one in (profiles or _usual(network, tokens, given, attention)).items():
        if one.sample is not None:
            raise InvalidInputError(
                "profiles", f"profile {name!r}: in a plan it has batch and tokens, no sample"
            )
        count = one.tokens or tokens
        if given is None:
            shape = token_sample(network, one.batch or batch, count)
        else:
            shape = profile_batches({name: one}, lambda: given)[name]
        if profiles and found:
            graph = traced(name, network, shape, next(iter(found.values())).graph, skip)
        else:
            what = "a batch of tokens" if given is None else "the sample"
            checked_call(network, shape, f"profile {name!r}" if profiles else what, finite=False)
            graph = build_graph(network, shape, skip=skip)
        found[name] = _Phase(
            graph=graph,
            batch=one.batch or batch,
            tokens=count,
            decodes=name == "decode" if not profiles else count == 1,
            weight=one.weight if profiles else None,
        )
    return found, attention, notes


def _usual(
    network: nn.Module, tokens: int, sample: Any, attention: Attention | None
) -> dict[str, Profile]:
    """Return the phases of a network of its kind."""
    if sample is not None or not generates(network):
        return {"forward": Profile()}
    decode = {"decode": Profile(tokens=1)} if attention is not None else {}
    return {"prefill": Profile(tokens=tokens), **decode}


def _choices(graph: LayerGraph, asked: Sequence[Scheme] | None) -> Any:
    """Return what a layer may take: what is asked, or the default that all layers can store."""
    searched = [graph.by_name[name] for unit in graph.units for name in unit.layers]
    offered = [
        next((s for s in line if all(storable(layer, s.weights) for layer in searched)), None)
        for line in (tuple(map(parse_scheme, texts)) for texts in _DEFAULT)
    ]

    def choices(layer: Layer) -> list[Scheme]:
        wanted = asked or [native_scheme(layer.native_family), *(s for s in offered if s)]
        weights_only = bool(layer.why_weights_only)
        return [s for s in wanted if s.activations.is_native or not weights_only]

    return choices


def _uniform(cells: Cells) -> dict[Scheme, Indices]:
    """Return the cells of every scheme that all units may take."""
    shared = [s for s in cells.schemes[0] if all(s in schemes for schemes in cells.schemes)]
    return {
        scheme: np.array([cells.index((unit, scheme)) for unit in cells.units], np.int64)
        for scheme in shared
    }


def _mix(memory: CostTable, uniform: Mapping[Scheme, Indices], limit: float) -> tuple[str, Indices]:
    """Return the widest uniform scheme within a limit of bytes, with some units one step wider.

    Small units are widened first, equal ones in network order, as long as the total stays within
    the limit. Nothing is known of what they lose.
    """
    totals = {s: memory.fixed + memory.values[numbers].sum() for s, numbers in uniform.items()}
    if not totals:
        raise InvalidInputError("no_choices", "no scheme can store every layer: name some schemes")
    narrowest = min(totals, key=totals.__getitem__)
    if totals[narrowest] > limit:
        bits = 8 * (totals[narrowest] - memory.fixed) / memory.weights
        raise InfeasibleError(
            "infeasible",
            f"no scheme takes so few bits: the narrowest, {narrowest}, takes {bits:.4g} a weight "
            f"with its scales; ask for more bits or name a narrower scheme",
        )
    low = max((s for s in totals if totals[s] <= limit), key=totals.__getitem__)
    wider = [s for s in totals if totals[s] > limit]
    if not wider:
        return str(low), uniform[low]
    high = min(wider, key=totals.__getitem__)
    extra = memory.values[uniform[high]] - memory.values[uniform[low]]
    order = np.argsort(memory.values[uniform[high]], kind="stable")
    taken = order[totals[low] + np.cumsum(extra[order]) <= limit]
    if not len(taken):
        return str(low), uniform[low]
    numbers = uniform[low].copy()
    numbers[taken] = uniform[high][taken]
    return f"{len(taken)} units {high}, {len(numbers) - len(taken)} units {low}", numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Costs:
    """The tables of a plan, what attention adds to each phase included, and budgets on them."""

    memory: CostTable
    latency: Mapping[str, CostTable]
    kv_cache_bytes: int
    budgets: tuple[Budget, ...]

    @classmethod
    def of(
        cls,
        roofline: Roofline,
        phases: Mapping[str, _Phase],
        attention: Attention | None,
        cells: Cells,
        context: int,
        budgets: Sequence[str],
    ) -> _Costs:
        graph = next(iter(phases.values())).graph
        family = graph.by_name[graph.units[0].layers[0]].native_family
        memory = get_cost_model("memory").table(graph, cells)
        latency, cache = {}, 0
        for name, phase in phases.items():
            table = roofline.table(phase.graph, cells)
            more = _attention_s(roofline, attention, family, phase, context)
            latency[name] = replace(
                table, name=name, fixed=table.fixed + more, baseline=table.baseline + more
            )
            if attention is not None:
                width = NATIVE_BITS[family] // 8
                cache = max(cache, attention.cache_bytes(context, phase.batch, width))
        weights = {n: phase.weight for n, phase in phases.items() if phase.weight is not None}
        if weights:
            latency["latency"] = weighted_latency(latency, weights)
        return cls(
            memory=memory,
            latency=latency,
            kv_cache_bytes=cache,
            budgets=resolved(budgets, {"memory": memory, **latency}),
        )

    def limit(self, memory: str | None, machine_bytes: int) -> int:
        if memory is None:
            return machine_bytes
        return int(BudgetText.parse(f"memory <= {memory}").resolve({"memory": self.memory}).limit)

    def row(self, name: str, numbers: Indices, memory_bytes: int) -> PlanRow:
        stored = self.memory.values[numbers].sum()
        weights = round(self.memory.fixed + stored)
        resident = weights + self.kv_cache_bytes
        seconds = {
            phase: float(table.fixed + table.values[numbers].sum())
            for phase, table in self.latency.items()
        }
        totals = {"memory": weights, **seconds}
        kept = all(totals[budget.cost] <= budget.limit for budget in self.budgets)
        return PlanRow(
            name=name,
            bits=float(8 * stored / self.memory.weights),
            weight_bytes=weights,
            resident_bytes=resident,
            fits=resident <= memory_bytes and kept,
            seconds=seconds,
        )


def _attention_s(
    roofline: Roofline, attention: Attention | None, family: str, phase: _Phase, context: int
) -> float:
    if attention is None:
        return 0.0
    if phase.decodes:
        return decode_seconds(roofline.machine, attention, family, context, phase.batch)
    return prefill_seconds(roofline.machine, attention, family, phase.tokens, phase.batch)
