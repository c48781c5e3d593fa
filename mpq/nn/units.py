"""Layers that must share a scheme: tied weights, fused projections, groups the user gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from mpq.core.errors import InvalidInputError
from mpq.core.layers import Layer, LayerName, Unit
from mpq.core.patterns import matching

# Siblings of these names that read the same tensor run as one kernel in the runtimes that
# serve transformers, so they need one format.
_FUSED = {
    "fused q/k/v": (
        ("q_proj", "k_proj", "v_proj"),
        ("query", "key", "value"),
        ("q", "k", "v"),
        ("to_q", "to_k", "to_v"),
        ("wq", "wk", "wv"),
        ("q_lin", "k_lin", "v_lin"),
    ),
    "fused gate/up": (("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"), ("gate", "up")),
}


def group_units(
    layers: Sequence[Layer],
    sources: Mapping[LayerName, int],
    groups: Literal["auto", "none"] | Sequence[Sequence[str]],
) -> tuple[Unit, ...]:
    """Return units that partition `layers`, in the order of their first layer.

    `sources[name]` identifies the tensor that a layer reads, -1 where it is not known (experts,
    whose siblings are taken to read the same). Tied layers always share a unit;
    "auto" adds fused projections; a list of lists of names or patterns adds those groups too
    (to "auto"), "none" adds nothing.
    """
    known = [layer.name for layer in layers]
    merged = _Partition(known)
    by_weight: dict[str, list[LayerName]] = {}
    for layer in layers:
        by_weight.setdefault(layer.weight_id, []).append(layer.name)
    for tied in by_weight.values():
        merged.join(tied, "tied weights")
    if groups != "none":
        for names, reason in fused_siblings(layers, sources):
            merged.join(names, reason)
    if not isinstance(groups, str):
        for patterns in groups:
            if isinstance(patterns, str):
                raise InvalidInputError(
                    "groups", f"groups is a list of lists of layer names, got {patterns!r} in it"
                )
            names = [n for p in patterns for n in matching("groups", p, known)]
            merged.join(list(dict.fromkeys(names)), "group given by the user")
    elif groups not in ("auto", "none"):
        raise InvalidInputError("groups", f"groups is 'auto', 'none' or lists, got {groups!r}")
    return merged.units()


def fused_siblings(
    layers: Sequence[Layer], sources: Mapping[LayerName, int]
) -> list[tuple[list[LayerName], str]]:
    """Return the projections that read the same tensor and run as one kernel, and what they are."""
    siblings: dict[str, dict[str, Layer]] = {}
    for layer in layers:
        parent, _, leaf = layer.name.rpartition(".")
        siblings.setdefault(parent, {})[leaf] = layer
    found = []
    for children in siblings.values():
        for reason, name_sets in _FUSED.items():
            for leaves in name_sets:
                readers: dict[int, list[LayerName]] = {}  # cross-attention: k and v only
                for leaf in leaves:
                    if leaf in children and children[leaf].kind in ("linear", "experts"):
                        name = children[leaf].name
                        readers.setdefault(sources[name], []).append(name)
                found += [(names, reason) for names in readers.values() if len(names) > 1]
    return found


class _Partition:
    """Disjoint sets of layers, each with the reasons that joined it."""

    def __init__(self, names: Sequence[LayerName]) -> None:
        self._sets = {name: [name] for name in names}
        self._reasons: dict[LayerName, list[str]] = {name: [] for name in names}
        self._order = {name: i for i, name in enumerate(names)}

    def join(self, names: Sequence[LayerName], reason: str) -> None:
        if len({id(self._sets[name]) for name in names}) < 2:
            return
        whole = sorted({m for n in names for m in self._sets[n]}, key=self._order.__getitem__)
        reasons = list(dict.fromkeys([r for n in whole for r in self._reasons[n]] + [reason]))
        for name in whole:
            self._sets[name] = whole
            self._reasons[name] = reasons

    def units(self) -> tuple[Unit, ...]:
        unique = {id(members): members for members in self._sets.values()}
        return tuple(
            Unit(
                name=unit_name(members),
                layers=tuple(members),
                reason=", ".join(self._reasons[members[0]]) or "single layer",
            )
            for members in unique.values()
        )


def unit_name(members: Sequence[LayerName]) -> str:
    """Return the name of a unit of some layers: "attn.{q,k,v}" for siblings."""
    if len(members) == 1:
        return members[0]
    parents = {name.rpartition(".")[0] for name in members}
    if len(parents) == 1 and (parent := parents.pop()):
        return f"{parent}.{{{','.join(name.rpartition('.')[2] for name in members)}}}"
    return f"{{{','.join(members)}}}"
