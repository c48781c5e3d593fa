"""HTML from templates; everything that comes from users is escaped."""

from __future__ import annotations

import functools
import math
from datetime import datetime
from typing import Any

import jinja2
from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from mpq.core.quantities import quantity
from mpq.dashboard.plain import finite_json


@functools.cache
def environment() -> jinja2.Environment:
    """Return the templates of this package."""
    loader = jinja2.PackageLoader("mpq.dashboard", "templates")
    made = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    made.filters["quantity"] = quantity
    made.filters["moment"] = _moment
    made.filters["number"] = _number
    made.filters["plain"] = _plain
    return made


def page(template: str, *, status: int = 200, **context: Any) -> HTMLResponse:
    """Return a page made from a template."""
    return HTMLResponse(environment().get_template(template).render(**context), status)


def result_page(request: Request, template: str, **context: Any) -> HTMLResponse:
    """Return a page with scripts of its own, which whoever waited for it has to load whole."""
    shown = page(template, **context)
    if request.headers.get("hx-request") == "true":
        shown.headers["HX-Refresh"] = "true"
    return shown


def login_page(*, status: int = 200, error: str = "") -> HTMLResponse:
    """Return the page that asks for a token."""
    return page("login.html", status=status, error=error)


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _plain(view: Any) -> Markup:
    """Return JSON that is safe inside a script element; NaN and infinities become null."""
    return htmlsafe_json_dumps(finite_json(view), separators=(",", ":"))


def _moment(at: datetime | None) -> str:
    return "" if at is None else f"{at:%Y-%m-%d %H:%M:%S}"
