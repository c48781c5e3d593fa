"""First stage: what the user gave becomes a checked Workload."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mpq.apart import graph_with_caches, kv_caches, without_caches
from mpq.choices import make_cells
from mpq.core.errors import InvalidInputError, MpqWarning, unknown
from mpq.core.formats import Scheme
from mpq.core.jobs import JobSpec
from mpq.core.layers import Layer, LayerGraph
from mpq.core.limits import Limit
from mpq.core.profiles import Profile
from mpq.core.tables import Cells
from mpq.data import Data, load_data
from mpq.models import load_batches, load_function, load_model
from mpq.nn.batch_norm import batch_norms
from mpq.nn.batches import Batch, ambiguity, checked_call, cut
from mpq.nn.calibrate import with_input_ranges
from mpq.nn.correction import InputMeans
from mpq.nn.divergence import OutputDivergence, detect
from mpq.nn.fingerprint import batches_digest, digest, model_digest, output_digest
from mpq.nn.graph import build_graph
from mpq.nn.input_means import input_means, with_added_biases
from mpq.nn.observers import get_observer
from mpq.nn.patch import evaluating
from mpq.nn.quality import QUALITIES, Quality, degradations, get_quality
from mpq.nn.quantizers import QUANTIZER_VERSION, WeightQuantizer
from mpq.nn.rounding import ROUNDING_VERSION
from mpq.nn.workload import Evaluate, Loss, Workload
from mpq.preparing import prepared
from mpq.profiles import Served, profile_batches, served_profiles

_ZERO = 1e-5  # what rounding may leave of the difference of equal outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The live objects of a job: as passed, or as its entry points made them."""

    model: nn.Module
    calibration: tuple[Batch, ...]
    calibration_data: str = ""  # where they came from
    held_out: tuple[Batch, ...] = ()
    held_out_data: str = ""
    sample: Batch | None = None
    loss: Loss | None = None
    evaluate: Evaluate | None = None
    quality: Mapping[str, Quality] = field(default_factory=dict)
    profiles: Mapping[str, Batch] = field(default_factory=dict)


def load(
    model: Any,
    calibration: Any,
    *,
    held_out: Any = None,
    sample: Any = None,
    loss: Any = None,
    evaluate: Any = None,
    quality: Mapping[str, Any] | None = None,
    profiles: Mapping[str, Profile] | None = None,
    seed: int = 0,
    trial: bool = False,
) -> Given:
    """Load whatever is an entry point, make synthetic data, and check that batches are batches.

    `seed` is that of synthetic calibration batches, held-out ones have the next; on `trial` see
    `load_data`.
    """
    network, shape = load_model(model), load_batches(sample, "sample")
    calibrated = load_data(calibration, "calibration", network, shape, seed=seed, trial=trial)
    shape_of_held_out = calibrated.batches[0] if shape is None else shape
    judged = Data()
    if held_out is not None:
        judged = load_data(
            held_out, "held_out", network, shape_of_held_out, seed=seed + 1, trial=trial
        )
    given = Given(
        model=network,
        calibration=calibrated.batches,
        calibration_data=calibrated.told,
        held_out=judged.batches,
        held_out_data=judged.told,
        sample=shape,
        loss=load_function(loss, "loss"),
        evaluate=load_function(evaluate, "evaluate"),
        quality=_load_qualities(quality or {}),
    )
    batches = profile_batches(profiles or {}, partial(sample_of, given))
    return replace(given, profiles=batches)


def _load_qualities(sources: Mapping[str, Any]) -> dict[str, Quality]:
    """Return quality functions: themselves, by name, or what entry points name."""
    return {
        name: load_function(source, f"quality {name!r}")
        if callable(source) or ":" in str(source)
        else get_quality(source)
        for name, source in sources.items()
    }


def with_transforms(spec: JobSpec, given: Given) -> Given:
    """Return the objects of a job with the network after its transforms, a copy."""
    if not spec.transforms:
        return given
    network = prepared(given.model, given.calibration, spec.transforms, seed=spec.seed)
    return replace(given, model=network)


def sample_of(given: Given) -> Batch:
    """Return the sample: the user's, or the first calibration sample alone."""
    return cut(given.calibration[0], 0, 1) if given.sample is None else given.sample


def graph_of(spec: JobSpec, given: Given) -> LayerGraph:
    """Trace the network on the sample."""
    sample = sample_of(given)
    with evaluating(given.model), torch.no_grad():
        checked_call(given.model, sample, "the sample", finite=False)
    caches = kv_caches(spec, given.model, sample)
    graph = build_graph(
        given.model,
        sample,
        skip=without_caches(spec.skip, caches, given.model),
        groups=spec.groups,
        embeddings=spec.embeddings,
        inputs=spec.activations == "apart",
    )
    return graph_with_caches(graph, caches, spec.skip)


def served_of(spec: JobSpec, given: Given, graph: LayerGraph) -> dict[str, Served]:
    """Trace the network on each profile of the job."""
    return served_profiles(given.model, given.profiles, spec.profiles, graph, spec.skip)


