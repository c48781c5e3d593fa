"""Commands for the database itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpq.cli_options import AsJson, Storage

database = typer.Typer(no_args_is_help=True, help="The database that keeps every run.")


@database.command("upgrade")
def upgrade_database(storage: Storage = None) -> None:
    """Bring a database to this version's schema, keeping its data."""
    from mpq.store.migrate import upgrade

    upgrade(storage)
    typer.echo("the database is at this version's schema", err=True)


@database.command("backup")
def backup_database(
    file: Annotated[Path, typer.Argument(help="The new file.")], storage: Storage = None
) -> None:
    """Copy a SQLite database to a file, also while runs go on."""
    from mpq.store.health import backup

    size = backup(storage, file)
    typer.echo(f"{file}: {size} bytes", err=True)


@database.command("check")
def check(storage: Storage = None, as_json: AsJson = False) -> None:
    """Check a database: whole, of this version, no run left without a driver."""
    from mpq.findings import print_findings
    from mpq.store.health import check_database

    raise SystemExit(print_findings(check_database(storage), as_json))
