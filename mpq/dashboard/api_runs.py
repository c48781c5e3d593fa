"""Runs over HTTP: found, looked at, tagged, deleted."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from mpq.core.errors import InvalidInputError
from mpq.dashboard.files import FileSuffix, sent
from mpq.dashboard.masking import masked_table
from mpq.dashboard.problems import told
from mpq.dashboard.site import RunId, Site
from mpq.dashboard.views import RunDetail, RunsView, run_detail, runs_view
from mpq.run_tables import runs_table
from mpq.store.query import NEWEST, RunQuery

PREFIX = "/api/v1"
MOST_RUNS = 1000
TagList = Annotated[list[Annotated[str, Field(max_length=100)]], Field(max_length=50)]
Text = Annotated[str, Field(max_length=500)]


class Filters(BaseModel):
    """Which runs, in which order; see `RunQuery` for what each means."""

    model_config = ConfigDict(extra="forbid")

    model: Text | None = None
    name: Text | None = None
    metric: Text | None = None
    state: Annotated[list[Text], Field(max_length=10)] = []
    owner: Text | None = None
    tag: Annotated[list[Text], Field(max_length=20)] = []
    since: Text | None = None
    until: Text | None = None
    budget: Text | None = None
    where: Annotated[list[Text], Field(max_length=20)] = []

    def wanted(self) -> dict[str, Any]:
        """Return them as `RunQuery` takes them."""
        found = self.model_dump(include=set(Filters.model_fields))
        return {**found, "state": self.state or None}


class Page(Filters):
    """Which runs, in which order, and how many."""

    sort: Text = NEWEST
    limit: Annotated[int, Field(ge=1, le=MOST_RUNS)] = 50
    cursor: Annotated[str, Field(max_length=2000)] | None = None

    def query(self) -> RunQuery:
        """Return what the store is asked; raises InvalidInputError."""
        return RunQuery(**self.wanted(), sort=self.sort)


class Tags(BaseModel):
    """The words that a run is found by."""

    model_config = ConfigDict(extra="forbid")

    tags: TagList


def checked_tags(tags: list[str]) -> list[str]:
    """Return tags; raises InvalidInputError (`tags`)."""
    if not all(tag.strip() and tag.isprintable() for tag in tags):
        raise InvalidInputError("tags", "a tag is a word of printable characters")
    return tags


def routes(site: Site) -> APIRouter:
    """Return the routes of runs."""
    router = APIRouter(prefix=PREFIX, tags=["runs"], responses=told(409))
    store = site.store

    @router.get("/runs")
    def list_runs(page: Annotated[Page, Query()]) -> RunsView:
        """List runs that meet every filter; `cursor` leads to the next ones."""
        return runs_view(store, page.query(), page.limit, page.cursor)

    @router.get("/runs.{suffix}", response_class=Response)
    def runs_file(suffix: FileSuffix, page: Annotated[Page, Query()]) -> Response:
        """Return runs and their numbers as a file."""
        found = store.run_page(page.query(), page.limit, page.cursor)
        return sent(masked_table(runs_table(found.rows)), suffix)

    @router.get("/runs/{run}")
    def one_run(run_id: RunId) -> RunDetail:
        """Return a run by its id, its beginning, a job's name or "latest"."""
        return run_detail(store, run_id)

    @router.put("/runs/{run}/tags")
    def tag_run(run_id: RunId, tags: Tags) -> RunDetail:
        """Give a run these tags in place of those it has."""
        store.set_tags(run_id, checked_tags(tags.tags))
        return run_detail(store, run_id)

    @router.delete("/runs/{run}", status_code=204)
    def delete_run(run_id: RunId) -> None:
        """Take a run out of the database."""
        store.delete_run(run_id)

    return router
