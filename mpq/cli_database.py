"""Commands for the database itself."""

from __future__ import annotations

import typer

from mpq.cli_options import Storage

database = typer.Typer(no_args_is_help=True, help="The database that keeps every run.")


@database.command("upgrade")
def upgrade_database(storage: Storage = None) -> None:
    """Bring a database to this version's schema, keeping its data."""
    from mpq.store.migrate import upgrade

    upgrade(storage)
    typer.echo("the database is at this version's schema", err=True)
