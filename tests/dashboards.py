"""An app over a new database, and the real server in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

import anyio
from starlette.testclient import TestClient

from mpq.core.access import Scope
from mpq.dashboard.app import create_app
from mpq.dashboard.settings import Settings
from mpq.store.store import Store

JOB: dict[str, Any] = {
    "model": "tests.slow_net:make_model",
    "calibration": "tests.slow_net:batches",
    "budgets": ["memory <= 60%"],
    "schemes": ["int3", "int4", "int8"],
    "metric": "kl",
    "executor": "serial",
    "refine": 0,
}
OPEN = Settings(allow_modules=("tests.slow_net",))


def asking(store: Store, settings: Settings = OPEN, token: str = "") -> TestClient:
    """Return a client of an app over a database."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return TestClient(create_app(store, settings), base_url="http://localhost", headers=headers)


def secret(store: Store, scope: str = "read", name: str = "") -> str:
    """Return the secret of a new token."""
    return store.create_token(name or f"of {scope}", Scope(scope))[1]


async def raw_status(app: Any, target: str) -> int:
    """Return the status of a GET whose path no client has made tidy before."""
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "server": ("localhost", 80),
        "root_path": "",
        "path": unquote(target),
        "raw_path": target.encode(),
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
    }
    found: list[int] = []

    async def receive() -> dict[str, Any]:
        await anyio.sleep_forever()
        return {}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            found.append(message["status"])

    await app(scope, receive, send)
    return found[0]


@contextmanager
def serving(
    storage: str, *options: str, port: int = 0, drivers: int = 0
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run `mpq serve` and give its URL and process, which is ended if it has not by itself."""
    words = ["serve", "--storage", storage, "--port", str(port), "--drivers", str(drivers)]
    process = subprocess.Popen(command([*words, *options]), stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = process.stderr.readline().strip()
        assert said.startswith("http://"), said + process.stderr.read()
        yield said, process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stderr.close()


def command(words: Sequence[str]) -> list[str]:
    """Return the command line of mpq in this interpreter."""
    return [sys.executable, "-m", "mpq.cli", *words]
