"""What every route of one server shares, and which run a request is about."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, HTTPException, Path, Request

from mpq.dashboard.limits import Allowance, Bounded
from mpq.dashboard.loaded import LoadedRuns
from mpq.dashboard.metrics import Metrics
from mpq.dashboard.settings import Settings
from mpq.dashboard.views import result_tag
from mpq.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """An open database, what of it was read last, what the operator decided, what limits."""

    store: Store
    settings: Settings
    loaded: LoadedRuns
    submits: Allowance
    solves: Allowance
    moves: Allowance
    solving: Bounded
    metrics: Metrics

    @classmethod
    def of(cls, store: Store, settings: Settings) -> Site:
        """Make the site of one server."""
        return cls(
            store=store,
            settings=settings,
            loaded=LoadedRuns(store),
            submits=Allowance(settings.submits, "submissions"),
            solves=Allowance(settings.solves, "questions"),
            moves=Allowance(settings.moves, "moves of a budget"),
            solving=Bounded(settings.solves_at_once, settings.solve_seconds),
            metrics=Metrics(store),
        )


def _run(request: Request, run: Annotated[str, Path(max_length=300)]) -> str:
    site: Site = request.app.state.site
    return site.store.resolve_run(run)


def _result(request: Request, run: Annotated[str, Path(max_length=300)]) -> str:
    site: Site = request.app.state.site
    run_id = site.store.resolve_run(run)
    found = result_tag(site.store.run(run_id))
    if found is not None:
        asked = f"{found} {request.url.path}?{request.url.query}"
        etag = f'"{hashlib.sha256(asked.encode()).hexdigest()[:32]}"'
        request.state.etag = etag  # the guard says so in the answer
        if etag in request.headers.get("if-none-match", ""):
            raise HTTPException(304)
    return run_id


RunId = Annotated[str, Depends(_run)]  # of an id, its beginning, a name or "latest"
ResultOf = Annotated[str, Depends(_result)]  # the same; an ended run's is not sent twice


def asker(request: Request) -> str:
    """Return by whom requests are counted."""
    return str(request.state.asker)
