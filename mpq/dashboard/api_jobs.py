"""Jobs over HTTP: submitted, checked, stopped, resumed."""

from __future__ import annotations

import getpass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from mpq.core.jobs import ENDED, RunState
from mpq.dashboard.admission import admitted, check_text
from mpq.dashboard.api_runs import PREFIX, TagList, checked_tags
from mpq.dashboard.masking import masked_job
from mpq.dashboard.problems import told
from mpq.dashboard.site import RunId, Site, asker
from mpq.jobfile import job_schema
from mpq.service import submit
from mpq.store.records import TokenRecord


class Job(BaseModel):
    """The keys of a job; /api/v1/job-schema describes them."""

    model_config = ConfigDict(extra="forbid")

    job: dict[str, Any]


class Submission(Job):
    """A job and what its run is found by; with a token the user is the token's name."""

    tags: TagList = []
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    user: Annotated[str, Field(max_length=100)] | None = None


class StateView(BaseModel):
    """The state of a run."""

    id: str
    state: RunState


class Checked(BaseModel):
    """A job that would be taken, with the keys that were left out; secrets are masked."""

    job: dict[str, Any]


Key = Annotated[
    str | None,
    Header(min_length=1, max_length=200, description="The same key finds the same run again."),
]


def routes(site: Site) -> APIRouter:
    """Return the routes of jobs."""
    router = APIRouter(prefix=PREFIX, tags=["jobs"], responses=told(409, 413, 415, 429))
    store = site.store

    @router.post("/runs", status_code=202, responses={200: {"model": StateView}})
    def submit_job(
        request: Request,
        response: Response,
        given: Submission,
        who: Annotated[str, Depends(asker)],
        idempotency_key: Key = None,
    ) -> StateView:
        """Keep a job as a queued run: 202, or 200 where the key is known with this job."""
        site.submits.take(who)
        check_text([given.user, *given.tags])
        token: TokenRecord | None = request.state.token
        run_id, is_new = submit(
            store,
            admitted(given.job, site.settings),
            submission_id=idempotency_key,
            owner=token.name if token else given.user or getpass.getuser(),
            priority=given.priority,
            tags=checked_tags(given.tags),
            queue=True,
        )
        response.status_code = 202 if is_new else 200
        response.headers["Location"] = f"{PREFIX}/runs/{run_id}"
        return StateView(id=run_id, state=store.run(run_id).state)

    @router.post("/jobs/check")
    def check_job(given: Job) -> Checked:
        """Tell whether a job would be taken; nothing is imported, nothing is kept."""
        return Checked(job=masked_job(admitted(given.job, site.settings)))

    @router.get("/job-schema", response_class=Response)
    def schema() -> Response:
        """Return the JSON Schema of a job."""
        return Response(job_schema(), media_type="application/schema+json")

    @router.post("/runs/{run}/stop", status_code=202, responses={200: {"model": StateView}})
    def stop_run(run_id: RunId, response: Response) -> StateView:
        """Ask a run to stop: 200 where it has, 202 where its driver hears it within seconds."""
        state = store.request_stop(run_id)
        response.status_code = 200 if state in ENDED else 202
        return StateView(id=run_id, state=state)

    @router.post("/runs/{run}/resume", status_code=202)
    def resume_run(run_id: RunId) -> StateView:
        """Let a stopped, failed or abandoned run wait for a driver; it scores nothing twice."""
        store.queue(run_id)
        return StateView(id=run_id, state=store.run(run_id).state)

    return router
