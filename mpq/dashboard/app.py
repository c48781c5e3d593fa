"""The ASGI app over one open database."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.staticfiles import StaticFiles

from mpq.dashboard import (
    health,
    login,
    pages_compare,
    pages_kernels,
    pages_layers,
    pages_new,
    pages_run,
    pages_runs,
    problems,
)
from mpq.dashboard.loaded import LoadedRuns
from mpq.dashboard.security import Guard
from mpq.dashboard.settings import Settings
from mpq.dashboard.site import Site
from mpq.store.store import Store

STATIC = Path(__file__).with_name("static")
ROUTES = (  # routers of a Site
    health.routes,
    login.routes,
    pages_runs.routes,
    pages_run.routes,
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

    site = Site(store=store, settings=settings or Settings(), loaded=LoadedRuns(store))
    app = FastAPI(
        title="mpq",
        version=__version__,
        openapi_url=None,  # a route of the API, behind the guard as all else
        docs_url=None,
        redoc_url=None,
    )
    app.state.site = site
    problems.install(app)
    for routes in ROUTES:
        app.include_router(routes(site))
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.add_middleware(Guard, store=store, settings=site.settings)
    return app
