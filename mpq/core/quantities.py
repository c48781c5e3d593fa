"""Quantities as people read them."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context, Decimal

_SCALES: dict[str, tuple[tuple[str, str], ...]] = {
    "bytes": (("GB", "1e9"), ("MB", "1e6"), ("kB", "1e3"), ("B", "1")),
    "s": (("s", "1"), ("ms", "1e-3"), ("us", "1e-6")),
    "bitops": (("TBOPs", "1e12"), ("GBOPs", "1e9"), ("MBOPs", "1e6"), ("bitops", "1")),
    "J": (("J", "1"), ("mJ", "1e-3"), ("uJ", "1e-6")),
    "MACs": (("GMACs", "1e9"), ("MMACs", "1e6"), ("MACs", "1")),
    "LUTs": (("kLUTs", "1e3"), ("LUTs", "1")),
}


def quantity(value: float, unit: str, *, digits: int = 4, up: bool = False) -> str:
    """Return "11.7 MB", "3.4 ms" or "52.1 GBOPs", which a budget can be written with.

    `unit` is what a CostTable counts in; another one is printed as it is. At least `digits`
    significant digits before trailing zeros go; `up` rounds up, for a limit that must suffice.
    """
    context = Context(prec=digits, rounding=ROUND_CEILING if up else ROUND_HALF_EVEN)
    exact = Decimal(repr(float(value)))  # the shortest decimal: 0.003, not 0.00300...06
    scaled = [(exact / Decimal(scale), name) for name, scale in _SCALES.get(unit, ((unit, "1"),))]
    number, name = next((s for s in scaled if abs(context.plus(s[0])) >= 1), scaled[-1])
    if abs(number) < 10**digits:
        number = context.plus(number)
    else:  # never zeros in place of known digits
        number = number.to_integral_value(context.rounding)
    if number != number.to_integral_value():
        return f"{number.normalize():f} {name}"
    counted = (
        name in ("B", "bitops", "MACs", "LUTs") or number == 0 or abs(number) >= 10 ** (digits - 1)
    )
    return f"{number:.{0 if counted else 1}f} {name}"


def with_error(value: float, half_width: float, unit: str) -> str:
    """Return "3.412 ms ± 90 us"; the quantity alone where its half-width is 0: it is exact."""
    if half_width == 0:
        return quantity(value, unit)
    return f"{quantity(value, unit)} ± {quantity(half_width, unit, digits=2)}"


def percent(share: float) -> str:
    """Return "12 %" or "0.034 %", two significant digits of a share that is not negative."""
    amount = 100 * share
    return f"{amount:.0f} %" if amount >= 9.95 else f"{amount:.2g} %"


def rounded_up(value: float, digits: int = 4) -> str:
    """Return a number with so many significant digits, no smaller than it is."""
    context = Context(prec=digits, rounding=ROUND_CEILING)
    return f"{context.create_decimal(repr(float(value))).normalize():g}"
