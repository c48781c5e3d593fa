"""Whether the server and its database answer, and what they do."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from mpq.dashboard.problems import told
from mpq.dashboard.site import Site


def routes(site: Site) -> APIRouter:
    """Return the routes of load balancers, which need no token, and of monitoring."""
    router = APIRouter(tags=["health"], responses=told())

    @router.get("/healthz")
    def healthz() -> dict[str, str]:
        """Tell that the database answers; 503 where it does not."""
        site.store.has_tokens()
        return {"status": "ok"}

    @router.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """Return the numbers that monitoring reads, in the text form of Prometheus."""
        return Response(site.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
