"""The one door in front of everything: host, token, origin, size; deny unless allowed."""

from __future__ import annotations

import re
import time
from collections.abc import MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any

from anyio import to_thread
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as Asgi

from mpq.core.access import Scope
from mpq.core.errors import MpqError
from mpq.dashboard.problems import ProblemError, failure, problem_of, shown
from mpq.dashboard.site import Site
from mpq.store.records import TokenRecord

COOKIE = "mpq_token"
LOGIN = "/login"
PUBLIC = frozenset({"/healthz", LOGIN})
API = "/api/"
_CHANGES_NOTHING = re.compile(r"/api/v1/(?:runs/[^/]+/solve|jobs/check)|/login|/logout")
_READING = ("GET", "HEAD", "OPTIONS")
_METHODS = (*_READING, "POST", "PUT", "PATCH", "DELETE")
_ELSEWHERE = ("cross-site", "same-site")
_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data", "text/plain")
_LOOK_S = 5.0  # between two looks whether a first token was made
HEADERS = {
    "Content-Security-Policy": (
        # Plots set styles of elements and rules of an empty sheet, which has this digest.
        "default-src 'self'; style-src-attr 'unsafe-inline'; "
        "style-src-elem 'self' 'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='; "
        "img-src 'self' data:; object-src 'none'; base-uri 'none'; "
        "form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Guard:
    """ASGI middleware that every request passes first; refuses with a problem.

    Of who asks, `scope["state"]["token"]` is the token (None where none is needed) and
    `scope["state"]["asker"]` a text to count requests by.
    """

    def __init__(self, app: ASGIApp, *, site: Site) -> None:
        self._app, self._store, self._settings = app, site.store, site.settings
        self._metrics = site.metrics
        self._needs_token, self._looked = site.settings.require_token, -_LOOK_S

    async def __call__(self, scope: Asgi, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it here."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        is_sent, started = False, time.perf_counter()

        async def sending(message: Message) -> None:
            nonlocal is_sent
            if message["type"] == "http.response.start":
                is_sent = True
                _complete(message, scope)
                seconds = time.perf_counter() - started
                self._metrics.answered(_route(scope), message["status"], seconds)
            await send(message)

        try:
            received = await self._admitted(scope, receive)
            await self._app(scope, received, sending)
        except MpqError as error:
            await self._refusal(error, scope)(scope, receive, sending)
        except Exception as error:
            if is_sent:
                raise
            await failure(error)(scope, receive, sending)

    async def _admitted(self, scope: Asgi, receive: Receive) -> Receive:
        """Return how the app receives the body; raises ProblemError for what may not pass."""
        headers = Headers(scope=scope)
        self._check_host(headers)
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        token, by_cookie = await self._token(scope, headers)
        client = scope.get("client") or ("",)
        state["token"], state["asker"] = token, token.id if token else client[0]
        _check_scope(token, scope["method"], scope["path"])
        if scope["path"].startswith(API) and headers.get("sec-fetch-site") in _ELSEWHERE:
            raise ProblemError(403, "origin", "refused for a page of another site")
        if scope["method"] in _READING:
            return receive
        _check_origin(scope["path"], headers, by_cookie=by_cookie)
        return await _bounded(headers, receive, self._settings.body_bytes)

    def _check_host(self, headers: Headers) -> None:
        given = headers.getlist("host")
        name = given[0].lower() if len(given) == 1 else ""
        host, colon, port = name.rpartition(":")
        if not colon or name.endswith("]"):
            host, port = name, ""
        if host not in self._settings.hosts or (port and not port.isdecimal()):
            raise ProblemError(
                400,
                "host",
                f"this server is not {', '.join(given)[:100]!r}: ask it by a name that it knows, "
                "or start it with 'mpq serve --allow-host NAME'",
            )

    async def _token(self, scope: Asgi, headers: Headers) -> tuple[TokenRecord | None, bool]:
        """Return the valid token of a request, and whether a cookie brought it."""
        kind, _, secret = headers.get("authorization", "").partition(" ")
        by_cookie = False
        if not kind:
            secret = _cookie(headers)
            by_cookie = bool(secret)
        elif kind.lower() != "bearer":
            secret = ""
        if secret:
            found = await to_thread.run_sync(self._store.token, secret.strip())
            if found is not None and found.is_valid:
                return found, by_cookie
        if scope["path"] in PUBLIC or not await self._token_is_needed():
            return None, False
        what = "this token is unknown, expired or revoked" if secret else "a token is needed"
        raise ProblemError(
            401,
            "unauthorized",
            f"{what}: send 'Authorization: Bearer TOKEN'; 'mpq token create NAME' makes one",
            {"WWW-Authenticate": "Bearer"},
        )

    async def _token_is_needed(self) -> bool:
        now = time.monotonic()
        if not self._needs_token and now - self._looked > _LOOK_S:
            self._needs_token = await to_thread.run_sync(self._store.has_tokens)
            self._looked = now
        return self._needs_token

    def _refusal(self, error: MpqError, scope: Asgi) -> Response:
        is_page = "text/html" in Headers(scope=scope).get("accept", "")
        if isinstance(error, ProblemError) and error.status == 401 and is_page:
            from mpq.dashboard.templating import login_page

            return login_page(status=401, error="" if scope["path"] == "/" else str(error))
        return shown(Request(scope), problem_of(error))


def _check_scope(token: TokenRecord | None, method: str, path: str) -> None:
    """Raise ProblemError (403) unless a token allows what a request does."""
    wanted = Scope.ADMIN if method == "DELETE" else Scope.SUBMIT
    if method in _READING or _CHANGES_NOTHING.fullmatch(path):
        wanted = Scope.READ
    if token is not None and not token.scope.allows(wanted):
        raise ProblemError(
            403, "scope", f"this needs a token of scope {wanted}, {token.name!r} has {token.scope}"
        )


def _check_origin(path: str, headers: Headers, *, by_cookie: bool) -> None:
    """Raise ProblemError for what a page of another site may have sent."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    is_ours = origin is not None and origin.partition("://")[2] == headers.get("host")
    is_foreign = (origin is not None and not is_ours) or site in _ELSEWHERE
    if is_foreign:
        raise ProblemError(403, "origin", f"refused for a page of another site ({origin or site})")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    is_proven = is_ours or site == "same-origin"
    if by_cookie and not is_proven:
        raise ProblemError(
            403, "origin", "a cookie is for pages of this server: send the token as a header"
        )
    if path.startswith(API):
        if kind in _FORMS:
            raise ProblemError(403, "form", f"send application/json, not {kind}")
        if kind not in ("", "application/json"):
            raise ProblemError(415, "media_type", f"send application/json, not {kind[:100]!r}")


async def _bounded(headers: Headers, receive: Receive, limit: int) -> Receive:
    """Return a receiver of the whole body, which is at most `limit` bytes."""
    too_large = ProblemError(
        413, "too_large", f"a request has at most {limit} bytes", {"Connection": "close"}
    )
    declared = headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > limit:
        raise too_large
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise too_large
        more = message.get("more_body", False)
    whole = b"".join(parts)
    is_given = False

    async def received() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": whole, "more_body": False}

    return received


def _cookie(headers: Headers) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


def _route(scope: Asgi) -> str:
    """Return the template of a request's route: few, whatever is asked for."""
    path = getattr(scope.get("route"), "path", None) or "other"
    method = scope["method"] if scope["method"] in _METHODS else "other"
    return f"{method} {path}"


def _complete(message: Message, scope: Asgi) -> None:
    """Add what every answer says."""
    headers = MutableHeaders(raw=message["headers"])
    for name, value in HEADERS.items():
        headers[name] = value
    state = scope.get("state", {})
    if "etag" in state and message["status"] in (200, 304):
        headers["ETag"] = state["etag"]
    if "etag" in headers:  # kept by browsers, which ask whether it is still so
        headers["Cache-Control"] = "private, no-cache"
    else:
        headers.setdefault("Cache-Control", "no-store")
    message["headers"] = headers.raw
