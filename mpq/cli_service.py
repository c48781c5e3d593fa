"""Commands for runs that a process of its own drives: verbs and states are those of Ray Jobs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from mpq.cli_options import AsJson, Ray, RunName, Storage, Trust

serving = typer.Typer()


@serving.command("submit", rich_help_panel="Serve")
def submit_job(
    job: Annotated[Path, typer.Argument(help="A job file, .toml or .json.")],
    storage: Storage = None,
    submission_id: Annotated[
        str | None, typer.Option(help="The same id finds the same run again.")
    ] = None,
    priority: Annotated[int, typer.Option(help="Of queued runs the highest comes first.")] = 0,
    tag: Annotated[list[str] | None, typer.Option(help="A word to find it by; may repeat.")] = None,
    user: Annotated[str | None, typer.Option(help="Whose run it is (default: yours).")] = None,
    queue: Annotated[bool, typer.Option(help="Leave it to whichever 'mpq drive' is next.")] = False,
    ray: Ray = None,
    wait: Annotated[bool, typer.Option(help="Stay until it has ended.")] = False,
) -> None:
    """Keep a job and let a process of its own drive it; prints the id of the run."""
    from mpq.core.errors import MpqWarning
    from mpq.jobfile import load_job
    from mpq.served import follow
    from mpq.service import submit
    from mpq.store.store import open_store

    with open_store(storage) as store:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", MpqWarning)
            run_id, is_new = submit(
                store,
                load_job(job),
                submission_id=submission_id,
                owner=user,
                priority=priority,
                tags=tag or (),
                queue=queue,
                ray=ray,
            )
        typer.echo(run_id)
        for warning in told:
            typer.echo(str(warning.message), err=True)
        if not is_new:
            typer.echo(f"submission {submission_id!r} is this run already", err=True)
        if wait:
            raise SystemExit(follow(store, run_id))


@serving.command("status", rich_help_panel="Serve")
def show_status(
    run: RunName = "latest",
    storage: Storage = None,
    wait: Annotated[bool, typer.Option(help="Stay until it has ended.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell the state of a run, who drives it and how far it is."""
    from mpq.served import follow, print_status
    from mpq.store.store import open_store

    with open_store(storage) as store:
        run_id = store.resolve_run(run)
        code = follow(store, run_id) if wait else 0
        print_status(store, run_id, as_json)
        raise SystemExit(code)


@serving.command("logs", rich_help_panel="Serve")
def show_logs(
    run: RunName = "latest",
    storage: Storage = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until it has ended.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the log of a run."""
    from mpq.served import print_logs
    from mpq.store.store import open_store

    with open_store(storage) as store:
        print_logs(store, store.resolve_run(run), follow=follow, as_json=as_json)


@serving.command("stop", rich_help_panel="Serve")
def stop_run(run: RunName, storage: Storage = None) -> None:
    """Stop a run; what it found stays, and 'mpq resume' goes on from there."""
    from mpq.core.jobs import ENDED
    from mpq.service import stop
    from mpq.store.store import open_store

    with open_store(storage) as store:
        run_id = store.resolve_run(run)
        state = stop(store, run_id)
        typer.echo(f"{run_id} {state}")
        raise SystemExit(0 if state in ENDED else 1)


@serving.command("resume", rich_help_panel="Serve")
def resume_run(
    run: RunName,
    storage: Storage = None,
    detach: Annotated[bool, typer.Option(help="Let a process of its own drive it.")] = False,
    trust: Trust = None,
    ray: Ray = None,
) -> None:
    """Go on with a stopped, failed or abandoned run; finished scores are used again."""
    from mpq.driver import drive
    from mpq.service import start_driver
    from mpq.store.store import open_store
    from mpq.trust import trust as trust_also

    trust_also(trust or ())
    with open_store(storage) as store:
        run_id = store.resolve_run(run)
        if detach or ray:
            start_driver(store, run_id, ray=ray)
        else:
            drive(store, run_id)
        typer.echo(run_id)


@serving.command("drive", rich_help_panel="Serve")
def drive_queued(
    storage: Storage = None,
    drivers: Annotated[int, typer.Option(help="Runs at once.", min=1)] = 1,
    per_user: Annotated[
        int | None, typer.Option(help="Runs at once of one user at most.", min=1)
    ] = None,
    until_empty: Annotated[bool, typer.Option(help="End when nothing waits.")] = False,
    ready: Annotated[
        bool, typer.Option(help="Keep one more process that has imported everything.")
    ] = True,
    ray_address: Annotated[
        str | None, typer.Option(help="Keep one worker of this Ray cluster ready as well.")
    ] = None,
    trust: Trust = None,
) -> None:
    """Drive queued runs, and those whose driver went away, until interrupted."""
    from mpq.service import drive_queue
    from mpq.store.store import open_store
    from mpq.trust import trust as trust_also

    trust_also(trust or ())
    with open_store(storage) as store:
        drive_queue(
            store,
            drivers=drivers,
            per_owner=per_user,
            until_empty=until_empty,
            ready=ready and not until_empty,
            ray_address=ray_address,
        )


@serving.command("delete", rich_help_panel="Serve")
def delete_run(run: RunName, storage: Storage = None) -> None:
    """Take a run out of the database; scores under their content keys stay for other runs."""
    from mpq.store.store import open_store

    with open_store(storage) as store:
        run_id = store.resolve_run(run)
        store.delete_run(run_id)
        typer.echo(run_id)
