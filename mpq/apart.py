"""What a job searches beside weights: KV caches, and activations apart from weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from hw_cost_models.kv_cache import cached_bytes
from mpq.core.errors import InvalidInputError, MpqWarning
from mpq.core.formats import FP32, Scheme, native_scheme, parse_format, parse_scheme
from mpq.core.jobs import JobSpec
from mpq.core.layers import Layer, LayerGraph
from mpq.core.patterns import matching
from mpq.nn.batches import Batch
from mpq.nn.caches import Caches, caches_of, with_caches
from mpq.residency import tokens_of

_ACTIVATIONS = ("fp32", "int8", "int6", "int4")
_GROUP = 32  # of 4-bit caches, at most: what cache kernels of llama.cpp have
_TIMED = ("latency", "energy", "luts")  # costs of one kernel, not a product of bits


def kv_caches(spec: JobSpec, model: nn.Module, sample: Batch) -> Caches | None:
    """Return the caches of the context and batch of a job, else of the sample; None: not asked."""
    if not spec.kv_cache:
        return None
    asked = spec.kv_cache if isinstance(spec.kv_cache, dict) else {}
    batch, context = tokens_of(model, sample) if len(asked) < 2 else (0, 0)
    return caches_of(model, asked.get("context", context), asked.get("batch", batch))


def without_caches(skip: Sequence[str], caches: Caches | None, model: nn.Module) -> list[str]:
    """Return the patterns to leave layers out by: those that name more than caches."""
    names = [layer.name for layer in caches.layers] if caches else []
    modules = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    return [p for p in skip if not _matched(p, names) or _matched(p, modules)]


def graph_with_caches(graph: LayerGraph, caches: Caches | None, skip: Sequence[str]) -> LayerGraph:
    """Return the graph with a job's caches; what is not searched of them is told."""
    if caches is None:
        return graph
    for note in caches.notes:
        warnings.warn(note, MpqWarning, stacklevel=2)
    names = [layer.name for layer in caches.layers]
    return with_caches(graph, caches, [name for p in skip for name in _matched(p, names)])


def schemes_apart(spec: JobSpec, layer: Layer) -> tuple[Scheme, ...]:
    """Return what an input or a cache may take.

    Raises InvalidInputError for a format that no cache can have.
    """
    if layer.is_input:
        texts = spec.activation_schemes or _ACTIVATIONS
        return tuple(dict.fromkeys(Scheme(FP32, parse_format(t, "activations")) for t in texts))
    if spec.kv_schemes is None:
        head_dim = layer.weight_shape[1]
        group = max(size for size in range(1, _GROUP + 1) if head_dim % size == 0)
        line = [native_scheme(layer.native_family), *map(parse_scheme, ("int8", f"int4g{group}"))]
        return tuple(line)
    schemes = tuple(dict.fromkeys(map(parse_scheme, spec.kv_schemes)))
    for scheme in schemes:
        cached_bytes(layer, scheme.weights)
    return schemes


def weights_alone(schemes: Sequence[Scheme], asked: bool) -> list[Scheme]:
    """Return schemes of weights whose activations are searched apart.

    Raises InvalidInputError where the user asked for one that fixes activations.
    """
    fixing = [scheme for scheme in schemes if not scheme.activations.is_native]
    if asked and fixing:
        raise InvalidInputError(
            "schemes",
            f"with activations='apart' schemes are of weights alone, got {fixing[0]}: write "
            f"'{Scheme(fixing[0].weights)}', and the others in activation_schemes",
        )
    return list(dict.fromkeys(Scheme(scheme.weights) for scheme in schemes))


def check_costs(spec: JobSpec, costs: Sequence[str], times: Sequence[str]) -> None:
    """Raise InvalidInputError for a cost that is of a kernel, where its two formats are apart."""
    if spec.activations != "apart":
        return
    for cost in costs:
        if cost in _TIMED or cost in times:
            raise InvalidInputError(
                "cost",
                f"{cost} is that of a kernel, which needs the formats of weights and activations "
                f"together: leave activations='apart' out, or limit memory or bops",
            )
    if spec.hardware.partition(":")[0] not in ("local", "device"):
        raise InvalidInputError(
            "hardware",
            f"hardware {spec.hardware!r} always times kernels, which need the formats of weights "
            f"and activations together: leave activations='apart' out, or use hardware='local'",
        )


def _matched(pattern: str, names: Sequence[str]) -> list[str]:
    try:
        return list(matching("skip", pattern, names))
    except InvalidInputError:
        return []
