"""Runs that others drive, for a terminal: their state, their log, their progress."""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import typer

from mpq.core.deployment import DEPLOYED
from mpq.core.errors import RunFailedError
from mpq.core.jobs import ENDED, RunState
from mpq.service import Watched, wait
from mpq.store.store import Store
from mpq.transport import fail_if_lost, waits_in_ray

_LOOK_S = 0.5


def print_status(store: Store, run_id: str, as_json: bool) -> None:
    """Print the state of a run, who drives it and how far its stages are."""
    untold = fail_if_lost(store, run_id)
    run, job, stages = store.run(run_id), store.job(run_id), store.progress(run_id)
    if as_json:
        plain = {
            "run_id": run.id,
            "name": run.name,
            "state": run.state.value,
            "error_code": run.error_code,
            "error_message": run.error_message,
            "created_at": run.created_at,
            "started_at": run.started_at,
            "ended_at": run.ended_at,
            **dataclasses.asdict(job),
            "stages": [dataclasses.asdict(stage) for stage in stages],
        }
        typer.echo(json.dumps(plain, indent=2, default=str))
        return
    typer.echo(f"{run.id} {run.name or '-'}: {run.state.value}")
    if waits_in_ray(job) and run.state not in ENDED:
        typer.echo(f"given to a {job.driver}, which has not begun: {untold or 'it waits there'}")
    elif job.is_driven:
        since = "" if job.driven_since is None else f" since {job.driven_since:%Y-%m-%d %H:%M:%S}"
        typer.echo(f"driven by {job.driver}{since} UTC")
    elif run.state not in ENDED:
        typer.echo("nobody drives it: 'mpq drive' takes queued runs, 'mpq resume' this one")
    for stage in stages:
        typer.echo(f"  {stage.stage}: {stage.done} of {stage.total}")
    if run.error_message:
        typer.echo(f"error[{run.error_code}]: {run.error_message}")


def print_logs(store: Store, run_id: str, *, follow: bool, as_json: bool) -> None:
    """Print the lines of a run's log, and with `follow` those that come until it has ended."""
    last = 0
    while True:
        state = store.run(run_id).state
        for event in store.events(run_id, last):
            last = event.id
            if as_json:
                typer.echo(json.dumps(dataclasses.asdict(event), default=str))
            elif event.kind != DEPLOYED:
                typer.echo(f"{event.at:%Y-%m-%d %H:%M:%S} {event.kind}: {event.message}")
        if not follow or state in ENDED:
            return
        time.sleep(_LOOK_S)


def follow(store: Store, run_id: str) -> int:
    """Show bars of a run's stages on standard error until it has ended; return its exit code."""
    with LiveStages() as bars:
        state = wait(store, run_id, listen=bars.look)
    run = store.run(run_id)
    if state is RunState.SUCCEEDED:
        return 0
    if run.error_message:
        typer.echo(f"error[{run.error_code}]: {run.error_message}", err=True)
    return 130 if state is RunState.STOPPED else RunFailedError.exit_code


class LiveStages:
    """One bar for each stage of a run that is driven elsewhere; silent off a terminal."""

    def __enter__(self) -> LiveStages:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._tasks: dict[str, int] = {}
        self._bars = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def look(self, runs: Watched, run_id: str) -> None:
        """Bring the bars up to date."""
        for stage in runs.progress(run_id):
            if stage.stage not in self._tasks:
                self._tasks[stage.stage] = self._bars.add_task(stage.stage, total=stage.total)
            task = self._bars.tasks[self._tasks[stage.stage]]
            self._bars.update(task.id, completed=stage.done, total=stage.total)
