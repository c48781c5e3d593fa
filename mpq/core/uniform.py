"""Uniform choices: one scheme for all weights, one for all caches, one for all inputs apart."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mpq.core.formats import FP32, Scheme
from mpq.core.layers import UnitName
from mpq.core.tables import Cells, CostTable, Indices

_CACHES = ("k_cache", "v_cache")
_WEIGHTS, _INPUT, _CACHE = "weights", "input", "kv_cache"


def uniform_choices(cells: Cells) -> dict[Scheme | str, Indices]:
    """Return the choices that give one scheme to all units of a role that have a choice.

    Roles are weights, inputs that are searched apart and KV caches; every combination of their
    schemes is one choice. Units with a single scheme keep it; a scheme that some free unit of its
    role may not take is left out. Keys are schemes, texts where there are caches.
    """
    shared: dict[str, dict[Scheme, None]] = {}
    kinds, kind_of = _kinds(cells)
    for role, schemes in kinds:
        if len(schemes) > 1:
            known = shared.get(role, dict.fromkeys(schemes))
            shared[role] = {s: None for s in known if s in schemes}
    if not shared:
        return {}
    order = {scheme: i for i, scheme in enumerate(dict.fromkeys(s for _, k in kinds for s in k))}
    mixes: list[dict[str, Scheme]] = [{}]
    for role in (role for role in (_WEIGHTS, _INPUT, _CACHE) if role in shared):
        ordered = sorted(shared[role], key=order.__getitem__)
        mixes = [{**mix, role: scheme} for mix in mixes for scheme in ordered]
    found: dict[Scheme | str, Indices] = {}
    for mix in mixes:
        places = [0 if len(s) == 1 else s.index(mix[role]) for role, s in kinds]
        found[_named(mix)] = cells.offsets[:-1] + np.array(places, np.int64)[kind_of]
    return found


def uniform_choice(table: CostTable, scheme: Scheme) -> Indices:
    """Return the cells of one uniform scheme, with its activations where those are apart.

    A unit with one scheme keeps it, and one of which no choice changes this cost any. Raises
    InvalidInputError for another unit that may not take the scheme.
    """
    cells, found = table.cells, []
    kinds, kind_of = _kinds(cells)
    parts = {_WEIGHTS: scheme, _CACHE: scheme, _INPUT: Scheme(FP32, scheme.activations)}
    if any(role == _INPUT for role, _ in kinds):
        parts[_WEIGHTS] = Scheme(scheme.weights)
    for number, unit in enumerate(cells.units):
        start, stop = int(cells.offsets[number]), int(cells.offsets[number + 1])
        role, schemes = kinds[kind_of[number]]
        free = parts[role] not in schemes and np.ptp(table.values[start:stop]) == 0
        if len(schemes) == 1 or free:
            found.append(start)
        else:
            found.append(cells.index((unit, parts[role])))
    return np.array(found, np.int64)


def _named(mix: Mapping[str, Scheme]) -> Scheme | str:
    if _INPUT in mix:
        weights = mix.get(_WEIGHTS, mix[_INPUT]).weights
        known: Scheme | None = Scheme(weights, mix[_INPUT].activations)
    else:
        known = mix.get(_WEIGHTS)
    if _CACHE not in mix:
        assert known is not None
        return known
    cache = f"{_CACHE} {mix[_CACHE]}"
    return cache if known is None else f"{known} with {cache}"


def _kinds(cells: Cells) -> tuple[list[tuple[str, tuple[Scheme, ...]]], Indices]:
    """Return the different (role, schemes), and which of them each unit has."""
    if len(cells.kinds) == 1:  # of a million units no name is looked at
        role = _role(cells.units[0], cells.schemes[0])
        return [(role, cells.schemes[0])], np.zeros(len(cells.units), np.int64)
    numbers: dict[tuple[str, int], int] = {}
    kinds: list[tuple[str, tuple[Scheme, ...]]] = []
    of_unit = []
    for unit, schemes in zip(cells.units, cells.schemes, strict=True):
        role = _role(unit, schemes)
        number = numbers.setdefault((role, id(schemes)), len(kinds))
        if number == len(kinds):
            kinds.append((role, schemes))
        of_unit.append(number)
    return kinds, np.array(of_unit, np.int64)


def _role(unit: UnitName, schemes: tuple[Scheme, ...]) -> str:
    """Return the role of a unit by its name, which is that of its layers (see `Layer`)."""
    leaf = unit.rpartition(".")[2]
    if leaf in _CACHES:
        return _CACHE
    if leaf == _INPUT and all(scheme.weights == FP32 for scheme in schemes):
        return _INPUT
    return _WEIGHTS
