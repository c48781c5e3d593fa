"""The form of a new job: what it would search, and the way into the queue."""

from __future__ import annotations

import getpass
import hashlib
import json
import secrets
import threading
from typing import Annotated, Any
from urllib.parse import parse_qs, urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse
from starlette.concurrency import run_in_threadpool

from mpq.core.dry_run import DryRun
from mpq.core.errors import InvalidInputError, MpqError, StorageError
from mpq.core.jobs import JobSpec
from mpq.dashboard.admission import admitted, check_text
from mpq.dashboard.dry_run_view import dry_run_view
from mpq.dashboard.job_fields import all_fields, sections
from mpq.dashboard.job_form import (
    PRIORITY,
    TAGS,
    Mistake,
    Texts,
    content_of,
    mistake,
    priority_of,
    tags_of,
    texts_of,
)
from mpq.dashboard.problems import ProblemError, problem_of
from mpq.dashboard.site import Site, asker
from mpq.dashboard.templating import page
from mpq.service import dry_run, submit
from mpq.store.records import TokenRecord

_MOST_FIELDS = 200
_WAIT_S = 2.0  # for another dry run
_KEY = "key"  # of the form as it was sent to the browser: the same job is not submitted twice


def routes(site: Site) -> APIRouter:
    """Return the pages of a new job."""
    router = APIRouter(include_in_schema=False)
    dry = threading.BoundedSemaphore(1)  # each loads a network

    @router.get("/new")
    def ask(
        request: Request, like: Annotated[str | None, Query(max_length=300)] = None
    ) -> Response:
        """Show the form, filled in from the URL or from an earlier run."""
        texts = {key: value for key, value in request.query_params.items() if key in _keys()}
        if like is None:
            return _form(site, texts)
        try:
            texts = texts_of(site.store.run(site.store.resolve_run(like)).spec) | texts
        except InvalidInputError as error:
            return _form(site, texts, Mistake(key="", message=str(error)), 404)
        return _form(site, texts)

    @router.post("/new")
    async def answer(request: Request) -> Response:
        """Submit the job, or tell what it would search."""
        body = (await request.body()).decode(errors="replace")
        try:
            given = parse_qs(body, max_num_fields=_MOST_FIELDS)
        except ValueError:
            raise ProblemError(422, "form", f"a form has at most {_MOST_FIELDS} fields") from None
        texts = {key: values[-1] for key, values in given.items()}
        token: TokenRecord | None = request.state.token
        site.submits.take(asker(request))
        return await run_in_threadpool(_answer, texts, token)

    def _answer(texts: dict[str, str], token: TokenRecord | None) -> Response:
        try:
            check_text(texts)
            spec = admitted(content_of(texts), site.settings)
            if texts.get("do") == "submit":
                run_id = _submitted(site, spec, texts, token)
                return RedirectResponse(f"/runs/{run_id}", 303)
            return _form(site, texts, found=_tried(spec))
        except StorageError:
            raise
        except MpqError as error:
            return _form(site, texts, mistake(error, texts), problem_of(error).status_code)

    def _tried(spec: JobSpec) -> DryRun:
        if not dry.acquire(timeout=_WAIT_S):
            raise ProblemError(429, "busy", "another dry run is under way: try again in a moment")
        try:
            return dry_run(site.store, spec)
        finally:
            dry.release()

    return router


def _keys() -> set[str]:
    return {*all_fields(), TAGS, PRIORITY}


def _submitted(site: Site, spec: JobSpec, texts: Texts, token: TokenRecord | None) -> str:
    tags, priority = tags_of(texts), priority_of(texts)
    key = texts.get(_KEY, "")[:64]
    body = json.dumps([sorted((k, v) for k, v in texts.items() if k in _keys()), key])
    run_id, _ = submit(
        site.store,
        spec,
        submission_id=f"form {hashlib.sha256(body.encode()).hexdigest()}" if key else None,
        owner=token.name if token else getpass.getuser(),
        priority=priority,
        tags=tags,
        queue=True,
    )
    return run_id


def _form(
    site: Site,
    texts: Texts,
    wrong: Mistake | None = None,
    status: int = 200,
    found: DryRun | None = None,
) -> Response:
    defaults = {key: field.default for key, field in all_fields().items()}
    shown = {
        key: text
        for key, text in texts.items()
        if key in _keys() and text.strip() and text != defaults.get(key)
    }
    context: dict[str, Any] = {
        "sections": sections(),
        "texts": shown,
        "wrong": wrong,
        "found": None if found is None else dry_run_view(found),
        "key": texts.get(_KEY, "")[:64] or secrets.token_urlsafe(12),
        "link": urlencode(shown),
        "modules": site.settings.allow_modules,
        "hub": site.settings.allow_hub,
    }
    return page("new.html", status=status, **context)
