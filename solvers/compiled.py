"""Loops as machine code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile a function of numbers and arrays on its first call, kept on disk where possible.

    Import modules that use it late: this loads numba, a third of a second.
    """
    from numba import njit

    try:
        made: F = njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no directory can be written to
        made = njit(nogil=True)(function)
    return made
