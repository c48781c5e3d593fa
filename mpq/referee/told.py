"""A referee's report as terminal tables or JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from mpq.console import new_console
from mpq.core.evaluation import DIVERGENCE_NAMES
from mpq.core.quantities import quantity
from mpq.core.referee import RefereeReport
from mpq.referee.ranks import LEAST_PAIRS
from mpq.terminal import finite


def print_referee(report: RefereeReport, as_json: bool = False) -> None:
    """Print how metrics compare, the picked one first."""
    if as_json:
        print(json.dumps(_referee_view(report), indent=2))
        return
    console = new_console()
    console.print(_verdict_table(report))
    console.print()
    console.print(_regret_table(report))
    if any(v.spearman is None for v in report.verdicts):
        console.print(
            Text(
                f"no rank correlation: the budgets leave {report.num_random} different random "
                f"allocations, {LEAST_PAIRS} at one of them are needed",
                "dim",
            )
        )
    for name, reason in report.refused.items():
        console.print(Text(f"{name} left out: {reason}", "dim"))
    console.print(Text.assemble("picked: ", (report.picked, "bold")))


def _verdict_table(report: RefereeReport) -> Table:
    table = Table("metric", box=None, header_style="bold")
    for column in ("mean regret", "Spearman", "Kendall", "predicted/measured", "seconds", "memory"):
        table.add_column(column, justify="right")
    for v in report.verdicts:
        table.add_row(
            Text(v.metric, "bold" if v.metric == report.picked else ""),
            _regret(v.regret),
            _correlation(v.spearman, v.spearman_stderr),
            _correlation(v.kendall, v.kendall_stderr),
            "-" if v.ratio is None else f"{v.ratio:.2f}",
            f"{v.seconds:.1f}",
            "-" if v.peak_bytes is None else quantity(v.peak_bytes, "bytes"),
        )
    table.caption = (
        f"{report.num_measured} allocations measured on calibration data "
        f"({DIVERGENCE_NAMES[report.divergence]}), {report.num_random} of them random"
    )
    return table


def _regret_table(report: RefereeReport) -> Table:
    table = Table("regret within", box=None, header_style="bold")
    for setting in report.budgets:
        table.add_column(" and ".join(b.text for b in setting), justify="right")
    for v in report.verdicts:
        table.add_row(v.metric, *map(_regret, v.regrets))
    best = (f"{value:.3g}" for value in report.best)
    table.add_row("best measured", *best, style="dim")
    return table


def _regret(regret: float) -> str:
    return f"{regret:.1%}" if regret < 10 else f"{regret + 1:.3g} x best"


def _correlation(value: float | None, stderr: float | None) -> str:
    return "-" if value is None else f"{value:.2f} ± {stderr:.2f}"


def _referee_view(report: RefereeReport) -> dict[str, Any]:
    """Return a report as plain data; infinite regrets become null."""
    view = asdict(report)
    for verdict in view["verdicts"]:
        verdict["regret"] = finite(verdict["regret"])
        verdict["regrets"] = [finite(regret) for regret in verdict["regrets"]]
    view["best"] = [finite(value) for value in report.best]
    return view
