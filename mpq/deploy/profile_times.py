"""The profiles of a run on its deployed network: how long each takes, and what was predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from mpq.artifacts import restored
from mpq.core.deployment import ProfileTime
from mpq.core.errors import unknown
from mpq.core.formats import Scheme
from mpq.core.jobs import JobSpec
from mpq.core.latency import REST_INCLUDED
from mpq.core.layers import LayerGraph, LayerName
from mpq.core.live import is_live
from mpq.core.profiles import Profile, given_profiles
from mpq.deploy.network import FAITHFUL, relative
from mpq.deploy.target import Loaded, Target
from mpq.deploy.timing import network_case, time_networks
from mpq.models import load_batches
from mpq.nn.batches import Batch, call, cut, describe
from mpq.nn.patch import evaluating
from mpq.nn.quantizers import WeightQuantizer
from mpq.profiles import profile_batches
from mpq.store.store import Store

if TYPE_CHECKING:
    from mpq.result import SearchResult

_PASS = "pass profiles={name: Profile(sample=...)}"


def batches_of(
    store: Store,
    spec: JobSpec,
    given: Mapping[str, Profile] | None,
    sample: Batch,
    calibration: Sequence[Batch],
) -> tuple[dict[str, Batch], list[str]]:
    """Return the batches of a run's profiles, and a line for each that cannot be made again.

    `given` replaces profiles of the run whose samples were objects, `sample` the job's sample
    where that was one.
    """
    found: dict[str, Batch] = {}
    missing = []
    base = _job_sample(store, spec, sample, calibration)
    for name, profile in (spec.profiles | given_profiles(given)).items():
        if name not in spec.profiles:
            raise unknown("profile", name, spec.profiles)
        kept = profile.sample
        if is_live(kept):
            missing.append(f"{name} is not timed: its sample, {kept}, is not kept, {_PASS}")
        elif kept is None and base is None:
            missing.append(f"{name} is not timed: it was made of calibration batches, {_PASS}")
        else:
            whole = replace(profile, sample=restored(store, kept))
            found |= profile_batches({name: whole}, lambda: base)
    return found, missing


def _job_sample(
    store: Store, spec: JobSpec, sample: Batch, calibration: Sequence[Batch]
) -> Batch | None:
    if spec.sample is None:
        return cut(calibration[0], 0, 1) if calibration else None
    if is_live(spec.sample):
        return sample
    return load_batches(restored(store, spec.sample), "sample")


def predicted_s(result: SearchResult, cost: str, device: str, fp32_s: float) -> float | None:
    """Return what a table of times says of the whole chosen network.

    A table of the searched layers alone tells what they save of the fp32 network. A table that
    is modelled, or of another machine's or library's kernels, says nothing of this one.
    """
    table = result.problem.costs.get(cost)
    if table is None or not table.provenance.startswith(f"measured on {device}"):
        return None
    total = (result.solution.totals or {})[cost]
    whole = REST_INCLUDED in table.provenance
    return total if whole else fp32_s + total - table.baseline


@dataclass(frozen=True, slots=True, kw_only=True)
class InRuntime:
    """A deployed network: what it was made of, its file and its fp32 form in the runtime."""

    target: Target
    model: nn.Module
    graph: LayerGraph
    mixed: Loaded
    fp32: Loaded
    schemes: Mapping[LayerName, Scheme]
    quantizer: WeightQuantizer
    calibration: tuple[Batch, ...]
    stored: tuple[int, int]  # bytes of weights that a pass reads, mixed and fp32

    def runs(self, batch: Batch) -> bool:
        """Tell whether the file takes a batch of this shape and computes as the network does."""
        try:
            found = self.fp32.output(batch)
        except Exception:  # runtimes have kinds of their own
            return False
        with evaluating(self.model), torch.no_grad():
            return relative(found, call(self.model, batch).numpy()) <= FAITHFUL

    def of_shape(self, batch: Batch) -> tuple[Loaded, Loaded]:
        """Return the network exported anew for a shape: in its formats and in fp32."""
        network = self.target.export(self.model, self.graph, batch)
        return network.mixed(self.schemes, self.quantizer, self.calibration), network.fp32


def profile_times(
    result: SearchResult,
    deployed: InRuntime,
    batches: Mapping[str, Batch],
    *,
    seconds: float,
    seed: int,
) -> tuple[list[ProfileTime], list[str]]:
    """Time the network on the batch of each profile, `seconds` each; a line for what is not.

    A shape that the file does not run is timed in a network that is exported for it alone.
    """
    found, missing = [], []
    for name, batch in batches.items():
        in_file = deployed.runs(batch)
        try:
            pair = (deployed.mixed, deployed.fp32) if in_file else deployed.of_shape(batch)
        except Exception as error:  # whatever an exporter does: the file is right
            reason = " ".join(str(error).split()) or type(error).__name__
            missing.append(f"{name} is not timed: the file does not run it, and {reason}")
            continue
        shape = describe(batch)
        cases = [network_case(deployed.target, name, shape) for name in ("mixed", "fp32")]
        mixed, fp32 = time_networks(
            deployed.target,
            dict(zip(cases, pair, strict=True)),
            batch,
            deployed.stored,
            seconds=seconds,
            seed=seed,
        )
        found.append(
            ProfileTime(
                name=name,
                shape=shape,
                in_file=in_file,
                measured_s=mixed.median_s,
                low_s=mixed.low_s,
                high_s=mixed.high_s,
                fp32_s=fp32.median_s,
                fp32_low_s=fp32.low_s,
                fp32_high_s=fp32.high_s,
                predicted_s=predicted_s(result, name, fp32.device, fp32.median_s),
            )
        )
    return found, missing


def profile_of(batches: Mapping[str, Batch], shape: str) -> str | None:
    """Return the first profile of a shape, None where none has it."""
    return next((name for name, batch in batches.items() if describe(batch) == shape), None)
