"""A real browser and a real server: Chromium of the system, driven by Playwright."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--no-sandbox",  # of a container's root user
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; in continuous integration its absence is a failure.

    Of one module: while it is there Playwright holds the event loop of this thread.
    """
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium here: apt-get install chromium")
        pytest.skip("no chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield found
        found.close()


class Server:
    """An `mpq serve` process over a database, which can be started again on its port."""

    def __init__(self, storage: str, *options: str) -> None:
        self._storage, self._options, self._port = storage, options, "0"
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def start(self) -> None:
        command = [sys.executable, "-m", "mpq.cli", "serve", "--port", self._port, *self._options]
        self._process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "MPQ_STORAGE": self._storage, "PYTHONPATH": os.getcwd()},
        )
        assert self._process.stderr is not None
        self.url = self._process.stderr.readline().strip()
        assert self.url.startswith("http"), self.url + self._process.stderr.read()
        self._port = self.url.rpartition(":")[2]

    def stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=20)
        assert self._process.stderr is not None
        self._process.stderr.close()


@contextmanager
def serving(storage: str, *options: str) -> Iterator[Server]:
    """Run a server meanwhile."""
    server = Server(storage, *options)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def looking(
    browser: Any, url: str, *, width: int = 1400, theme: str = "light"
) -> Iterator[tuple[Any, list[str]]]:
    """Open a page; whatever its console complains of is in the list."""
    context = browser.new_context(
        base_url=url, viewport={"width": width, "height": 900}, color_scheme=theme
    )
    page, said = context.new_page(), []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "console",
        lambda line: said.append(line.text) if line.type in ("error", "warning") else None,
    )
    try:
        yield page, said
    finally:
        context.close()


def until(condition: Any, seconds: float = 60.0) -> Any:
    """Wait for something to be true and return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def rules_of_accessibility() -> str:
    """Return the script of axe-core."""
    import axe_playwright_python

    return (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
