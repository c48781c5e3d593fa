"""Which runs are wanted, in which order: filters and pages, compiled from what is known here.

Nothing that a user writes becomes SQL: names choose columns of this file, all else is bound.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from sqlalchemy import JSON, ColumnElement, Select, String, and_, cast, func, or_, select
from sqlalchemy import type_coerce as typed

from mpq.core.conditions import Condition, checked_name
from mpq.core.errors import InvalidInputError, unknown
from mpq.core.evaluation import CHOSEN
from mpq.core.jobs import RunState
from mpq.core.moments import moment
from mpq.store.models import EvaluationRow, JobRow, RunRow, SolutionRow, TagRow

NEWEST = "-created_at"
_HELD_OUT = "held_out"
_ESCAPE = "\\"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunQuery:
    """Runs with all of these properties; None and () mean any.

    `model`, `name`, `metric` and `owner` are exact, or patterns with "*" where case does not
    matter; `tag` and `where` (see `Condition`) may be several, all of which hold. `since` and
    `until` bound when the run was created: a moment, "2026-03-01", or "7d" ago. `budget` is part
    of a budget as it was written, blanks aside. `sort` is "created_at", "name", or a number of
    the chosen allocation as in `where`, "-" before it for the largest first; only runs that have
    the number are then listed. Raises InvalidInputError naming what is wrong.
    """

    model: str | None = None
    name: str | None = None
    metric: str | None = None
    state: RunState | str | Sequence[RunState | str] | None = None
    owner: str | None = None
    tag: str | Sequence[str] = ()
    since: str | datetime | None = None
    until: str | datetime | None = None
    budget: str | None = None
    where: str | Sequence[str] = ()
    sort: str = NEWEST

    def __post_init__(self) -> None:
        now = datetime.now(UTC)
        for part in ("model", "name", "metric", "owner", "budget", "sort"):
            value = getattr(self, part)
            if value is not None and (not isinstance(value, str) or "\0" in value):
                raise InvalidInputError("filter", f"{part} is a text, got {value!r}")
        for part in ("tag", "where"):
            several = _several(getattr(self, part))
            if not all(isinstance(text, str) and "\0" not in text for text in several):
                raise InvalidInputError("filter", f"{part} is texts, got {several!r}")
            object.__setattr__(self, part, several)
        for part in ("since", "until"):
            if (value := getattr(self, part)) is not None:
                object.__setattr__(self, part, moment(value, now))
        states = () if self.state is None else _several(self.state)
        object.__setattr__(self, "state", tuple(_state(text) for text in states) or None)
        for text in self.where:
            Condition.parse(text)
        checked_name(self.sort_name)

    @classmethod
    def of(cls, **wanted: Any) -> Self:
        """Make a query; raises InvalidInputError (`unknown_filter`) with the nearest known."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in wanted:
            if name not in known:
                raise unknown("filter", name, known)
        return cls(**wanted)

    @property
    def sort_name(self) -> str:
        """What is sorted by."""
        return self.sort.removeprefix("-")

    @property
    def names(self) -> tuple[str, ...]:
        """The numbers of the chosen allocation that it asks for, "divergence" among them."""
        names = [Condition.parse(text).name for text in self.where]
        if self.sort_name not in _COLUMNS:
            names.append(self.sort_name)
        return tuple(dict.fromkeys(names))

    def filters(self) -> list[ColumnElement[bool]]:
        """Return what a run has to meet."""
        found = [
            _matches(column, value)
            for column, value in (
                (RunRow.model, self.model),  # each of these columns has an index
                (RunRow.name, self.name),
                (RunRow.metric, self.metric),
            )
            if value is not None
        ]
        if self.state is not None:
            found.append(RunRow.state.in_([state.value for state in self.state]))  # type: ignore[union-attr]
        if isinstance(self.since, datetime):
            found.append(RunRow.created_at >= self.since)
        if isinstance(self.until, datetime):
            found.append(RunRow.created_at < self.until)
        if self.owner is not None:  # by the key of jobs, or the index of owners
            of_owner = _matches(JobRow.owner, self.owner)
            found.append(RunRow.id.in_(select(JobRow.run_id).where(of_owner)))
        tagged = [select(TagRow.run_id).where(TagRow.tag == tag) for tag in self.tag]
        found += [RunRow.id.in_(ids) for ids in tagged]  # by the index of tags
        if self.budget is not None:
            found.append(_has_budget(self.budget))
        for text in self.where:
            condition = Condition.parse(text)
            value = number(condition.name)
            is_upper = condition.relation == "<="
            found.append(value <= condition.bound if is_upper else value >= condition.bound)
        return found

    def ids(self) -> Select[str]:
        """Return the ids of all these runs as a query, in no order."""
        return select(RunRow.id).where(*self.filters())

    def page(self, limit: int | None, after: tuple[Any, str] | None) -> Select[Any]:
        """Return (id, sort key) of runs in order, from after a (sort key, id) on."""
        descending = self.sort.startswith("-")
        key = _COLUMNS.get(self.sort_name)
        wanted = self.filters()
        if key is None:
            key = number(self.sort_name)
            wanted.append(key.is_not(None))
        if after is not None:
            value, run_id = after
            beyond = key < value if descending else key > value
            wanted.append(or_(beyond, and_(key == value, RunRow.id > run_id)))
        order = key.desc() if descending else key.asc()
        query = select(RunRow.id, key.label("key")).where(*wanted)
        return query.order_by(order, RunRow.id).limit(limit)


