"""The command line: standard output is data, standard error is progress and errors.

Exit codes: 0 done, 1 the run failed, 2 bad input, 3 no allocation fits, 4 database out of reach.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mpq.cli_database import database
from mpq.cli_options import AsJson, RayAddress, RunName, Storage
from mpq.cli_query import querying
from mpq.cli_serve import http
from mpq.cli_service import serving

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Choose the number format of every layer under memory and measured-latency budgets.",
)
app.add_typer(database, name="db", rich_help_panel="Operate")
app.add_typer(querying)
app.add_typer(serving)
app.add_typer(http)


@app.command("run", rich_help_panel="Run")
def run_here(
    job: Annotated[Path, typer.Argument(help="A job file, .toml or .json.")],
    storage: Storage = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="Replace the job's budgets, e.g. --budget 'memory <= 4 MB'."),
    ] = None,
    executor: Annotated[str | None, typer.Option(help="Where tasks run: ray or serial.")] = None,
    ray_address: RayAddress = None,
    worker: Annotated[
        list[str] | None,
        typer.Option(help="What each worker of Ray takes: gpu=1, device:NAME=1; may repeat."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Where to write the HTML page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Search here and now, print the answer and write its HTML page."""
    from mpq.jobfile import load_job, parse_resources
    from mpq.report import check_writable
    from mpq.terminal import print_run

    check_writable(report or Path("mpq-report.html"))  # not after an hour of search
    changes = {
        "budgets": budget,
        "executor": executor,
        "ray_address": ray_address,
        "worker_resources": parse_resources(worker or []),
    }
    spec = load_job(job, {key: value for key, value in changes.items() if value})

    from mpq.progress import Bars
    from mpq.searching import run_job

    result = run_job(spec, storage, Bars())
    page = result.report(report or Path(f"mpq-report-{result.run_id}.html"))
    print_run(result.store, result.run_id, as_json)
    typer.echo(f"run {result.run_id} is stored; page: {page}", err=True)


@app.command("referee", rich_help_panel="Run")
def referee(
    job: Annotated[Path, typer.Argument(help="A job file, .toml or .json.")],
    metrics: Annotated[
        str | None, typer.Option(help="Names, e.g. gauss_newton,kl (default: all there are).")
    ] = None,
    seconds: Annotated[float, typer.Option(help="What scoring may take.")] = 300.0,
    allocations: Annotated[int, typer.Option(help="Random allocations at each budget.")] = 12,
    storage: Storage = None,
    executor: Annotated[str | None, typer.Option(help="Where tasks run: ray or serial.")] = None,
    ray_address: RayAddress = None,
    as_json: AsJson = False,
) -> None:
    """Compare sensitivity metrics on a job's network by what their choices really do."""
    from mpq.jobfile import load_job
    from mpq.referee.told import print_referee

    changes = {"executor": executor, "ray_address": ray_address}
    spec = load_job(job, {key: value for key, value in changes.items() if value})
    names = None if metrics is None else [name.strip() for name in metrics.split(",")]

    from mpq.progress import Bars
    from mpq.referee.compare import compare_job

    report = compare_job(
        spec,
        metrics=names,
        seconds=seconds,
        allocations=allocations,
        storage=storage,
        progress=Bars(),
    )
    print_referee(report, as_json)
    typer.echo(f"run {report.run_id} is stored", err=True)


