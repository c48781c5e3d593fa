"""The console that results are printed on."""

from __future__ import annotations

from rich.console import Console


def new_console() -> Console:
    """Return a console that prints names as they are: "[b]" in one is no markup."""
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 120
    return console