# What may be sorted by beside numbers; both have an index.
_COLUMNS: dict[str, Any] = {"created_at": RunRow.created_at, "name": RunRow.name}


def number(name: str) -> ColumnElement[Any]:
    """Return a number of a run's chosen allocation, NULL where there is none.

    Numbers live in JSON, or are one of few of a run, so no index holds them; the unique indexes
    on (run_id, label) and (run_id, candidate, split) find the one row of each run that the other
    filters leave.
    """
    chosen = (SolutionRow.run_id == RunRow.id, SolutionRow.label == CHOSEN)
    measured = (
        EvaluationRow.run_id == RunRow.id,
        EvaluationRow.candidate == CHOSEN,
        EvaluationRow.split == _HELD_OUT,
    )
    if name == "divergence":
        return select(EvaluationRow.mean).where(*measured).scalar_subquery()
    if name == "predicted":
        return select(SolutionRow.score).where(*chosen).scalar_subquery()
    total = typed(SolutionRow.totals, JSON)[name].as_float()
    metric = typed(EvaluationRow.metrics, JSON)[name].as_float()
    return func.coalesce(
        select(total).where(*chosen).scalar_subquery(),
        select(metric).where(*measured).scalar_subquery(),
    )


def _matches(column: Any, text: str) -> ColumnElement[bool]:
    if "*" not in text:
        return column == text  # type: ignore[no-any-return]
    for sign in (_ESCAPE, "%", "_"):
        text = text.replace(sign, _ESCAPE + sign)
    pattern = func.lower(text.replace("*", "%"))
    return func.lower(column).like(pattern, escape=_ESCAPE)


def _has_budget(text: str) -> ColumnElement[bool]:
    # Budgets are part of the job's JSON and written in many ways: no index could help.
    written = json.dumps("".join(text.split()))[1:-1]
    budgets = cast(typed(RunRow.spec, JSON)["budgets"].as_string(), String)
    return func.lower(func.replace(budgets, " ", "")).contains(written.lower(), autoescape=True)


def _several(given: Any) -> tuple[Any, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _state(given: RunState | str) -> RunState:
    text = str(given).upper()
    if text not in RunState.__members__:
        raise unknown("state", given, RunState.__members__)
    return RunState[text]
