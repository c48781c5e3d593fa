"""Commands for the server: start it, and who may ask it."""

from __future__ import annotations

from typing import Annotated

import typer

from mpq.cli_options import AsJson, Storage

http = typer.Typer()
tokens = typer.Typer(no_args_is_help=True, help="Who may ask 'mpq serve', and what.")
http.add_typer(tokens, name="token", rich_help_panel="Serve")


@http.command("serve", rich_help_panel="Serve")
def serve_http(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65535)] = 8080,
    storage: Storage = None,
    allow_module: Annotated[
        list[str] | None,
        typer.Option(help="Jobs may name entry points of this package; may repeat."),
    ] = None,
    allow_hub: Annotated[bool, typer.Option(help="Jobs may name Hugging Face models.")] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A name that this machine is reached by; may repeat."),
    ] = None,
    require_token: Annotated[
        bool, typer.Option(help="Ask for a token even before one was made.")
    ] = False,
    drivers: Annotated[
        int, typer.Option(help="Queued runs driven at once (0: leave them to 'mpq drive').", min=0)
    ] = 1,
) -> None:
    """Serve the REST API, the dashboard and metrics, and drive what is submitted."""
    from mpq.dashboard.serve import serve
    from mpq.dashboard.settings import Settings, is_loopback, names_of

    settings = Settings(
        allow_modules=tuple(allow_module or ()),
        allow_hub=allow_hub,
        allow_hosts=(*(allow_host or ()), *names_of(host)),
        require_token=require_token or not is_loopback(host),
    )
    serve(storage, settings, host=host, port=port, drivers=drivers)


@tokens.command("create")
def create_token(
    name: Annotated[str, typer.Argument(help="Whose it is, or what for.")],
    scope: Annotated[
        str,
        typer.Option(help="read: look; submit: also submit, stop, tag; admin: also delete."),
    ] = "read",
    days: Annotated[float, typer.Option(help="How long it is valid.")] = 30.0,
    storage: Storage = None,
) -> None:
    """Make a token and print its secret, which is shown this once."""
    from mpq.core.access import Scope
    from mpq.core.errors import unknown
    from mpq.store.store import open_store

    if scope not in list(Scope):
        raise unknown("scope", scope, list(Scope))
    with open_store(storage) as store:
        made, secret = store.create_token(name, Scope(scope), days)
        typer.echo(secret)
        until = f"{made.expires_at:%Y-%m-%d %H:%M} UTC"
        typer.echo(f"token {made.id} {name!r}: {scope} until {until}", err=True)


@tokens.command("list")
def list_tokens(storage: Storage = None, as_json: AsJson = False) -> None:
    """Print the tokens, without their secrets."""
    from mpq.listed import print_tokens
    from mpq.store.store import open_store

    with open_store(storage) as store:
        print_tokens(store.tokens(), as_json)


@tokens.command("revoke")
def revoke_token(
    token: Annotated[str, typer.Argument(help="Its id or its name.")], storage: Storage = None
) -> None:
    """End a token at once."""
    from mpq.store.store import open_store

    with open_store(storage) as store:
        for token_id in store.revoke_token(token):
            typer.echo(token_id)
