"""A token for a cookie, so that a browser can show pages."""

from __future__ import annotations

from urllib.parse import parse_qs

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from starlette.concurrency import run_in_threadpool

from mpq.dashboard.security import COOKIE, LOGIN
from mpq.dashboard.site import Site
from mpq.dashboard.templating import login_page


def routes(site: Site) -> APIRouter:
    """Return the pages that ask for a token and forget it."""
    router = APIRouter(include_in_schema=False)

    @router.get(LOGIN)
    def ask() -> Response:
        """Ask for a token."""
        return login_page()

    @router.post(LOGIN)
    async def enter(request: Request) -> Response:
        """Keep a valid token in a cookie that no script and no other site can use."""
        form = parse_qs((await request.body()).decode(errors="replace"))
        secret = form.get("token", [""])[0].strip()
        found = await run_in_threadpool(site.store.token, secret) if secret else None
        if found is None or not found.is_valid:
            return login_page(status=401, error="this token is unknown, expired or revoked")
        answer = RedirectResponse("/", 303)
        answer.set_cookie(
            COOKIE,
            secret,
            expires=found.expires_at,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return answer

    @router.post("/logout")
    def leave() -> Response:
        """Forget the token of this browser."""
        answer = RedirectResponse(LOGIN, 303)
        answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return answer

    return router
