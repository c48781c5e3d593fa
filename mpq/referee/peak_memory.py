"""How much memory a piece of work needs on top of what its process holds."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable

_RESET_PEAK = "5"  # of /proc/self/clear_refs, see proc(5)


def peak_bytes(work: Callable[[], object]) -> int | None:
    """Do some work and return by how many bytes it raised the resident memory at its highest.

    Whole pages of the whole process, whoever allocates (torch, numpy, code); what is freed
    before is returned to the system first, so that it cannot be used again unseen. None where the
    system keeps no peak that can be reset (only Linux does).
    """
    gc.collect()
    if sys.platform != "linux":
        work()
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write(_RESET_PEAK)
        before = _status("VmRSS")
    except OSError:
        work()
        return None
    work()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        (line,) = [line for line in file if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024
