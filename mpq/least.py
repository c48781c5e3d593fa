"""The cheapest of ordered candidates that meets a condition, by few measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def cheapest(
    candidates: Sequence[T], meets: Callable[[T], bool], *, walk: int = 2, met_above: bool = False
) -> T | None:
    """Return the cheapest candidate that was found to meet a condition, None where none was.

    Candidates come in order of cost. Bisection finds a border: a candidate that meets the
    condition, next to a cheaper one that does not. A measured condition is not monotone, so the
    `walk` next cheaper candidates beyond that are asked as well, each that meets is the new
    border; where the dearest candidate fails, those are the ones next to it. With `met_above`
    something dearer than all of them is known to meet the condition.

    Only what was asked is returned, no candidate is asked twice, and at most
    1 + ceil(log2(candidates)) + walk of them are asked.
    """
    tried: dict[int, bool] = {}

    def asked(number: int) -> bool:
        tried[number] = meets(candidates[number])
        return tried[number]

    low, border = -1, len(candidates)
    if candidates and (met_above or asked(len(candidates) - 1)):
        border -= not met_above
        while border - low > 1:
            middle = (low + border) // 2
            low, border = (low, middle) if asked(middle) else (middle, border)
    for number in [n for n in reversed(range(border)) if n not in tried][:walk]:
        if asked(number):
            border = number
    return candidates[border] if border < len(candidates) else None
