"""The results of a run over HTTP: its network, tables, solutions and trade-offs."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query, Response

from mpq.core.errors import InvalidInputError
from mpq.dashboard.api_runs import PREFIX
from mpq.dashboard.files import FileSuffix, TableView, sent, told_table
from mpq.dashboard.problems import told
from mpq.dashboard.question import Question, asked_solution, solvable, trade_off
from mpq.dashboard.site import ResultOf, RunId, Site, asker
from mpq.dashboard.views_results import (
    FrontierView,
    SolutionView,
    SurfaceView,
    UnitsView,
    frontier_view,
    solution_view,
    solutions_view,
    surface_view,
    units_view,
)
from mpq.result import KEPT_POINTS, SearchResult
from mpq.run_tables import run_table

TableName = Literal["scores", "costs", "allocation", "evaluations"]
Cost = Annotated[str, Query(max_length=200)]


def routes(site: Site) -> APIRouter:
    """Return the routes of results."""
    router = APIRouter(
        prefix=f"{PREFIX}/runs/{{run}}", tags=["results"], responses=told(304, 409, 413, 429)
    )
    store = site.store

    @router.get("/units")
    def units(run_id: ResultOf) -> UnitsView:
        """Return the network: its layers, which of them share a scheme, what is not searched."""
        return units_view(store.graph(run_id))

    @router.get("/solutions")
    def solutions(
        run_id: ResultOf,
        label: Annotated[list[str], Query(max_length=20)] = [],  # noqa: B006
        allocations: bool = False,
    ) -> list[SolutionView]:
        """Return the chosen solution, the uniform ones, what was tried; by label where asked."""
        return solutions_view(store, run_id, label, allocations=allocations)

    @router.get("/frontier")
    def frontier(
        run_id: ResultOf,
        who: Annotated[str, Depends(asker)],
        cost: Cost = "memory",
        points: Annotated[int, Query(ge=1, le=100)] = KEPT_POINTS,
        allocations: bool = False,
    ) -> FrontierView:
        """Return the proven trade-off of a cost and the predicted loss."""
        found = store.frontier(run_id, cost) if points == KEPT_POINTS else None
        if found is None:
            site.solves.take(who)
            run = solvable(site.loaded.get(run_id), site.settings.solve_cells)
            found = site.solving.run(lambda: trade_off(run, cost, points))
        return frontier_view(found, store.graph(run_id) if allocations else None)

    @router.get("/surface")
    def surface(run_id: ResultOf, first: Cost = "memory", second: Cost = "latency") -> SurfaceView:
        """Return the best predicted loss at pairs of limits of two costs, where it was kept."""
        found = store.surface(run_id, (first, second))
        if found is None:
            raise InvalidInputError("not_stored", f"run {run_id} has no surface of these costs")
        return surface_view(found)

    @router.post("/solve")
    def solve_again(
        run_id: RunId, question: Question, who: Annotated[str, Depends(asker)]
    ) -> SolutionView:
        """Choose again for other budgets, pins and forbidden pairs.

        Where nothing fits, the status is "infeasible" and `infeasibility` says what would.
        """
        site.solves.take(who)
        run = solvable(site.loaded.get(run_id), site.settings.solve_cells)
        found = site.solving.run(lambda: asked_solution(run, question))
        return solution_view(found, "asked", run.graph)

    @router.get("/export/{target}", response_class=Response)
    def export(run_id: ResultOf, target: Annotated[str, Path(max_length=100)]) -> Response:
        """Return the chosen allocation as a file of another tool."""
        from mpq.export import export_text

        name, text = export_text(target, SearchResult(store, run_id).chosen)
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(text, media_type="application/octet-stream", headers=headers)

    @router.get("/{table}.{suffix}", response_class=Response)
    def table_file(run_id: ResultOf, table: TableName, suffix: FileSuffix) -> Response:
        """Return a table as a file."""
        return sent(run_table(store, run_id, table), suffix)

    @router.get("/{table}", response_model=TableView)
    def table(run_id: ResultOf, table: Annotated[TableName, Path()]) -> Response:
        """Return the scores, costs, allocation or evaluations, column by column."""
        return told_table(run_table(store, run_id, table))

    return router
