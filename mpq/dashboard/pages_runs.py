"""The page that lists runs."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from mpq.core.errors import InvalidInputError
from mpq.core.jobs import ENDED, RunState
from mpq.dashboard.site import Site
from mpq.dashboard.templating import page
from mpq.dashboard.views import RunsView, runs_view
from mpq.store.query import NEWEST, RunQuery

_SORTS = (
    (NEWEST, "newest first"),
    ("created_at", "oldest first"),
    ("name", "name"),
    ("memory", "least memory"),
    ("latency", "least latency"),
    ("divergence", "least measured loss"),
)
Text = Annotated[str, Query(max_length=300)]


def routes(site: Site) -> APIRouter:
    """Return the pages of runs."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    def index(
        request: Request,
        name: Text = "",
        model: Text = "",
        state: Text = "",
        metric: Text = "",
        tag: Text = "",
        owner: Text = "",
        budget: Text = "",
        where: Text = "",
        since: Text = "",
        sort: Text = NEWEST,
        cursor: Annotated[str | None, Query(max_length=2000)] = None,
    ) -> HTMLResponse:
        """List runs, the newest first unless sorted; words are found anywhere in a name."""
        wanted = {
            "name": _anywhere(name),
            "model": _anywhere(model),
            "metric": metric,
            "state": state,
            "tag": tag,
            "owner": owner,
            "budget": budget,
            "where": where,
            "since": since,
        }
        given = {key: value for key, value in wanted.items() if value}
        found, error = RunsView(runs=(), cursor=None), ""
        try:
            found = runs_view(
                site.store, RunQuery.of(**given, sort=sort or NEWEST), cursor=cursor, jobs=False
            )
        except InvalidInputError as wrong:
            error = str(wrong)
        live = [run for run in found.runs if run.state not in ENDED]
        context: dict[str, Any] = {
            "found": found,
            "error": error,
            "asked": dict(request.query_params),
            "is_filtered": bool(given),
            "states": [state.value for state in RunState],
            "sorts": _SORTS,
            "progress": {run.id: site.store.progress(run.id)[-1:] for run in live},
            "here": f"/?{urlencode(dict(request.query_params))}",
            "older": f"/?{urlencode({**dict(request.query_params), 'cursor': found.cursor or ''})}",
        }
        return page("runs.html", status=422 if error else 200, **context)

    return router


def _anywhere(text: str) -> str:
    """Return a pattern that finds a word anywhere, unless it is a pattern already."""
    return text if not text or "*" in text else f"*{text}*"
