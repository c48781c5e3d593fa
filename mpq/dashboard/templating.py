"""HTML from templates; everything that comes from users is escaped."""

from __future__ import annotations

import functools
from datetime import datetime
from typing import Any

import jinja2
from fastapi.responses import HTMLResponse

from mpq.core.quantities import quantity


@functools.cache
def environment() -> jinja2.Environment:
    """Return the templates of this package."""
    loader = jinja2.PackageLoader("mpq.dashboard", "templates")
    made = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    made.filters["quantity"] = quantity
    made.filters["moment"] = _moment
    return made


def page(template: str, *, status: int = 200, **context: Any) -> HTMLResponse:
    """Return a page made from a template."""
    return HTMLResponse(environment().get_template(template).render(**context), status)


def login_page(*, status: int = 200, error: str = "") -> HTMLResponse:
    """Return the page that asks for a token."""
    return page("login.html", status=status, error=error)


def _moment(at: datetime | None) -> str:
    return "" if at is None else f"{at:%Y-%m-%d %H:%M:%S}"
