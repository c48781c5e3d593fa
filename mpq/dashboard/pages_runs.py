"""The page that lists runs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse

from mpq.dashboard.site import Site
from mpq.dashboard.templating import page
from mpq.dashboard.views import runs_view


def routes(site: Site) -> APIRouter:
    """Return the pages of runs."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    def index(cursor: Annotated[str | None, Query(max_length=2000)] = None) -> HTMLResponse:
        """List runs, the newest first."""
        return page("runs.html", found=runs_view(site.store, cursor=cursor))

    return router
