"""Whether the server and its database answer."""

from __future__ import annotations

from fastapi import APIRouter

from mpq.dashboard.problems import told
from mpq.dashboard.site import Site


def routes(site: Site) -> APIRouter:
    """Return the route that load balancers ask; it needs no token and tells nothing else."""
    router = APIRouter(tags=["health"], responses=told())

    @router.get("/healthz")
    def healthz() -> dict[str, str]:
        """Tell that the database answers; 503 where it does not."""
        site.store.has_tokens()
        return {"status": "ok"}

    return router
