"""The page that puts runs side by side."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse

from mpq.core.errors import InvalidInputError
from mpq.core.frontier import Frontier
from mpq.core.jobs import RunState
from mpq.dashboard.compare_view import (
    MOST_RUNS,
    CompareView,
    Shown,
    compare_view,
    frontiers_figure,
)
from mpq.dashboard.problems import problem_of
from mpq.dashboard.site import Site
from mpq.dashboard.templating import page
from mpq.dashboard.views import runs_view
from mpq.store.query import RunQuery
from mpq.store.store import Store

_OFFERED = 50  # of the newest runs


def routes(site: Site) -> APIRouter:
    """Return the page of several runs."""
    router = APIRouter(include_in_schema=False)

    @router.get("/compare")
    def compare(
        run: Annotated[list[str] | None, Query(max_length=50)] = None,
        cost: Annotated[str | None, Query(max_length=200)] = None,
        layers: Shown = "differing",
        at: Annotated[int, Query(alias="page", ge=1, le=10**9)] = 1,
    ) -> HTMLResponse:
        """Compare runs, or ask which where there are fewer than two."""
        refs = [text.strip() for text in run or () if text.strip()]
        if len(refs) < 2:
            told = "Choose at least one more run." if refs else ""
            return _ask(site.store, refs, told)
        if len(refs) > MOST_RUNS:
            return _ask(site.store, refs, f"At most {MOST_RUNS} runs fit side by side.", 422)
        try:
            view = compare_view(site.store, refs, layers, at)
        except InvalidInputError as error:
            return _ask(site.store, refs, str(error), problem_of(error).status_code)
        cost = cost if cost in view.costs else next(iter(view.costs), None)
        frontiers = {} if cost is None else stored(site.store, view, cost)
        figure = None if cost is None else frontiers_figure(view, frontiers, cost)
        return page("compare.html", view=view, cost=cost, figure=figure, shown=layers)

    return router


def stored(store: Store, view: CompareView, cost: str) -> dict[str, Frontier]:
    """Return the frontiers of one cost that were kept, by run."""
    found = {run.id: store.frontier(run.id, cost) for run in view.runs}
    return {run_id: frontier for run_id, frontier in found.items() if frontier is not None}


def _ask(store: Store, refs: list[str], told: str, status: int = 200) -> HTMLResponse:
    found = runs_view(store, RunQuery(state=RunState.SUCCEEDED), _OFFERED)
    offered = {run.id for run in found.runs}
    context: dict[str, Any] = {
        "found": found,
        "refs": refs,
        "others": [ref for ref in refs if ref not in offered],
        "told": told,
        "most": MOST_RUNS,
    }
    return page("compare_ask.html", status=status, **context)
