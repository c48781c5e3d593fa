"""The process that serves: uvicorn around the app, and a thread that drives queued runs."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import typer
import uvicorn

from mpq.core.errors import InvalidInputError
from mpq.dashboard.app import create_app
from mpq.dashboard.settings import Settings, is_loopback
from mpq.service import drive_queue
from mpq.store.store import Store, open_store

_LOG = logging.getLogger("mpq.dashboard")
_PATIENCE_S = 2.0  # a request answers 503 sooner than a run would give its database up
_SHUTDOWN_S = 3
_BACKLOG = 2048
_PAUSE_S = 10.0


def serve(
    storage: str | os.PathLike[str] | None,
    settings: Settings,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    drivers: int = 1,
) -> None:
    """Serve until interrupted.

    Raises InvalidInputError where anybody could ask without a token (`token_needed`) or the
    port is in use (`port`).
    """
    with open_store(storage, patience_s=_PATIENCE_S) as store:
        _check_reach(store, host)
        listening = _listen(host, port)
        config = uvicorn.Config(
            create_app(store, settings),
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=_SHUTDOWN_S,
            limit_concurrency=1000,
        )
        shown = f"[{host}]" if ":" in host else host
        typer.echo(f"http://{shown}:{listening.getsockname()[1]}", err=True)
        threading.Thread(target=_warm, name="warm", daemon=True).start()
        with _driving(storage, drivers), listening:
            uvicorn.Server(config).run(sockets=[listening])


def _warm() -> None:
    from solvers.what_if import warm  # compiles, which the start does not wait for

    warm()


def _check_reach(store: Store, host: str) -> None:
    if not is_loopback(host) and not any(token.is_valid for token in store.tokens()):
        raise InvalidInputError(
            "token_needed",
            f"--host {host} lets other machines ask, and there is no token yet: make one with "
            "'mpq token create NAME --scope submit' first",
        )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # Without its protocol asyncio takes it for none whose answers must not wait for others.
        made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(_BACKLOG)  # who asks from now on waits until the app has started
    except OSError as error:
        raise InvalidInputError(
            "port",
            f"cannot listen on {host} port {port}: {(error.strerror or str(error)).lower()}; "
            "choose another one with --port",
        ) from None
    return made


@contextmanager
def _driving(storage: str | os.PathLike[str] | None, drivers: int) -> Iterator[None]:
    """Drive queued runs meanwhile; processes that drive go on when this one ends."""
    ended = threading.Event()
    if drivers:
        arguments = (storage, drivers, ended)
        threading.Thread(target=_drive, args=arguments, name="queue", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _drive(storage: str | os.PathLike[str] | None, drivers: int, ended: threading.Event) -> None:
    while not ended.is_set():
        try:
            with open_store(storage) as store:
                drive_queue(store, drivers=drivers, ended=ended, ready=True)
        except Exception:  # whatever it is, jobs that were taken must not wait for ever
            _LOG.exception("queued runs wait for %g s", _PAUSE_S)
            ended.wait(_PAUSE_S)