def make_workload(
    spec: JobSpec,
    given: Given,
    graph: LayerGraph,
    schemes: Callable[[Layer], Sequence[Scheme]],
) -> Workload:
    """Put model, data and choices together; the key covers all that scores depend on."""
    cells = make_cells(graph, schemes, spec.pin, spec.on_indivisible)
    with evaluating(given.model), torch.no_grad():
        output = checked_call(given.model, cut(given.calibration[0], 0, 1), "calibration batch 0")
    if output.shape[:1] != (1,):
        raise InvalidInputError(
            "output_shape",
            f"the first axis of the output must be the samples: one sample gives "
            f"{list(output.shape)}; return (samples, positions, classes) instead",
        )
    for number, batch in enumerate(given.held_out):
        with evaluating(given.model), torch.no_grad():
            checked_call(given.model, cut(batch, 0, 1), f"held-out batch {number}")
    if note := ambiguity(given.model, given.calibration[0]):
        warnings.warn(note, MpqWarning, stacklevel=2)
    qualities = _qualities(spec, given)
    _check_qualities(given.model, qualities, given.calibration[0])
    divergence = OutputDivergence(detect(output) if spec.divergence == "auto" else spec.divergence)
    get_observer(spec.observer)
    if any(not s.activations.is_native for schemes in cells.schemes for s in schemes):
        graph = _with_ranges(spec, given, graph, cells)
    means: InputMeans = {}
    if "bias" in spec.corrections:
        graph, means = _with_biases(given, graph)
    if "batch_norm" in spec.corrections:
        batch_norms(given.model)  # refuses a network that has none
    batch_keys = batches_digest(given.calibration)
    corrected = (spec.corrections, means, batch_keys) if spec.corrections else ()
    made = any(s.weights.made_ahead for schemes in cells.schemes for s in schemes)
    # What is made of all batches makes the scores of each depend on all.
    of_all = (ROUNDING_VERSION, batch_keys, spec.num_probes, spec.seed) if made else ()
    key = digest(
        model_digest(given.model),
        [(unit.name, unit.layers) for unit in graph.units],
        *[layer.weight_shape[1] for layer in graph.apart if layer.is_cache],
        output_digest(output),
        graph.input_ranges,
        divergence.kind,
        (spec.clip, QUANTIZER_VERSION, *of_all),
        *corrected,
    )
    return Workload(
        model=given.model,
        graph=graph,
        cells=cells,
        calibration=given.calibration,
        data=given.calibration_data,
        held_out=given.held_out,
        divergence=divergence,
        quantizer=WeightQuantizer(spec.clip),
        loss=given.loss,
        evaluate=given.evaluate,
        qualities=qualities,
        seed=spec.seed,
        num_probes=spec.num_probes,
        key=key,
        input_means=means,
        reestimate="batch_norm" in spec.corrections,
        batch_keys=batch_keys,
        held_out_keys=batches_digest(given.held_out),
    )


def _with_biases(given: Given, graph: LayerGraph) -> tuple[LayerGraph, InputMeans]:
    """Return the graph with the biases that a correction adds, and the mean inputs it takes."""
    means, why_not = input_means(given.model, graph, given.calibration)
    for name, why in why_not.items():
        warnings.warn(f"no bias correction of {name!r}: {why}", MpqWarning, stacklevel=3)
    return with_added_biases(given.model, graph, means), means


def _with_ranges(spec: JobSpec, given: Given, graph: LayerGraph, cells: Cells) -> LayerGraph:
    """Return the graph with the static input ranges that any choice needs.

    A range is for the fewest bits that the layer's inputs may take.
    """
    static: set[str] = set()
    bits: dict[str, int] = {}
    layers = graph.by_name
    for unit, schemes in zip(graph.units, cells.schemes, strict=True):
        formats = [s.activations for s in schemes if not s.activations.is_native]
        if any(fmt.static for fmt in formats):
            static.update(unit.layers)
        for name in unit.layers if formats else ():
            reader = layers[name].source if layers[name].is_input else name
            bits[reader] = min(fmt.bits for fmt in formats)
    return with_input_ranges(
        given.model, graph, given.calibration, static, observer=spec.observer, bits=bits
    )


def _qualities(spec: JobSpec, given: Given) -> dict[str, Quality]:
    """Return what every candidate is measured by: the job's qualities, and those only limited."""
    limits = {text: Limit.parse(text) for text in spec.limits}
    for text, limit in limits.items():
        if limit.change and limit.metric in spec.quality.keys() | QUALITIES.keys():
            raise InvalidInputError(
                "limit",
                f"limit {text!r}: the quality {limit.metric!r} is a degradation from the "
                f"unquantized network already, write '{limit.metric} <= {limit.bound:g}'",
            )
    limited = {limit.metric: text for text, limit in limits.items()}
    for metric in limited.keys() - spec.quality.keys() - QUALITIES.keys():
        if spec.evaluate is None:
            error = unknown("metric", metric, {*spec.quality, *QUALITIES})
            raise InvalidInputError(
                "limit", f"limit {limited[metric]!r}: {error} (and what evaluate=... returns)"
            )
    named = {name: QUALITIES[name] for name in sorted(limited.keys() & QUALITIES.keys())}
    return {**named, **given.quality}


def _check_qualities(model: nn.Module, qualities: Mapping[str, Quality], batch: Batch) -> None:
    """Raise InvalidInputError for a quality that cannot be measured, before anything is scored."""
    if not qualities:
        return
    two = cut(batch, 0, 2)  # so that a mean over the batch is seen
    with evaluating(model), torch.no_grad():
        output = checked_call(model, two, "calibration batch 0")
    for name, found in degradations(qualities, output, output, two).items():
        if not torch.allclose(found, torch.zeros_like(found), atol=_ZERO):
            raise InvalidInputError(
                "quality",
                f"quality {name!r} of an output and itself is {float(found.abs().max()):.6g}: it "
                f"must be 0 for equal outputs and grow as they get worse (1 - similarity)",
            )
