"""The log of a run: at once, or line by line as it comes."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import StreamingResponse

from mpq.core.errors import MpqError
from mpq.core.jobs import ENDED
from mpq.dashboard.api_runs import PREFIX
from mpq.dashboard.problems import ProblemError, told
from mpq.dashboard.site import RunId, Site
from mpq.dashboard.views import LogView, log_view, stage_view
from mpq.store.store import Store

After = Annotated[int, Query(ge=0, le=2**53, description="The last number already seen.")]
_LOOK_S = 0.5
_BEAT_S = 15.0  # so that whoever listens notices a connection that is gone
_AT_ONCE = 1000
_MANY = 40


def routes(site: Site) -> APIRouter:
    """Return the routes of logs."""
    router = APIRouter(prefix=PREFIX, tags=["logs"], responses=told(429))
    listening = 0

    @router.get("/runs/{run}/logs")
    def logs(
        run_id: RunId, after: After = 0, limit: Annotated[int, Query(ge=1, le=10_000)] = 1000
    ) -> LogView:
        """Return lines of the log with a larger number than `after`, the oldest first."""
        return log_view(site.store, run_id, after, limit)

    @router.get(
        "/runs/{run}/events",
        response_class=StreamingResponse,
        responses={
            200: {"content": {"text/event-stream": {}}},
            204: {"description": "The run has ended and there is nothing after this number"},
        },
    )
    async def events(
        run_id: RunId,
        after: After = 0,
        last_event_id: Annotated[int | None, Header(ge=0, le=2**53)] = None,
    ) -> Response:
        """Send server-sent events until the run has ended.

        `log` is a line of the log, whose number is the id to go on after; `state` and `progress`
        tell what is at this moment, and again when it changes.
        """
        if last_event_id is not None:
            found = await to_thread.run_sync(log_view, site.store, run_id, last_event_id, 1)
            if found.state in ENDED and not found.lines:
                return Response(status_code=204)  # by which a browser knows not to ask again
        if listening >= site.settings.streams:
            raise ProblemError(
                429,
                "too_many",
                f"{listening} listen already: try again later",
                {"Retry-After": "5"},
            )
        start = after if last_event_id is None else last_event_id
        return StreamingResponse(counted(run_id, start), media_type="text/event-stream")

    async def counted(run_id: str, after: int) -> AsyncIterator[str]:
        nonlocal listening
        listening += 1
        try:
            async for event in _events(site.store, run_id, after, lambda: listening):
                yield event
        finally:
            listening -= 1

    return router


async def _events(
    store: Store, run_id: str, after: int, listening: Callable[[], int]
) -> AsyncIterator[str]:
    told: dict[str, Any] = {}
    beat = time.monotonic()
    yield "retry: 2000\n\n"
    while True:
        try:
            found = await to_thread.run_sync(log_view, store, run_id, after, _AT_ONCE)
            stages = await to_thread.run_sync(store.progress, run_id)
        except MpqError:  # deleted meanwhile, or the database is away: the client asks again
            return
        for line in found.lines:
            yield _event("log", dataclasses.asdict(line), line.id)
        after = found.last
        if found.lines and len(found.lines) == _AT_ONCE:
            continue
        shown = {
            "progress": [dataclasses.asdict(stage_view(stage)) for stage in stages],
            "state": {"state": found.state.value},
        }
        for kind, data in shown.items():
            if told.get(kind) != data:
                told[kind] = data
                yield _event(kind, data)
        if found.state in ENDED:
            return
        if time.monotonic() - beat > _BEAT_S:
            beat = time.monotonic()
            yield ": still here\n\n"
        await asyncio.sleep(_LOOK_S * (1 + listening() // _MANY))  # spares the database


def _event(kind: str, data: Any, number: int | None = None) -> str:
    lines = [f"event: {kind}", f"data: {json.dumps(data, default=datetime.isoformat)}"]
    return "\n".join([f"id: {number}", *lines] if number is not None else lines) + "\n\n"
