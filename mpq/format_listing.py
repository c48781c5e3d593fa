"""Every family of number formats, how it is written and what a weight takes in it."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass

from rich.table import Table

from mpq.console import new_console
from mpq.core.errors import InvalidInputError
from mpq.core.format_grammar import ROUNDINGS, Role, examples
from mpq.core.formats import parse_format

AROUND = ("int4g64+r16", "int4g128a+10%int8", "int2g64a+25%groups_int4g64a")
_MATRIX = (4096, 4096)


@dataclass(frozen=True, slots=True)
class ListedFormat:
    """A format by its text; `bits` are those of a stored weight with all that it needs."""

    text: str
    role: str
    family: str
    bits: float | None  # None: a weight of this shape cannot be stored in it


def listed_formats(shape: tuple[int, int] = _MATRIX) -> list[ListedFormat]:
    """Return examples of every family: of weights with the mean bits in a matrix of a shape."""
    found = [_listed(text, "weights", shape) for text in (*examples("weights"), *AROUND)]
    rounded = [f"int4g64@{rounding}" for rounding in ROUNDINGS]
    found += [_listed(text, "weights", shape) for text in rounded]
    return found + [_listed(text, "activations", shape) for text in examples("activations")]


def parse_shape(text: str) -> tuple[int, int]:
    """Read "4096x1024": outputs and inputs; raises InvalidInputError."""
    found = re.fullmatch(r"(\d{1,7})x(\d{1,7})", text)
    if found is None or 0 in (int(found[1]), int(found[2])):
        raise InvalidInputError("shape", f"a shape is written '4096x1024', got {text!r}")
    return int(found[1]), int(found[2])


def print_formats(shape: tuple[int, int], as_json: bool) -> None:
    """Print the list."""
    formats = listed_formats(shape)
    if as_json:
        print(json.dumps([asdict(one) for one in formats], indent=2))
        return
    columns = ("format", "of", "family", f"bits per weight ({shape[0]}x{shape[1]})")
    table = Table(*columns, box=None, header_style="bold")
    for one in formats:
        stored = one.role == "weights"
        bits = ("does not fit" if one.bits is None else f"{one.bits:.4g}") if stored else ""
        table.add_row(one.text, one.role, one.family, bits)
    console = new_console()
    console.print(table)
    console.print(
        "\nA scheme is a format of weights, or weights:activations, such as int8:int8. Groups "
        "(gN), t for one scale of the tensor, and @rounding go with most formats.",
        style="dim",
    )


def _listed(text: str, role: Role, shape: tuple[int, int]) -> ListedFormat:
    fmt = parse_format(text, role)
    bits = None
    if role == "weights":
        with suppress(InvalidInputError):  # groups that do not divide
            bits = fmt.bits_per_element(shape)
    return ListedFormat(text, role, fmt.family, bits)
