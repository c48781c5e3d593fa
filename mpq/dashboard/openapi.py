"""The OpenAPI document: what every route takes and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi

from mpq.dashboard.api_runs import PREFIX
from mpq.dashboard.problems import SCHEMA, told
from mpq.dashboard.site import Site

FILE = Path(__file__).with_name("openapi.json")


def routes(_: Site) -> APIRouter:
    """Return the route of the document."""
    router = APIRouter(prefix=PREFIX, tags=["documents"], responses=told())

    @router.get("/openapi.json")
    def document(request: Request) -> dict[str, Any]:
        """Return this document."""
        return openapi(request.app)

    return router


def openapi(app: FastAPI) -> dict[str, Any]:
    """Return the document of an app."""
    if app.openapi_schema is None:
        made = get_openapi(
            title="mpq",
            version=app.version,
            description="Searches of number formats: submitted, watched, compared, solved again.",
            routes=app.routes,
        )
        parts = made.setdefault("components", {})
        parts.setdefault("schemas", {})["Problem"] = SCHEMA
        parts["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"token": []}]
        made["paths"]["/healthz"]["get"]["security"] = []
        app.openapi_schema = made
    return app.openapi_schema


def openapi_text(app: FastAPI) -> str:
    """Return the document as `FILE` holds it."""
    return json.dumps(openapi(app), indent=1, sort_keys=True) + "\n"


def main() -> None:
    """Write `FILE` anew."""
    from mpq.dashboard.app import create_app
    from mpq.store.store import open_store

    with open_store(":memory:") as store:
        FILE.write_text(openapi_text(create_app(store)), encoding="utf-8")


if __name__ == "__main__":
    main()
