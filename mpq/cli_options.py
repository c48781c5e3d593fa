"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Storage = Annotated[
    str | None,
    typer.Option(
        help="Database URL or SQLite file (default: $MPQ_STORAGE, else mpq.db here).",
    ),
]
RunName = Annotated[
    str, typer.Argument(help="Run id, its beginning, a job's name, or 'latest'.", metavar="RUN")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        help="A module whose classes kept networks may have, beside $MPQ_TRUSTED_MODULES; "
        "may repeat."
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        help="The dashboard of a Ray cluster, http://head:8265: a job of it drives the run."
    ),
]
RayAddress = Annotated[
    str | None, typer.Option(help="A Ray cluster: auto or host:port (default: a local Ray).")
]
