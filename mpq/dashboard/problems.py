"""What went wrong, as RFC 9457 tells it: application/problem+json with a stable type."""

from __future__ import annotations

import http
import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from mpq.core.errors import MpqError, StorageError
from mpq.dashboard.masking import masked_text

MEDIA_TYPE = "application/problem+json"
_LOG = logging.getLogger("mpq.dashboard")
_RETRY_S = "5"
_LONGEST = 2000  # of what somebody sent, told back
_STATUS = {
    "unknown_run": 404,
    "not_stored": 404,
    "unknown_table": 404,
    "ambiguous_run": 409,
    "submission_conflict": 409,
    "run_driven": 409,
    "run_state": 409,
    "run_unfinished": 409,
    "module_not_allowed": 403,
    "hub_not_allowed": 403,
    "path_not_allowed": 403,
    "too_large": 413,
    "too_many": 429,
}


class ProblemError(MpqError):
    """A problem of a request with its own status; `headers` go with the answer."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(code, message)
        self.status = status
        self.headers = dict(headers or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self.code, str(self), self.headers)


def problem(
    status: int, code: str, detail: str, headers: Mapping[str, str] | None = None, **more: Any
) -> Response:
    """Return a problem as a response; secrets in the detail are masked."""
    body = {
        "type": f"/errors/{code}",
        "title": http.HTTPStatus(status).phrase,
        "status": status,
        "detail": masked_text(detail)[:_LONGEST],
        **more,
    }
    # ASCII: what somebody sent may hold half a character, which no encoding has.
    return Response(json.dumps(body), status, dict(headers or {}), MEDIA_TYPE)


def problem_of(error: MpqError) -> Response:
    """Return what an error of this library is over HTTP."""
    if isinstance(error, ProblemError):
        return problem(error.status, error.code, str(error), error.headers)
    if error.code in _STATUS:
        headers = {"Retry-After": _RETRY_S} if _STATUS[error.code] == 429 else {}
        return problem(_STATUS[error.code], error.code, str(error), headers)
    if isinstance(error, StorageError):
        return problem(503, error.code, str(error), {"Retry-After": _RETRY_S})
    return problem(422, error.code, str(error))


def failure(error: Exception) -> Response:
    """Return the answer to what must not happen; its reason goes to the log alone."""
    _LOG.error("a request failed", exc_info=error)
    return problem(500, "internal", "the server failed at this request: its log says why")


def install(app: FastAPI) -> None:
    """Let the app answer with problems, whatever is raised."""

    @app.exception_handler(MpqError)
    def _of_ours(request: Request, error: MpqError) -> Response:
        return shown(request, problem_of(error))

    @app.exception_handler(RequestValidationError)
    def _of_input(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        if first["loc"][:1] == ("path",):
            found = problem(404, "not_found", f"there is no {place}: {first['msg']}")
        else:
            found = problem(422, "request", f"{place}: {first['msg'].lower()}", where=place)
        return shown(request, found)

    @app.exception_handler(HTTPException)
    def _of_http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 304:
            return Response(status_code=304)
        code = {404: "not_found", 405: "method"}.get(error.status_code, "request")
        found = problem(error.status_code, code, str(error.detail), error.headers)
        return shown(request, found)


def shown(request: Request, found: Response) -> Response:
    """Return a problem as it is, or as a page to a browser that looks at pages."""
    wants_page = "text/html" in request.headers.get("accept", "")
    if not wants_page or request.url.path.startswith("/api/"):
        return found
    from mpq.dashboard.templating import page

    told = json.loads(bytes(found.body))
    headers = {
        k: v for k, v in found.headers.items() if k not in ("content-length", "content-type")
    }
    answer = page("problem.html", status=found.status_code, problem=told)
    answer.headers.update(headers)
    return answer


# What the OpenAPI document says of the answers that any route may give.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "title": "Problem",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "description": "/errors/CODE, which never changes"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "where": {"type": "string", "description": "The part of the request that is wrong"},
    },
}


def told(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return these statuses, and those that every route may give, for `responses=`."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"description": http.HTTPStatus(status).phrase, "content": content}
        for status in sorted({400, 401, 403, 404, 422, 503, *statuses})
    }
