"""Roundings better than nearest, and all that is stored with calibration data, one file each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from mpq.core.errors import InvalidInputError
from mpq.core.formats import Format
from mpq.core.layers import Layer
from mpq.nn.layer_data import why_no_data
from mpq.nn.quantizers import grid_of
from mpq.nn.rounding.adaround import AdaRound
from mpq.nn.rounding.flexround import FlexRound
from mpq.nn.rounding.layerwise import Stored, Wanted, data_of, data_wanted, layerwise
from mpq.nn.rounding.learned import learned
from mpq.nn.workload import Workload

ROUNDING_VERSION = 1  # part of content keys of what is made ahead

Rounding = Callable[[Workload, Wanted], Iterator[Stored]]

ROUNDINGS: Mapping[str, Rounding] = {
    "nearest": layerwise,
    "gptq": layerwise,
    "adaround": partial(learned, make=AdaRound),
    "flexround": partial(learned, make=FlexRound),
}
_LEARNED = ("adaround", "flexround")


def check_rounding(layer: Layer, fmt: Format) -> None:
    """Raise InvalidInputError (`rounding`) where a layer cannot be rounded as its format asks."""
    if fmt.rounding == "nearest" or fmt.is_native:
        return
    plain = fmt.as_stored
    text = plain.text("weights")
    why = ""
    if fmt.rounding in _LEARNED:
        if fmt.family != "int" or fmt.bits < 2 or fmt.variant:
            why = f"{fmt.rounding} rounds integers of 2 to 8 bits (int4, int3g64a), not {text}"
        elif layer.kind in ("embedding", "experts"):
            why = f"{layer.kind} {layer.name!r} {why_no_data(layer)}"
    elif fmt.variant == "reordered" or grid_of(plain) is None:
        why = f"gptq rounds weights on one grid (int4, fp4_e2m1, nf4g64), not {text}"
    else:
        reason = why_no_data(layer)
        why = f"{layer.kind} {layer.name!r} {reason}" if reason else ""
    if why:
        raise InvalidInputError(
            "rounding",
            f"{fmt.text('weights')} does not fit layer {layer.name!r}: {why}; use {text!r} there, "
            f"for example pin={{{layer.name!r}: {text!r}}}",
        )


def made_ahead(workload: Workload, wanted: Wanted) -> Iterator[Stored]:
    """Yield each weight in each of its formats, stored as family and rounding of the format say."""
    for rounding in dict.fromkeys(ROUNDINGS.values()):
        some = {
            name: (layer, own)
            for name, (layer, formats) in wanted.items()
            if (own := [fmt for fmt in formats if ROUNDINGS[fmt.rounding] is rounding])
        }
        if some:
            yield from rounding(workload, some)


__all__ = [
    "ROUNDINGS",
    "ROUNDING_VERSION",
    "Stored",
    "Wanted",
    "check_rounding",
    "data_of",
    "data_wanted",
    "made_ahead",
]
