"""A finished search's network, computed anew on a model that is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from mpq.artifacts import restored
from mpq.core.called import parse_called
from mpq.core.errors import InvalidInputError
from mpq.core.formats import Scheme
from mpq.core.jobs import JobSpec
from mpq.core.layers import LayerGraph, LayerName
from mpq.core.live import is_live
from mpq.data import load_data
from mpq.models import load_batches
from mpq.nn.batch_norm import reestimated
from mpq.nn.batches import Batch
from mpq.nn.input_means import input_means
from mpq.nn.patch import quantized
from mpq.nn.quantizers import WeightQuantizer
from mpq.nn.transforms import TRANSFORMS, reports_of
from mpq.store.store import Store


@contextmanager
def applied(
    spec: JobSpec,
    graph: LayerGraph,
    schemes: Mapping[LayerName, Scheme],
    quantizer: WeightQuantizer,
    store: Store,
    model: nn.Module,
    calibration: Any = None,
) -> Iterator[nn.Module]:
    """Run `model` as layers' schemes and the job's corrections make it; back as it was after.

    Corrections need the calibration batches: those given, or those of the job. Raises
    InvalidInputError (`transforms`) for a network that is not the prepared one, (`corrections`)
    where calibration batches are missing.
    """
    check_prepared(spec, model)
    batches = _batches(spec, store, model, calibration) if spec.corrections else ()
    means = input_means(model, graph, batches)[0] if "bias" in spec.corrections else {}
    limits = graph.input_ranges
    with quantized(model, schemes, quantizer=quantizer, limits=limits, means=means):
        if "batch_norm" not in spec.corrections:
            yield model
            return
        with reestimated(model, batches):
            yield model


def check_prepared(spec: JobSpec, model: nn.Module) -> None:
    """Raise InvalidInputError (`transforms`) where a model was not prepared as the job's was."""
    asked = [parse_called("transform", text, TRANSFORMS)[0] for text in spec.transforms]
    done = [parse_called("transform", r.transform, TRANSFORMS)[0] for r in reports_of(model)]
    if asked and done[-len(asked) :] != asked:
        raise InvalidInputError(
            "transforms",
            f"the run searched the network after transforms {list(spec.transforms)}: give "
            f"mpq.prepared(model, calibration, {list(spec.transforms)}, seed={spec.seed})",
        )


def _batches(spec: JobSpec, store: Store, model: nn.Module, calibration: Any) -> tuple[Batch, ...]:
    if calibration is None and not is_live(spec.calibration):
        calibration = restored(store, spec.calibration)
    if calibration is None:
        raise InvalidInputError(
            "corrections",
            f"corrections {list(spec.corrections)} need the calibration batches, which were an "
            f"object that is not kept: pass calibration=...",
        )
    kept = None if spec.sample is None or is_live(spec.sample) else restored(store, spec.sample)
    sample = load_batches(kept, "sample")
    return load_data(calibration, "calibration", model, sample, seed=spec.seed).batches