@app.command("plan", rich_help_panel="Run")
def plan_here(
    model: Annotated[
        str,
        typer.Argument(
            help="A directory with a Hugging Face config.json, or package.module:factory.",
        ),
    ],
    bits: Annotated[float, typer.Option(help="Mean bits per weight, scales included.")] = 4.0,
    hardware: Annotated[str, typer.Option(help="A machine.")] = "roofline:H100",
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    seq: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 2048,
    context: Annotated[
        int | None, typer.Option(help="Tokens in the KV cache when decoding (default: --seq).")
    ] = None,
    schemes: Annotated[
        str | None, typer.Option(help="Schemes to compare, e.g. bf16,int8:int8,int4g128.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="e.g. '48 GB' (default: the machine's).")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="A layer or pattern to leave as it is; may repeat.")
    ] = None,
    sample: Annotated[
        str | None, typer.Option(help="Entry point of a batch, for other than language models.")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="What fits keeps it, e.g. 'decode <= 20 ms'; may repeat."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell bytes and modelled times of a network on a machine; loads no weights."""
    from mpq.plan_terminal import print_plan
    from mpq.planning import plan

    found = plan(
        model,
        bits=bits,
        hardware=hardware,
        batch=batch,
        tokens=seq,
        context=context,
        schemes=None if schemes is None else [text.strip() for text in schemes.split(",")],
        memory=memory,
        skip=skip or (),
        sample=sample,
        budgets=budget or (),
    )
    print_plan(found, as_json)


@app.command("deploy", rich_help_panel="Run")
def deploy_run(
    run: RunName = "latest",
    model: Annotated[
        str | None,
        typer.Argument(help="Entry point or directory (default: the run's)."),
    ] = None,
    to: Annotated[str, typer.Option(help="The runtime: onnxruntime or torch_cpu.")] = "onnxruntime",
    out: Annotated[
        Path | None, typer.Option(help="The file to write (default: model.onnx or model.pt).")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Entry point of batches (default: the run's).")
    ] = None,
    sample: Annotated[
        str | None, typer.Option(help="Entry point of the timed batch (default: the run's).")
    ] = None,
    seconds: Annotated[float, typer.Option(help="What timing may take.")] = 10.0,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Write the chosen network for a runtime, check what it returns, and time it."""
    import json

    from mpq.core.jobs import RunState
    from mpq.result import SearchResult
    from mpq.store.store import open_store

    with open_store(storage) as store:
        result = SearchResult(store, store.resolve_run(run, RunState.SUCCEEDED))
        given: dict[str, Any] = {"model": model, "calibration": calibration, "sample": sample}
        path = out or Path("model.onnx" if to == "onnxruntime" else "model.pt")
        made = result.deploy(to, path, seconds=seconds, **given)
        typer.echo(json.dumps(made.view(), indent=2) if as_json else "\n".join(made.lines()))


@app.command("solve", rich_help_panel="Inspect")
def solve_again(
    run: RunName = "latest",
    budget: Annotated[
        list[str] | None, typer.Option(help="A budget, e.g. 'bops <= 50%'; may repeat.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="e.g. 60%, '8.5 MB', '4.25 bpw'.")] = None,
    latency: Annotated[str | None, typer.Option(help="e.g. 60% or '3 ms'.")] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(help="Fix a layer, unit or pattern: NAME=SCHEME."),
    ] = None,
    forbid: Annotated[
        list[str] | None,
        typer.Option(help="Not both of these: NAME=SCHEME,NAME=SCHEME; may repeat."),
    ] = None,
    least: Annotated[
        list[str] | None,
        typer.Option(help="Minimise this cost for a --score; NAME=WEIGHT of several to add."),
    ] = None,
    score: Annotated[
        float | None, typer.Option(help="Predicted loss at most, with --least.")
    ] = None,
    solver: str = "auto",
    risk: Annotated[
        float | None,
        typer.Option(
            help="Probability that each budget on measured costs holds with, e.g. 0.95 "
            "(default: the job's; 0.5 takes them as they are)."
        ),
    ] = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Choose again from stored scores for other budgets; loads no model and no torch."""
    from mpq.core.evaluation import CHOSEN
    from mpq.core.jobs import RunState
    from mpq.core.risk import risk_of
    from mpq.pins import parse_forbidden, parse_pins, resolve_forbidden, resolve_pins
    from mpq.result import least_within, parse_weights
    from mpq.stated import stated
    from mpq.store.store import open_store
    from mpq.terminal import print_least, print_solution
    from solvers import USE_PAIRS, solve

    texts = list(budget or [])
    texts += [f"{name} <= {v}" for name, v in (("memory", memory), ("latency", latency)) if v]
    with open_store(storage) as store:
        run_id = store.resolve_run(run, RunState.SUCCEEDED)
        problem = store.problem(run_id, with_responses=solver in USE_PAIRS)
        graph = store.graph(run_id)
        pins = resolve_pins(graph, parse_pins(pin or []))
        spec, solutions = store.run(run_id).spec, dict(store.solutions(run_id))
        pairs = resolve_forbidden(graph, parse_forbidden(forbid or []))
        asked = stated(problem, texts or solutions[CHOSEN].budgets, pins, pairs)
        risk = risk_of(spec.risk if risk is None else risk, asked.costs, asked.limits())
        weights = parse_weights(least or [], score)
        if weights and score is not None:
            found = least_within(asked, weights, score, risk, capped=bool(texts))
            print_least(graph, asked, found, as_json)
        else:
            print_solution(graph, asked, solve(asked, solver, risk), as_json)


@app.command("frontier", rich_help_panel="Inspect")
def show_frontier(
    run: RunName = "latest",
    cost: Annotated[
        str, typer.Option(help="memory, latency, bops, or two of them: memory,latency.")
    ] = "memory",
    points: Annotated[int | None, typer.Option(help="Evenly spaced limits (of each cost).")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every allocation that nothing beats, however near.")
    ] = False,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Print the proven trade-off between costs and predicted loss; loads no model."""
    from mpq.core.errors import InvalidInputError
    from mpq.core.jobs import RunState
    from mpq.result import KEPT_GRID, KEPT_POINTS, SearchResult
    from mpq.store.store import open_store
    from mpq.terminal import print_frontier, print_surface

    with open_store(storage) as store:
        result = SearchResult(store, store.resolve_run(run, RunState.SUCCEEDED))
        costs = tuple(name.strip() for name in cost.split(","))
        if every and points is not None:
            raise InvalidInputError("points", f"--all is every point, not {points}: leave one out")
        if len(costs) == 1:
            evenly = KEPT_POINTS if points is None else points
            found = result.frontier(cost, None if every else evenly)
            print_frontier(result.problem, found, as_json)
            return
        if len(costs) != 2 or every:
            raise InvalidInputError(
                "cost", f"a frontier is of one cost or, without --all, of two, got {cost!r}"
            )
        grid = KEPT_GRID if points is None else (points, points)
        print_surface(result.problem, result.surface((costs[0], costs[1]), grid), as_json)


@app.command("report", rich_help_panel="Inspect")
def report_page(run: RunName = "latest", out: Path | None = None, storage: Storage = None) -> None:
    """Write the HTML page of a stored run: frontier, bits per layer, measurements."""
    from mpq.core.jobs import RunState
    from mpq.report import write_report
    from mpq.store.store import open_store

    with open_store(storage) as store:
        run_id = store.resolve_run(run, RunState.SUCCEEDED)
        page = write_report(store, run_id, out or Path(f"mpq-report-{run_id}.html"))
        typer.echo(str(page))


@app.command("export", rich_help_panel="Inspect")
def export_run(
    run: RunName = "latest",
    to: Annotated[
        str, typer.Option(help="A target: mpq, compressed-tensors, torchao, gguf, ...")
    ] = "mpq",
    out: Annotated[
        Path | None, typer.Option(help="The file (default: mpq-TARGET with its suffix, here).")
    ] = None,
    strip: Annotated[str, typer.Option(help="Taken off the names of layers: 'encoder.'")] = "",
    storage: Storage = None,
) -> None:
    """Write the chosen allocation as another tool reads it; loads no model."""
    from mpq.core.jobs import RunState
    from mpq.result import SearchResult
    from mpq.store.store import open_store

    with open_store(storage) as store:
        result = SearchResult(store, store.resolve_run(run, RunState.SUCCEEDED))
        typer.echo(str(result.export(to, out, strip=strip)))


def main() -> None:
    """Run the command line; an MpqError is one line and its exit code."""
    from mpq.core.errors import MpqError

    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except MpqError as error:
        if debug:
            raise
        typer.echo(f"error[{error.code}]: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
