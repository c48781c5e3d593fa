"""The KV caches of a language model as layers of their own, found by the names of projections.

What is cached is what the key or value projection gives. Keys are taken before rotary positions are
put in (and before a norm of keys, where there is one): that tensor is a module's output in every
network, the rotation keeps the length of each vector, and schemes that store keys before it
(KVQuant, Hooper et al. 2024) lose least. Each vector of one token and head has its own scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from mpq.core.attention import Attention
from mpq.core.errors import InvalidInputError
from mpq.core.layers import Layer, LayerGraph, Unit
from mpq.nn.shapes import attention_of, generates
from mpq.nn.weights import PROJECTIONS

_FUSED = ("c_attn", "qkv_proj", "query_key_value", "qkv", "Wqkv", "in_proj", "W_pack")
_FAMILIES = {torch.bfloat16: "bf16"}  # a server caches others in fp16
_ELEMENT_BYTES = 2
OTHERS = "kv_cache of other layers"


@dataclass(frozen=True, slots=True)
class Caches:
    """Caches that can be searched, what is cached beside them, and why that cannot be."""

    layers: tuple[Layer, ...]
    others: Layer | None
    notes: tuple[str, ...]


def caches_of(network: nn.Module, context: int, batch: int) -> Caches:
    """Return the caches of keys and values that `batch` sequences of `context` tokens fill.

    A cache is a matrix (batch * positions * kv_heads, head_dim); a layer with a window keeps no
    more positions than that. Caches of fused projections, and of networks whose projections are
    not one pair for each cached layer, are told and not searched. Raises InvalidInputError
    (`kv_cache`) for a network that generates no tokens or does not tell its attention.
    """
    if not generates(network):
        raise InvalidInputError(
            "kv_cache",
            f"{type(network).__name__} does not say that it generates tokens, so it keeps no "
            f"cache of keys and values: leave kv_cache out",
        )
    attention, notes = attention_of(network, context)
    if attention is None:
        raise InvalidInputError("kv_cache", f"the KV cache cannot be told: {'; '.join(notes)}")
    pairs = _pairs(network, attention)
    if len(pairs) == len(attention.windows):
        found = [
            _layer(network, name, projection, attention, min(context, window or context) * batch)
            for pair, window in zip(pairs, attention.windows, strict=True)
            for name, projection in pair.items()
        ]
        return Caches(tuple(found), None, tuple(notes))
    missing = attention.cached(context) * batch * attention.kv_heads * 2
    shape = (missing, attention.head_dim)
    return Caches((), _cache(OTHERS, "", shape, "fp16"), (*notes, _why(network, pairs, attention)))


def with_caches(graph: LayerGraph, caches: Caches, skipped: Sequence[str] = ()) -> LayerGraph:
    """Return the graph with every cache as a unit of its own, but for the skipped ones.

    A projection that is never called on the sample has no cache to search.
    """
    layers = graph.by_name
    order = {layer.name: layers[layer.source].order for layer in caches.layers}
    called = [la for la in caches.layers if layers[la.source].calls and la.name not in skipped]
    units = [Unit(name=la.name, layers=(la.name,), reason="KV cache") for la in called]
    apart = [replace(layer, order=order[layer.name]) for layer in caches.layers]
    others = [] if caches.others is None else [caches.others]
    return replace(graph, units=(*graph.units, *units), apart=(*graph.apart, *apart, *others))


def _pairs(network: nn.Module, attention: Attention) -> list[Mapping[str, str]]:
    """Return {cache: projection} of each module with projections of keys and of values."""
    width = attention.kv_heads * attention.head_dim
    found: list[Mapping[str, str]] = []
    for name, module in network.named_modules():
        pair: dict[str, str] = {}
        for leaf, names in PROJECTIONS.items():
            for child in names:
                projection = module._modules.get(child)
                if isinstance(projection, nn.Linear) and projection.out_features == width:
                    pair.setdefault(f"{name}.{leaf}".lstrip("."), f"{name}.{child}".lstrip("."))
        if len(pair) == len(PROJECTIONS):
            found.append(pair)
    return found


def _layer(
    network: nn.Module, name: str, projection: str, attention: Attention, positions: int
) -> Layer:
    shape = (positions * attention.kv_heads, attention.head_dim)
    dtype = network.get_submodule(projection)._parameters["weight"]
    assert dtype is not None
    return _cache(name, projection, shape, _FAMILIES.get(dtype.dtype, "fp16"))


def _cache(name: str, projection: str, shape: tuple[int, int], family: str) -> Layer:
    return Layer(
        name=name,
        kind="kv_cache",
        weight_shape=shape,
        weight_id=name,
        weight_bytes=shape[0] * shape[1] * _ELEMENT_BYTES,
        input_shape=(),
        output_shape=(),
        macs=0,
        calls=0,
        order=-1,
        native_family=family,
        source=projection or name,
    )


def _why(network: nn.Module, pairs: Sequence[object], attention: Attention) -> str:
    modules = dict(network.named_modules())
    fused = [name for name in modules if name.rpartition(".")[2] in _FUSED]
    if fused:
        found = f"{fused[0]!r} computes queries, keys and values in one"
    else:
        found = f"{len(pairs)} pairs of key and value projections of the width the config tells"
    return (
        f"the KV cache of {len(attention.windows)} layers is not searched: {found}; it counts as "
        f"it is"
    )
