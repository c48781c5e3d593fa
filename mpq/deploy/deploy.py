"""The chosen network in a runtime: written, compared with what was searched, and timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from mpq.applied import check_prepared
from mpq.artifacts import restored
from mpq.core.deployment import Deployment
from mpq.core.errors import InvalidInputError, RunFailedError
from mpq.core.formats import Scheme, native_scheme
from mpq.core.latency import KernelLatency
from mpq.core.layers import LayerGraph, LayerName
from mpq.core.live import is_live
from mpq.core.profiles import Profile
from mpq.core.synthetic import is_synthetic
from mpq.data import Data, load_data
from mpq.deploy.network import relative
from mpq.deploy.profile_times import InRuntime, batches_of, predicted_s, profile_of, profile_times
from mpq.deploy.target import Array, Target, Written, get_target
from mpq.deploy.timing import network_case, time_networks
from mpq.deploy.whole import read_bytes
from mpq.models import load_batches, load_model
from mpq.nn.batches import Batch, call, cut, describe
from mpq.nn.patch import evaluating, quantized
from mpq.nn.weights import layer_module, weight_of
from mpq.preparing import prepared
from mpq.report import check_writable

if TYPE_CHECKING:
    from mpq.result import SearchResult

_COMPARED = 16  # batches of the sample's shape
_EXPLAINED = 1e-3  # relative; chance decides how a number in the middle of two codes is rounded


@dataclass(frozen=True, slots=True)
class _Network:
    """What is deployed: the searched network, its calibration batches and the timed one."""

    model: nn.Module
    calibration: tuple[Batch, ...]
    sample: Batch

    def compared(self) -> list[Batch]:
        """Return the sample, and single calibration samples of its shape where there are some."""
        shape = describe(self.sample)
        singles = [cut(b, i, i + 1) for b in self.calibration[:1] for i in range(_COMPARED)]
        return [self.sample, *(b for b in singles if describe(b) == shape)][:_COMPARED]


def deploy(
    result: SearchResult,
    target: str,
    path: str | Path,
    *,
    model: nn.Module | str | None = None,
    calibration: Any = None,
    sample: Batch | str | None = None,
    profiles: Mapping[str, Profile] | None = None,
    seconds: float = 10.0,
) -> Deployment:
    """Write the chosen network for a runtime, compare, time and keep the record with the run.

    What is not given comes from the run's entry points. `calibration` sets the output ranges of
    integer convolutions; `sample` is the batch that is timed, `profiles` replaces profiles of the
    run whose samples were objects; timing each takes up to `seconds`. Raises InvalidInputError
    naming what is missing, another model than the searched one, or a layer without a kernel;
    RunFailedError where the runtime computes something else than the formats ask for.
    """
    runtime = get_target(target)
    check_writable(Path(path))
    spec = result.store.run(result.run_id).spec
    if spec.corrections:
        raise InvalidInputError(
            "corrections",
            f"no runtime's file holds the corrections {list(spec.corrections)} of the run: deploy "
            f"a search without them, or result.apply(model) has them",
        )
    network = _network(result, model, calibration, sample)
    batches, missing = batches_of(result.store, spec, profiles, network.sample, network.calibration)
    graph = result.graph.without_apart
    schemes, quantizer = _schemes(result, target), result.quantizer
    exported = runtime.export(network.model, graph, network.sample)
    written = exported.mixed(schemes, quantizer, network.calibration)
    searched = partial(quantized, schemes=schemes, quantizer=quantizer)
    outputs = _outputs(network, written, partial(searched, limits=result.graph.input_ranges))
    differences = _differences(outputs, runtime)
    path = Path(path)
    path.write_bytes(written.serialized)
    shape = describe(network.sample)
    stored = read_bytes(graph, schemes), read_bytes(graph, {})
    mixed, fp32 = time_networks(
        runtime,
        {
            network_case(runtime, "mixed", shape): written,
            network_case(runtime, "fp32", shape): exported.fp32,
        },
        network.sample,
        stored,
        seconds=seconds,
        seed=spec.seed,
    )
    deployed = InRuntime(
        target=runtime,
        model=network.model,
        graph=graph,
        mixed=written,
        fp32=exported.fp32,
        schemes=schemes,
        quantizer=quantizer,
        calibration=network.calibration,
        stored=stored,
    )
    times, untimed = profile_times(result, deployed, batches, seconds=seconds, seed=spec.seed)
    memory = (result.solution.totals or {}).get("memory")
    deployment = Deployment(
        target=target,
        path=str(path),
        file_bytes=path.stat().st_size,
        stored_bytes=written.stored_bytes,
        predicted_bytes=None if memory is None else round(memory),
        **differences,
        device=mixed.device,
        measured_s=mixed.median_s,
        low_s=mixed.low_s,
        high_s=mixed.high_s,
        fp32_s=fp32.median_s,
        fp32_low_s=fp32.low_s,
        fp32_high_s=fp32.high_s,
        predicted_s=_predicted_s(result, shape, fp32, batches),
        any_batch=exported.any_batch,
        profiles=tuple(times),
        untimed=(*missing, *untimed),
    )
    result.store.put_deployment(result.run_id, deployment)
    return deployment


def _network(result: SearchResult, model: Any, calibration: Any, sample: Any) -> _Network:
    spec = result.store.run(result.run_id).spec
    source = _or_kept(result, model, spec.model)
    if source is None:
        raise _missing("model", spec.model)
    network = load_model(source)
    _check_searched(network, result.graph.without_apart)
    served = load_batches(_or_kept(result, sample, spec.sample), "sample")
    found = _or_kept(result, calibration, spec.calibration)
    data = Data()
    if found is not None and not (is_synthetic(found) and served is None and spec.sample):
        data = load_data(found, "calibration", network, served, seed=spec.seed)
    batches = data.batches
    if spec.transforms and model is None and batches:
        network = prepared(network, batches, spec.transforms, seed=spec.seed)
    check_prepared(spec, network)
    if served is None and spec.sample is not None:
        raise _missing("sample", spec.sample)
    if served is None and not batches:
        raise _missing("calibration", spec.calibration)
    return _Network(network, batches, cut(batches[0], 0, 1) if served is None else served)


def _or_kept(result: SearchResult, given: Any, kept: str | None) -> Any:
    if given is not None or kept is None or is_live(kept):
        return given
    return restored(result.store, kept)


def _missing(what: str, kept: str) -> InvalidInputError:
    return InvalidInputError(
        what, f"the run's {what} was an object, {kept}, which is not kept: pass {what}=..."
    )


def _schemes(result: SearchResult, target: str) -> dict[LayerName, Scheme]:
    """Return the schemes of layers; raises InvalidInputError where a KV cache is quantized."""
    layers, found = result.graph.by_name, {}
    for name, scheme in result.allocation.items():
        if not layers[name].is_cache:
            found[name] = scheme
        elif not scheme.is_native:
            raise InvalidInputError(
                "deploy",
                f"cache {name!r} is {scheme}: target {target!r} runs a network that keeps no KV "
                f"cache; pin caches to {native_scheme(layers[name].native_family)}",
            )
    return found


def _check_searched(model: nn.Module, graph: LayerGraph) -> None:
    """Raise InvalidInputError where a layer is missing or has a weight of another shape."""
    for unit in graph.units:
        for name in unit.layers:
            layer = graph.by_name[name]
            shape = tuple(weight_of(layer_module(model, name)).shape)
            if shape != layer.weight_shape:
                raise InvalidInputError(
                    "other_model",
                    f"layer {name!r} has a weight of {list(shape)}, {list(layer.weight_shape)} was "
                    f"searched: give the model that was searched",
                )


def _outputs(
    network: _Network,
    written: Written,
    searched: Callable[[nn.Module], AbstractContextManager[nn.Module]],
) -> dict[str, Array]:
    """Return what the runtime computes, and torch in every sense that a Deployment tells."""
    model = network.model
    outputs: dict[str, list[Array]] = {}
    for batch in network.compared():
        found = {"runtime": written.output(batch)}
        with evaluating(model), torch.no_grad():
            found["original"] = call(model, batch).numpy()
            with written.as_kernels():
                found["rounded"] = call(model, batch).numpy()
            with searched(model):
                found["searched"] = call(model, batch).numpy()
        for name, output in found.items():
            outputs.setdefault(name, []).append(output)
    return {name: np.concatenate(parts) for name, parts in outputs.items()}


def _differences(outputs: Mapping[str, Array], runtime: Target) -> dict[str, Any]:
    unexplained = relative(outputs["runtime"], outputs["rounded"])
    rounding = relative(outputs["rounded"], outputs["searched"])
    quantization = relative(outputs["searched"], outputs["original"])
    # Another network is far off; this one by a value here and there that falls to the neighbouring
    # code of an 8-bit activation and spreads, which is a part of what quantizing them costs.
    if not unexplained <= rounding + quantization + _EXPLAINED:
        raise RunFailedError(
            "not_the_network",
            f"{runtime.title}'s outputs differ from those that the formats give by "
            f"{unexplained:.2g}, more than its kernels' own rounding ({rounding:.2g}) and "
            f"quantizing ({quantization:.2g}) explain",
        )
    return {
        "samples": len(outputs["runtime"]),
        "difference": relative(outputs["runtime"], outputs["searched"]),
        "rounding": rounding,
        "unexplained": unexplained,
        "quantization": quantization,
    }


def _predicted_s(
    result: SearchResult, shape: str, fp32: KernelLatency, profiles: Mapping[str, Batch]
) -> float | None:
    """Return what the search says of a sample of its own shape, or of the shape of a profile."""
    own = "latency" if shape == result.graph.sample else None
    has_profiles = bool(result.store.run(result.run_id).spec.profiles)
    cost = profile_of(profiles, shape) if has_profiles else own
    return None if cost is None else predicted_s(result, cost, fp32.device, fp32.median_s)
