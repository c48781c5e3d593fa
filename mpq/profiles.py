"""Profiles of a job as its network runs them: their batches and traced shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from mpq.core.errors import InvalidInputError
from mpq.core.layers import LayerGraph
from mpq.core.profiles import Profile
from mpq.models import load_batches
from mpq.nn.batches import Batch, check_batches, checked_call
from mpq.nn.graph import build_graph
from mpq.nn.patch import evaluating
from mpq.nn.resized import resized


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A profile with its batch, and the layers as they run on it under the search's units."""

    graph: LayerGraph
    sample: Batch
    weight: float


def profile_batches(
    profiles: Mapping[str, Profile], sample: Callable[[], Batch]
) -> dict[str, Batch]:
    """Return the batch of each profile; `sample` is asked where one has none of its own.

    Raises InvalidInputError naming the profile.
    """
    found = {}
    for name, profile in profiles.items():
        what = f"the sample of profile {name!r}"
        batch = sample() if profile.sample is None else load_batches(profile.sample, what)
        try:
            (batch,) = check_batches("the sample", [batch])
            found[name] = resized(batch, samples=profile.batch, tokens=profile.tokens)
        except InvalidInputError as error:
            raise InvalidInputError(error.code, f"profile {name!r}: {error}") from None
    return found


def served_profiles(
    model: nn.Module,
    batches: Mapping[str, Batch],
    profiles: Mapping[str, Profile],
    graph: LayerGraph,
    skip: Sequence[str] = (),
) -> dict[str, Served]:
    """Trace the network on the batch of each profile; the units are those of `graph`.

    Raises InvalidInputError naming the profile where the network does not run, or where a
    searched layer is never called.
    """
    return {
        name: Served(
            graph=traced(name, model, batch, graph, skip),
            sample=batch,
            weight=profiles[name].weight,
        )
        for name, batch in batches.items()
    }


def traced(
    name: str, model: nn.Module, batch: Batch, graph: LayerGraph, skip: Sequence[str]
) -> LayerGraph:
    """Return the layers as they run on the batch of a profile, under the units of `graph`."""
    with evaluating(model), torch.no_grad():
        checked_call(model, batch, f"profile {name!r}", finite=False)
    try:
        found = build_graph(model, batch, skip=skip, groups="none", embeddings=True)
    except InvalidInputError as error:
        raise InvalidInputError(error.code, f"profile {name!r}: {error}") from None
    called = {layer.name for layer in found.layers if layer.calls}
    for unit in graph.without_apart.units:
        for layer in unit.layers:
            if layer not in called:
                raise InvalidInputError(
                    "profile",
                    f"profile {name!r}: layer {layer!r} is never called on its sample, so it has "
                    f"no time there: give another sample, or leave the layer out with "
                    f"skip=[{layer!r}]",
                )
    return replace(found, units=graph.units, unsearched=graph.unsearched, apart=graph.apart)


def with_ranges(served: LayerGraph, graph: LayerGraph) -> LayerGraph:
    """Return the layers of a profile with the calibrated input ranges of `graph`."""
    ranges = graph.input_ranges
    layers = (replace(layer, input_range=ranges.get(layer.name)) for layer in served.layers)
    return replace(served, layers=tuple(layers))
