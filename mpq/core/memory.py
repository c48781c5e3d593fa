"""Whether work ended for want of memory, whatever raised it."""

from __future__ import annotations

_NAMES = ("MemoryError", "OutOfMemoryError", "_ArrayMemoryError")  # torch is not imported here
_TEXTS = ("can't allocate memory", "bad_alloc", "out of memory", "ALLOC_FAILED")


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether an error, or what caused it, is that memory could not be had."""
    while error is not None:
        if type(error).__name__ in _NAMES:
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS):
            return True
        error = error.__cause__
    return False
