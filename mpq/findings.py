"""Findings and what was removed, for a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import typer
from rich.text import Text

from mpq.console import new_console
from mpq.core.finding import Finding
from mpq.core.quantities import quantity
from mpq.store.retention import Removed

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def print_findings(found: Sequence[Finding], as_json: bool = False) -> int:
    """Print one line each with its fix, and return the exit code: 1 where something fails."""
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        console = new_console()
        for finding in found:
            fix = f" -> {finding.fix}" if finding.fix else ""
            state = (f"{finding.state:<5}", _COLOURS[finding.state])
            line = Text.assemble(state, f"{finding.name}: {finding.found}{fix}")
            console.print(line, soft_wrap=True)
    return int(any(finding.state == "fail" for finding in found))


def print_removed(removed: Removed, dry_run: bool, as_json: bool = False) -> None:
    """Print what went, or would go."""
    if as_json:
        typer.echo(json.dumps({**asdict(removed), "dry_run": dry_run}, indent=2))
        return
    for run_id in removed.runs:
        typer.echo(run_id)
    verb = "would remove" if dry_run else "removed"
    typer.echo(
        f"{verb} {len(removed.runs)} runs (about {quantity(removed.run_bytes, 'bytes')}), "
        f"{removed.partials} results of tasks ({quantity(removed.partial_bytes, 'bytes')}) and "
        f"{removed.artifacts} artifacts ({quantity(removed.artifact_bytes, 'bytes')})",
        err=True,
    )
    if removed.file_bytes:
        before, after = (quantity(size, "bytes") for size in removed.file_bytes)
        free = (
            "" if removed.file_bytes[1] < removed.file_bytes[0] else "; --vacuum makes it smaller"
        )
        typer.echo(f"the file had {before} and has {after}{free}", err=True)
