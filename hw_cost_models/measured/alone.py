"""One measurement at a time on a machine, whatever the number of processes that measure."""

from __future__ import annotations

import getpass
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


@contextmanager
def measuring_alone() -> Iterator[None]:
    """Wait until no other process of this user measures here, and keep others from it.

    The lock is of the operating system: it ends with its process, however that ends.
    """
    with FileLock(Path(tempfile.gettempdir()) / f"mpq-stopwatch-{getpass.getuser()}.lock"):
        yield
