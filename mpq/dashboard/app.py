"""The ASGI app over one open database."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.staticfiles import StaticFiles

from mpq.dashboard import (
    api_compare,
    api_jobs,
    api_logs,
    api_results,
    api_runs,
    health,
    login,
    openapi,
    pages_compare,
    pages_kernels,
    pages_layers,
    pages_new,
    pages_run,
    pages_run_views,
    pages_runs,
    problems,
)
from mpq.dashboard.security import Guard
from mpq.dashboard.settings import Settings
from mpq.dashboard.site import Site
from mpq.store.store import Store

STATIC = Path(__file__).with_name("static")
ROUTES = (  # each makes a router of a Site
    health.routes,
    login.routes,
    api_runs.routes,
    api_jobs.routes,
    api_logs.routes,
    api_results.routes,
    api_compare.routes,
    openapi.routes,
    pages_runs.routes,
    pages_run.routes,
    pages_run_views.routes,
    pages_compare.routes,
    pages_layers.routes,
    pages_kernels.routes,
    pages_new.routes,
)


def create_app(store: Store, settings: Settings | None = None) -> FastAPI:
    """Return the app; the store stays the caller's to close.

    One middleware, `Guard`, is in front of every route, static files and metrics included.
    """
    from mpq import __version__

    site = Site.of(store, settings or Settings())
    app = FastAPI(
        title="mpq",
        version=__version__,
        openapi_url=None,  # a route of the API, behind the guard as all else
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.site = site
    problems.install(app)
    for routes in ROUTES:
        app.router.routes += routes(site).routes  # flat, so that a test sees every one
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.add_middleware(Guard, site=site)
    return app
