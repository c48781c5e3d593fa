"""The page of measured kernels."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse

from mpq.core.errors import InvalidInputError
from mpq.dashboard.kernels_view import kernels_view
from mpq.dashboard.site import Site
from mpq.dashboard.templating import page


def routes(site: Site) -> APIRouter:
    """Return the page of kernels."""
    router = APIRouter(include_in_schema=False)

    @router.get("/kernels")
    def kernels(
        device: Annotated[str | None, Query(max_length=2000)] = None,
        family: Annotated[str, Query(max_length=200)] = "",
    ) -> HTMLResponse:
        """Show the times of a device."""
        try:
            view, error = kernels_view(site.store, device or None, family), ""
        except InvalidInputError as found:
            view, error = kernels_view(site.store), str(found)
        return page("kernels.html", status=404 if error else 200, view=view, error=error)

    return router
