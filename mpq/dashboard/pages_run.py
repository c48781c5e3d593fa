"""The pages of one run: the overview with its sliders."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from mpq.core.errors import InvalidInputError
from mpq.core.problem import Solution
from mpq.dashboard.loaded import LoadedRun
from mpq.dashboard.plain import finite_json
from mpq.dashboard.question import solvable
from mpq.dashboard.run_view import overview
from mpq.dashboard.site import Site, asker
from mpq.dashboard.templating import page, result_page
from mpq.dashboard.views import last_lines, run_detail
from mpq.dashboard.what_if import Asked, answer, proven_answer, what_if_view

TABS = (
    ("", "Overview"),
    ("/layers", "Layers"),
    ("/sensitivity", "Sensitivity"),
    ("/pairs", "Pairs"),
    ("/checks", "Predicted against measured"),
    ("/log", "Log"),
    ("/export", "Export"),
)
Texts = Annotated[list[str] | None, Query(max_length=64)]
Names = Annotated[list[str] | None, Query(max_length=10_000)]
Risk = Annotated[float | None, Query(ge=0.5, lt=1)]


def routes(site: Site) -> APIRouter:
    """Return the overview of runs and what its sliders ask."""
    router = APIRouter(include_in_schema=False)

    @router.get("/runs/{run_id}")
    def show(
        request: Request,
        run_id: str,
        who: Annotated[str, Depends(asker)],
        budget: Texts = None,
        pin: Names = None,
        risk: Risk = None,
    ) -> HTMLResponse:
        """Show a run, at the conditions of the URL where it has any."""
        detail = run_detail(site.store, run_id)
        context: dict[str, Any] = {"detail": detail, "tabs": TABS, "tab": ""}
        # Of a run that goes on, whatever it has by now, the page is the one that follows it.
        run = loaded_or_none(site, run_id) if detail.run.has_ended else None
        if run is None or run.chosen is None:
            return page("run_unfinished.html", **context, log=last_lines(site.store, run_id))
        asked = Asked(
            budgets=tuple(budget or [b.text for b in run.chosen.budgets]),
            pins=tuple(pin or ()),
            risk=risk,
        )
        is_stored = budget is None and pin is None and risk is None
        solution = run.chosen
        if not is_stored:
            site.moves.take(who)
            small = solvable(run, site.settings.solve_cells)
            solution = site.solving.run(lambda: answer(small, asked))
        return result_page(
            request,
            "run.html",
            **context,
            run=run,
            view=overview(run, site.store.frontier_totals(run.id)),
            now=what_if_view(run, asked, solution),
            asked=asked,
            is_stored=is_stored,
        )

    @router.get("/runs/{run_id}/what-if")
    def what_if(
        run_id: str,
        response: Response,
        who: Annotated[str, Depends(asker)],
        budget: Texts = None,
        pin: Names = None,
        risk: Risk = None,
        proof: bool = False,
    ) -> Any:
        """Answer a slider that moves, and with `proof` one that rests."""
        began = time.perf_counter()
        (site.solves if proof else site.moves).take(who)
        run = solvable(site.loaded.get(run_id), site.settings.solve_cells)
        asked = Asked(budgets=tuple(budget or ()), pins=tuple(pin or ()), risk=risk)
        solved = proven_answer if proof else _near_stored
        solution = site.solving.run(lambda: solved(run, asked))
        view = finite_json(what_if_view(run, asked, solution))
        response.headers["Server-Timing"] = f"answer;dur={1e3 * (time.perf_counter() - began):.1f}"
        return view

    @router.post("/runs/{run_id}/stop")
    def stop(run_id: str) -> RedirectResponse:
        """Ask a run to stop."""
        site.store.request_stop(run_id)
        return RedirectResponse(f"/runs/{run_id}", 303)

    @router.post("/runs/{run_id}/resume")
    def resume(run_id: str, who: Annotated[str, Depends(asker)]) -> RedirectResponse:
        """Let a run wait for a driver again."""
        site.submits.take(who)
        site.store.queue(run_id)
        return RedirectResponse(f"/runs/{run_id}", 303)

    @router.get("/runs/{run_id}/prices")
    def prices(
        run_id: str,
        who: Annotated[str, Depends(asker)],
        budget: Texts = None,
        pin: Names = None,
        risk: Risk = None,
    ) -> HTMLResponse:
        """Tell what the budgets are worth, as a part of the overview."""
        site.solves.take(who)
        run = solvable(site.loaded.get(run_id), site.settings.solve_cells)
        asked = Asked(budgets=tuple(budget or ()), pins=tuple(pin or ()), risk=risk)
        is_stored = budget is None and pin is None and risk is None
        stored = run.chosen if is_stored else None
        lines = site.solving.run(lambda: price_lines(run, stored or answer(run, asked)))
        return page("prices.html", lines=lines)

    return router


def price_lines(run: LoadedRun, solution: Solution) -> list[str]:
    """Return what each budget of an answer is worth, none where there is no answer."""
    if solution.allocation is None or not solution.budgets:
        return []
    from solvers.shadow import shadow_prices

    return list(shadow_prices(run.problem, solution).told())


def _near_stored(run: LoadedRun, asked: Asked) -> Solution:
    return answer(run, asked, run.chosen.allocation if run.chosen is not None else None)


def loaded_or_none(site: Site, run_id: str) -> LoadedRun | None:
    """Return a run, None where it has no scores and costs yet."""
    try:
        return site.loaded.get(run_id)
    except InvalidInputError as error:
        if error.code.startswith("unknown_run"):
            raise
        return None
