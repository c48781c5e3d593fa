"""The chosen network in a runtime: written, compared with what was searched, and timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mpq.core.deployment import Deployment
from mpq.core.errors import InvalidInputError, RunFailedError, unknown
from mpq.core.formats import Scheme
from mpq.core.latency import KernelLatency
from mpq.core.layers import LayerGraph, LayerName
from mpq.core.profiles import Profile
from mpq.deploy.marked import feeds
from mpq.deploy.network import OnnxNetwork, relative
from mpq.deploy.onnx_model import stored_bytes
from mpq.deploy.onnxruntime import Session, network_case, time_networks
from mpq.deploy.placed import Placed
from mpq.deploy.rounding import as_kernels
from mpq.deploy.served import Written, batches_of, predicted_s, profile_of, profile_times
from mpq.models import load_batches, load_model
from mpq.nn.batches import Batch, call, check_batches, cut, describe
from mpq.nn.patch import evaluating
from mpq.nn.quantizers import WeightQuantizer
from mpq.nn.weights import layer_module, weight_of
from mpq.report import check_writable

if TYPE_CHECKING:
    from mpq.result import SearchResult

TARGETS = ("onnxruntime",)
_COMPARED = 16  # batches of the sample's shape
_EXPLAINED = 1e-3  # relative; chance decides how a number in the middle of two codes is rounded
_LIVE = "<live "  # how a job tells of an object that was passed as it is


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
    if target not in TARGETS:
        raise unknown("target", target, TARGETS)
    check_writable(Path(path))
    spec = result.store.run(result.run_id).spec
    network = _network(result, model, calibration, sample)
    batches, missing = batches_of(spec, profiles, network.sample, network.calibration)
    schemes, quantizer = dict(result.allocation), WeightQuantizer(spec.clip)
    exported = OnnxNetwork.export(network.model, result.graph, network.sample)
    serialized, placed = exported.mixed(schemes, quantizer, network.calibration)
    session, whole = Session(serialized), Session(exported.fp32)
    differences = _differences(network, exported, session, placed, schemes, quantizer)
    path = Path(path)
    path.write_bytes(serialized)
    shape = describe(network.sample)
    stored = _read_bytes(result.graph, schemes), _read_bytes(result.graph, {})
    mixed, fp32 = time_networks(
        [session, whole],
        [network_case("mixed", shape), network_case("fp32", shape)],
        feeds(network.model, network.sample),
        stored,
        seconds=seconds,
        seed=spec.seed,
    )
    written = Written(
        exported=exported,
        mixed=session,
        fp32=whole,
        schemes=schemes,
        quantizer=quantizer,
        calibration=network.calibration,
        stored=stored,
    )
    times, untimed = profile_times(result, written, batches, seconds=seconds, seed=spec.seed)
    memory = (result.solution.totals or {}).get("memory")
    deployment = Deployment(
        target=target,
        path=str(path),
        file_bytes=path.stat().st_size,
        stored_bytes=stored_bytes(serialized),
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
        any_batch=exported.marked.any_batch,
        profiles=tuple(times),
        untimed=(*missing, *untimed),
    )
    result.store.put_deployment(result.run_id, deployment)
    return deployment


def _network(result: SearchResult, model: Any, calibration: Any, sample: Any) -> _Network:
    spec = result.store.run(result.run_id).spec
    source = _or_entry_point(model, spec.model)
    if source is None:
        raise _missing("model", spec.model)
    network = load_model(source)
    _check_searched(network, result.graph)
    found = load_batches(_or_entry_point(calibration, spec.calibration), "calibration")
    batches = () if found is None else check_batches("calibration", found)
    served = load_batches(_or_entry_point(sample, spec.sample), "sample")
    if served is None and spec.sample is not None:
        raise _missing("sample", spec.sample)
    if served is None and not batches:
        raise _missing("calibration", spec.calibration)
    return _Network(network, batches, cut(batches[0], 0, 1) if served is None else served)


def _or_entry_point(given: Any, kept: str | None) -> Any:
    return kept if given is None and kept is not None and not kept.startswith(_LIVE) else given


def _missing(what: str, kept: str) -> InvalidInputError:
    return InvalidInputError(
        what, f"the run's {what} was an object, {kept}, which is not kept: pass {what}=..."
    )


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


def _differences(
    network: _Network,
    exported: OnnxNetwork,
    session: Session,
    placed: Mapping[LayerName, Placed],
    schemes: Mapping[LayerName, Scheme],
    quantizer: WeightQuantizer,
) -> dict[str, Any]:
    """Compare the runtime's outputs with torch's, in every sense that a Deployment tells."""
    outputs: dict[str, list[npt.NDArray[np.float32]]] = {}
    for batch in network.compared():
        with evaluating(network.model), torch.no_grad():
            original = call(network.model, batch).numpy()
            with as_kernels(network.model, placed, quantizer):
                rounded = call(network.model, batch).numpy()
        found = {
            "runtime": session.output(feeds(network.model, batch)),
            "searched": exported.fake_quantized_output(schemes, quantizer, batch),
            "rounded": rounded,
            "original": original,
        }
        for name, output in found.items():
            outputs.setdefault(name, []).append(output)
    joined = {name: np.concatenate(parts) for name, parts in outputs.items()}
    unexplained = relative(joined["runtime"], joined["rounded"])
    rounding = relative(joined["rounded"], joined["searched"])
    quantization = relative(joined["searched"], joined["original"])
    # Another network is far off; this one by a value here and there that falls to the neighbouring
    # code of an 8-bit activation and spreads, which is a part of what quantizing them costs.
    if not unexplained <= rounding + quantization + _EXPLAINED:
        raise RunFailedError(
            "not_the_network",
            f"ONNX Runtime's outputs differ from those that the formats give by {unexplained:.2g}, "
            f"more than its kernels' own rounding ({rounding:.2g}) and quantizing ("
            f"{quantization:.2g}) explain",
        )
    return {
        "samples": len(joined["runtime"]),
        "difference": relative(joined["runtime"], joined["searched"]),
        "rounding": rounding,
        "unexplained": unexplained,
        "quantization": quantization,
    }


def _read_bytes(graph: LayerGraph, schemes: Mapping[LayerName, Scheme]) -> int:
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


def _predicted_s(
    result: SearchResult, shape: str, fp32: KernelLatency, profiles: Mapping[str, Batch]
) -> float | None:
    """Return what the search says of a sample of its own shape, or of the shape of a profile."""
    own = "latency" if shape == result.graph.sample else None
    has_profiles = bool(result.store.run(result.run_id).spec.profiles)
    cost = profile_of(profiles, shape) if has_profiles else own
    return None if cost is None else predicted_s(result, cost, fp32.device, fp32.median_s)
