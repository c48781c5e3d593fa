"""The further pages of one run: layers, sensitivity, pairs, checks, log, export."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from mpq.dashboard.checks_view import checks_view, losses_figure
from mpq.dashboard.export_view import job_json, python_again, targets
from mpq.dashboard.loaded import LoadedRun
from mpq.dashboard.pages_run import TABS, loaded_or_none
from mpq.dashboard.pairs_view import map_of, pairs_of
from mpq.dashboard.run_layers_view import layers_view
from mpq.dashboard.sensitivity_view import heat_map, sensitivity_view
from mpq.dashboard.site import Site
from mpq.dashboard.templating import page, result_page
from mpq.dashboard.views import last_lines, log_view, run_detail
from mpq.result import SearchResult

_LINES = 500


def routes(site: Site) -> APIRouter:
    """Return the pages."""
    router = APIRouter(include_in_schema=False)

    @router.get("/runs/{run_id}/layers")
    def layers(request: Request, run_id: str) -> HTMLResponse:
        """List the layers, and why others were not searched."""
        return _with_result(
            site, request, run_id, "/layers", lambda run: {"view": layers_view(run)}
        )

    @router.get("/runs/{run_id}/sensitivity")
    def sensitivity(
        request: Request, run_id: str, metric: Annotated[str | None, Query(max_length=100)] = None
    ) -> HTMLResponse:
        """Draw the loss of each unit in each scheme."""

        def shown(run: LoadedRun) -> dict[str, Any]:
            view = sensitivity_view(site.store, run, metric)
            return {"view": view, "figure": heat_map(view)}

        return _with_result(site, request, run_id, "/sensitivity", shown)

    @router.get("/runs/{run_id}/pairs")
    def pairs(request: Request, run_id: str) -> HTMLResponse:
        """Draw which units reinforce or cancel each other."""

        def shown(run: LoadedRun) -> dict[str, Any]:
            found = pairs_of(run)
            return {"found": found, "figure": None if found is None else map_of(found)}

        return _with_result(site, request, run_id, "/pairs", shown)

    @router.get("/runs/{run_id}/checks")
    def checks(request: Request, run_id: str) -> HTMLResponse:
        """Set predictions beside measurements."""

        def shown(run: LoadedRun) -> dict[str, Any]:
            view = checks_view(run, site.store.deployments(run_id))
            return {"view": view, "figure": losses_figure(run)}

        return _with_result(site, request, run_id, "/checks", shown)

    @router.get("/runs/{run_id}/log")
    def log(
        run_id: str, after: Annotated[int | None, Query(ge=0, lt=2**62)] = None
    ) -> HTMLResponse:
        """Show the log, which grows while the run goes on: its end unless asked otherwise."""
        if after is None:
            end = last_lines(site.store, run_id, _LINES)
            after = end[0].id - 1 if len(end) == _LINES else 0
        detail, lines = run_detail(site.store, run_id), log_view(site.store, run_id, after, _LINES)
        return page("run_log.html", detail=detail, tabs=TABS, tab="/log", log=lines, after=after)

    @router.get("/runs/{run_id}/export")
    def export(request: Request, run_id: str) -> HTMLResponse:
        """Offer the files of other tools."""

        def shown(run: LoadedRun) -> dict[str, Any]:
            return {
                "targets": targets(SearchResult(site.store, run_id)),
                "job": job_json(run.spec),
                "python": python_again(run_id, run.spec.budgets),
            }

        return _with_result(site, request, run_id, "/export", shown)

    return router


def _with_result(site: Site, request: Request, run_id: str, tab: str, shown: Any) -> HTMLResponse:
    """Return a page about the result of a run, or what the run is waiting for."""
    detail = run_detail(site.store, run_id)
    run = loaded_or_none(site, run_id) if detail.run.has_ended else None
    context: dict[str, Any] = {"detail": detail, "tabs": TABS, "tab": tab}
    if run is None or run.chosen is None or run.chosen.allocation is None:
        return page("run_unfinished.html", **context, log=last_lines(site.store, run_id))
    return result_page(request, f"run_{tab[1:]}.html", **context, run=run, **shown(run))
