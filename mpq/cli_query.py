"""Commands that look at what is stored: lists, tables, comparisons, retention, health."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mpq.cli_options import AsJson, RunName, Storage

querying = typer.Typer()

Model = Annotated[str | None, typer.Option(help="Runs of this model; * is any text.")]
Name = Annotated[str | None, typer.Option(help="Runs of this name; * is any text.")]
Metric = Annotated[str | None, typer.Option(help="Runs scored by this metric.")]
State = Annotated[str | None, typer.Option(help="PENDING, RUNNING, ...; or several: A,B.")]
User = Annotated[str | None, typer.Option(help="Whose runs.")]
Tag = Annotated[list[str] | None, typer.Option(help="Runs with this tag; may repeat.")]
Since = Annotated[str | None, typer.Option(help="Created from then on: 2026-03-01, or 7d ago.")]
Until = Annotated[str | None, typer.Option(help="Created before then.")]
BudgetPart = Annotated[str | None, typer.Option(help="Part of a budget: 'memory <= 60%'.")]
Where = Annotated[
    list[str] | None,
    typer.Option(help="A bound on a number of the result: 'divergence <= 0.1'; may repeat."),
]
Out = Annotated[Path | None, typer.Option(help="Write a file (.csv, .jsonl or .parquet).")]
AsFormat = Annotated[str | None, typer.Option("--format", help="csv, jsonl or parquet.")]


@querying.command("list", rich_help_panel="Inspect")
def list_runs(
    storage: Storage = None,
    model: Model = None,
    name: Name = None,
    metric: Metric = None,
    state: State = None,
    user: User = None,
    tag: Tag = None,
    since: Since = None,
    until: Until = None,
    budget: BudgetPart = None,
    where: Where = None,
    sort: Annotated[
        str,
        typer.Option(
            help="created_at, name or a number of the result such as memory (runs without it "
            "are left out); -created_at is the newest first."
        ),
    ] = "-created_at",
    limit: Annotated[int, typer.Option(help="How many at most.")] = 20,
    after: Annotated[str | None, typer.Option(help="Go on where a list ended.")] = None,
    as_format: AsFormat = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Print the runs that meet every filter, the newest first."""
    from mpq.listed import print_page, put_out
    from mpq.run_tables import runs_table
    from mpq.store.query import RunQuery
    from mpq.store.store import open_store

    query = RunQuery(
        **_wanted(model, name, metric, state, user, tag, since, until, budget, where), sort=sort
    )
    with open_store(storage) as store:
        page = store.run_page(query, limit, after)
        if as_format or out:
            put_out(runs_table(page.rows), as_format, out)
            return
        number = query.sort_name if query.names and query.sort_name in query.names else None
        print_page(page, as_json, number)


def _wanted(
    model: str | None,
    name: str | None,
    metric: str | None,
    state: str | None,
    user: str | None,
    tag: list[str] | None,
    since: str | None,
    until: str | None,
    budget: str | None,
    where: list[str] | None,
) -> dict[str, Any]:
    states = None if state is None else [text.strip() for text in state.split(",")]
    equal = {"model": model, "name": name, "metric": metric, "state": states, "owner": user}
    others = {"since": since, "until": until, "budget": budget}
    return {**equal, **others, "tag": tag or (), "where": where or ()}


@querying.command("show", rich_help_panel="Inspect")
def show(
    run: RunName = "latest",
    storage: Storage = None,
    table: Annotated[
        str | None, typer.Option(help="Only this: scores, costs, allocation or evaluations.")
    ] = None,
    as_format: AsFormat = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Print a stored run: budgets, the chosen schemes, predicted against measured."""
    from mpq.core.errors import InvalidInputError
    from mpq.store.store import open_store

    if table is None and (as_format or out):
        raise InvalidInputError(
            "table", "--format and --out are for one table: add --table scores, for example"
        )
    with open_store(storage) as store:
        run_id = store.resolve_run(run)
        if table is None:
            from mpq.terminal import print_run

            print_run(store, run_id, as_json)
            return
        from mpq.listed import put_out
        from mpq.run_tables import run_table

        put_out(run_table(store, run_id, table), "jsonl" if as_json else as_format, out)


@querying.command("compare", rich_help_panel="Inspect")
def compare(
    runs: Annotated[list[str], typer.Argument(help="Two runs or more.", metavar="RUN RUN...")],
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Print how the schemes, totals and measurements of runs differ; loads no model."""
    from mpq.comparison import compare_runs
    from mpq.listed import print_comparison
    from mpq.store.store import open_store

    with open_store(storage) as store:
        print_comparison(compare_runs(store, runs), as_json)


@querying.command("layers", rich_help_panel="Inspect")
def layers(
    storage: Storage = None,
    model: Model = None,
    name: Name = None,
    metric: Metric = None,
    user: User = None,
    tag: Tag = None,
    since: Since = None,
    until: Until = None,
    budget: BudgetPart = None,
    where: Where = None,
    bits: Annotated[int, typer.Option(help="Name the layers that always got so many.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Print how often the runs of one model gave each layer how many bits."""
    from mpq.layer_use import layer_uses
    from mpq.listed import print_layers
    from mpq.store.store import open_store

    wanted = _wanted(model, name, metric, None, user, tag, since, until, budget, where)
    with open_store(storage) as store:
        print_layers(layer_uses(store, **wanted), bits, as_json)


@querying.command("gc", rich_help_panel="Operate")
def collect_garbage(
    storage: Storage = None,
    older_than: Annotated[str, typer.Option(help="12h, 30d, 8w, ...")] = "30d",
    keep_tagged: Annotated[bool, typer.Option(help="Keep runs that have a tag.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only tell what would go.")] = False,
    vacuum: Annotated[bool, typer.Option(help="Make the SQLite file smaller.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove runs that ended long ago, and scores and artifacts that no run needed since."""
    from mpq.core.moments import span
    from mpq.findings import print_removed
    from mpq.store.retention import collect
    from mpq.store.store import open_store

    limit = span(older_than)
    with open_store(storage) as store:
        options = {"keep_tagged": keep_tagged, "dry_run": dry_run, "vacuum": vacuum}
        print_removed(collect(store, limit, **options), dry_run, as_json)


@querying.command("formats", rich_help_panel="Inspect")
def formats(
    shape: Annotated[str, typer.Option(help="Of the weight, outputs x inputs.")] = "4096x4096",
    as_json: AsJson = False,
) -> None:
    """List the number formats, how they are written and what a weight takes in them."""
    from mpq.format_listing import parse_shape, print_formats

    print_formats(parse_shape(shape), as_json)


@querying.command("doctor", rich_help_panel="Operate")
def doctor(
    storage: Storage = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Also join this Ray cluster, host:port or 'auto'.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this installation: versions, database, disk, Ray, kernels, threads."""
    from mpq.doctor import examine
    from mpq.findings import print_findings

    raise SystemExit(print_findings(examine(storage, ray_address), as_json))
