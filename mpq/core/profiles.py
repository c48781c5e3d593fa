"""Latency profiles: the shapes a network is served in, each with a latency of its own."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np

from mpq.core.budgets import COST_UNITS
from mpq.core.errors import InvalidInputError, unknown
from mpq.core.joint import JointCosts
from mpq.core.latency import REST_INCLUDED
from mpq.core.live import live_text
from mpq.core.tables import Cells, CostTable

_NAME = re.compile(r"[\w-]+")  # as a budget is written with
_TAKEN = (*COST_UNITS, "minimised")  # names of costs
_IN_SOME = ", in some profiles "  # with the rest of the network


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One shape that a network is served in.

    `sample` is a batch, or the entry point of a function that returns one (None: the job's
    sample). `batch` is how many samples it has and `tokens` how many positions its integer
    tensors have: both cut, or repeat from the beginning, what is there. `weight` is the share of
    the profile in the cost "latency": how often it runs beside the others.
    Raises InvalidInputError (`profile`) for a number out of its range.
    """

    sample: Any = None
    batch: int | None = None
    tokens: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("batch", "tokens"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise InvalidInputError(
                    "profile", f"{name}: a whole number from 1 on, got {value!r}"
                )
            object.__setattr__(self, name, int(value))
        weight = self.weight
        number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not number or not 0 < weight < math.inf:
            raise InvalidInputError("profile", f"weight: a positive number, got {weight!r}")
        object.__setattr__(self, "weight", float(weight))


_KEYS = tuple(field.name for field in dataclasses.fields(Profile))


def given_profiles(asked: object) -> dict[str, Profile]:
    """Return profiles by name; raises InvalidInputError (`profiles`) for anything else.

    Each is a Profile, or a mapping with its keys in which the sample is an entry point.
    """
    if asked is None:
        return {}
    if not isinstance(asked, Mapping):
        raise InvalidInputError(
            "profiles", f"profiles is {{name: Profile}}, such as {{'decode': ...}}, got {asked!r}"
        )
    for name in asked:
        _check_name(name)
    return {name: _profile(name, one) for name, one in asked.items()}


def as_texts(profiles: Mapping[str, Profile]) -> dict[str, Profile]:
    """Return profiles as a job keeps them: a batch is only named, <live dict>."""
    return {
        name: one
        if one.sample is None or isinstance(one.sample, str)
        else replace(one, sample=live_text(one.sample))
        for name, one in profiles.items()
    }


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidInputError(
            "profiles",
            f"a profile's name is of letters, digits, - and _, to be used in budgets, got {name!r}",
        )
    if name in _TAKEN:
        raise InvalidInputError(
            "profiles",
            f"a profile cannot have the name of a cost, {name!r}: call it for example "
            f"'prefill' or 'batch8'",
        )


def _profile(name: str, one: object) -> Profile:
    try:
        if isinstance(one, Profile):
            return one
        if not isinstance(one, Mapping):
            raise InvalidInputError(
                "profile", f"a Profile, or a table of {', '.join(_KEYS)}, got {one!r}"
            )
        for key in one:
            if key not in _KEYS:
                raise unknown("profile key", key, _KEYS)
        sample = one.get("sample")
        if sample is not None and not isinstance(sample, str):
            raise InvalidInputError(
                "profile", f"sample: an entry point, 'package.module:name', got {sample!r}"
            )
        return Profile(**one)
    except InvalidInputError as error:
        raise InvalidInputError(error.code, f"profile {name!r}: {error}") from None


def weighted_latency(
    tables: Mapping[str, CostTable], weights: Mapping[str, float], name: str = "latency"
) -> CostTable:
    """Return the mean of the profiles' tables: sum_p w_p t_p / sum_p w_p of all that they hold.

    Its limits are the means of the limits: the errors of one machine's kernels move together.
    """
    total = math.fsum(weights[profile] for profile in tables)
    parts = [(weights[profile] / total, table) for profile, table in tables.items()]
    first = parts[0][1]

    def mean(part: str) -> Any:
        return sum(np.multiply(share, getattr(table, part)) for share, table in parts)

    return CostTable(
        name=name,
        unit=first.unit,
        cells=first.cells,
        values=mean("values"),
        low=mean("low"),
        high=mean("high"),
        fixed=float(mean("fixed")),
        baseline=float(mean("baseline")),
        weights=first.weights,
        provenance=_provenance([table for _, table in parts]),
        joint=_joint(first.cells, parts),
    )


def _joint(cells: Cells, parts: Sequence[tuple[float, CostTable]]) -> JointCosts | None:
    """Return the mean of the tables' joint terms, None where none has any."""
    terms = [(share, table.joint) for share, table in parts if table.joint is not None]
    if not terms:
        return None
    return JointCosts(
        cells=cells,
        first=np.concatenate([joint.first for _, joint in terms]),
        second=np.concatenate([joint.second for _, joint in terms]),
        values=np.concatenate([share * joint.values for share, joint in terms]),
    )


def _provenance(tables: list[CostTable]) -> str:
    """Return that of all tables; where the rest of the network is in some only, this is said."""
    found = [table.provenance.partition(f", {REST_INCLUDED}") for table in tables]
    bare = " and ".join(sorted({of_layers for of_layers, _, _ in found}))
    if not any(rest for _, rest, _ in found):
        return bare
    corrected = list(dict.fromkeys(told for _, _, told in found))
    told = corrected[0] if len(corrected) == 1 else ", each corrected by mixes of its own"
    whole = all(rest for _, rest, _ in found)
    return f"{bare}, {REST_INCLUDED}{told}" if whole else f"{bare}{_IN_SOME}{REST_INCLUDED}"
