"""The text forms of formats: one entry a family, each a pattern and its way back."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mpq.core.errors import InvalidInputError, unknown
from mpq.core.granularity import Granularity, PerChannel, PerGroup, PerTensor

if TYPE_CHECKING:
    from mpq.core.formats import Format

Role = Literal["weights", "activations"]
Fields = dict[str, Any]

NATIVE_BITS = {"fp32": 32, "fp16": 16, "bf16": 16}
ROUNDINGS = ("gptq", "adaround", "flexround")
MX_BLOCK, NVFP4_BLOCK = 32, 16

_WHERE = r"(?:(?P<tensor>t)|g(?P<group>\d{1,9}))?"
_BITS = r"(?P<bits>\d{1,9})"
_SHARE = r"(?P<share>\d{1,2}(?:\.\d{1,3})?)"
_MX = {  # element: (bits, mantissa bits; of integers none)
    "mxfp4": (4, 1),
    "mxfp6_e2m3": (6, 3),
    "mxfp6_e3m2": (6, 2),
    "mxfp8_e4m3": (8, 3),
    "mxfp8_e5m2": (8, 2),
    "mxint8": (8, 0),
}
_SHORT = {"mxfp6": "mxfp6_e3m2", "mxfp8": "mxfp8_e4m3"}


@dataclass(frozen=True, slots=True)
class Family:
    """How the formats of one family are written; `bits` are those it may have."""

    pattern: str
    fields: Callable[[dict[str, str | None]], Fields]
    text: Callable[[Format, str], str]  # the format and where its scales are
    examples: tuple[str, ...]
    bits: tuple[int, int] = (1, 8)
    roles: tuple[Role, ...] = ("weights", "activations")


def _number(found: dict[str, str | None]) -> Fields:
    return {"bits": int(found["bits"] or 0)}


def _int(found: dict[str, str | None]) -> Fields:
    if found.get("of"):
        return _number(found) | {"variant": "of8"}
    return _number(found) | {"symmetric": not found.get("asym")}


def _fixed(found: dict[str, str | None]) -> Fields:
    length, integer = int(found["bits"] or 0), found["integer"]
    fields: Fields = {"bits": length, "granularity": PerTensor(), "scale_bits": 8}
    if integer is None:
        return fields | {"variant": "searched"}
    return fields | {"mantissa": length - int(integer), "scale_bits": 0}


def _float(found: dict[str, str | None]) -> Fields:
    bits, exponent, mantissa = (int(found[k] or 0) for k in ("bits", "exponent", "mantissa"))
    if 1 + exponent + mantissa != bits:
        raise InvalidInputError(
            "format",
            f"fp{bits}_e{exponent}m{mantissa}: a sign, {exponent} exponent and {mantissa} mantissa "
            f"bits are {1 + exponent + mantissa} bits, write "
            f"'fp{1 + exponent + mantissa}_e{exponent}m{mantissa}'",
        )
    if exponent < 1:
        raise InvalidInputError(
            "format", f"fp{bits}_e0m{mantissa} has no exponent: write 'int{bits}'"
        )
    return {"bits": bits, "mantissa": mantissa}


def _mx(found: dict[str, str | None]) -> Fields:
    name = str(found["element"])
    bits, mantissa = _MX[_SHORT.get(name, name)]
    return {
        "bits": bits,
        "mantissa": mantissa,
        "granularity": PerGroup(MX_BLOCK),
        "scale_bits": 8,
        "variant": "int" if name == "mxint8" else "",
    }


def _mx_text(fmt: Format, where: str) -> str:
    wanted = (fmt.bits, fmt.mantissa)
    integer = fmt.variant == "int"
    return next(n for n, e in _MX.items() if e == wanted and n.startswith("mxint") == integer)


def _nvfp4(found: dict[str, str | None]) -> Fields:
    return {"bits": 4, "mantissa": 1, "granularity": PerGroup(NVFP4_BLOCK), "scale_bits": 8}


def _binary(variant: str, bits: int | None = None) -> Callable[[dict[str, str | None]], Fields]:
    def fields(found: dict[str, str | None]) -> Fields:
        share = float(found.get("share") or 0.0)
        return {"bits": bits or int(found["bits"] or 0), "variant": variant, "share": share}

    return fields


def _binary_text(fmt: Format, where: str) -> str:
    match fmt.variant:
        case "residual":
            return f"residual_binary{fmt.bits}{where}"
        case "dual":
            return f"dual_binary{where}"
        case "partial":
            return f"partial_binary{fmt.share:g}%{where}"
    return f"binary{where}"


def _bfp(found: dict[str, str | None]) -> Fields:
    variant = "reordered" if found["order"] else ""
    return _number(found) | {"scale_bits": 8, "variant": variant}


def _codebook(found: dict[str, str | None]) -> Fields:
    return {"bits": 4, "variant": "double" if found["double"] else ""}


def _codebook_text(fmt: Format, where: str) -> str:
    return f"{fmt.family}4{where}{'d' if fmt.variant else ''}"


def _kmeans(found: dict[str, str | None]) -> Fields:
    return _number(found) | {"share": float(found["share"] or 0.0)}


def _fixed_text(fmt: Format, where: str) -> str:
    integer = "" if fmt.variant else f",{fmt.bits - fmt.mantissa}"
    return f"fixed({fmt.bits}{integer})"


def _of_activations(beginning: str, example: str) -> Family:
    """Return a form of activations alone that is a word and the number of bits."""
    return Family(
        rf"{beginning}{_BITS}",
        _number,
        lambda fmt, _: f"{beginning}{fmt.bits}",
        (example,),
        bits=(2, 8),
        roles=("activations",),
    )


FAMILIES: dict[str, tuple[Family, ...]] = {
    "int": (
        Family(
            rf"int{_BITS}(?:(?P<of>of8){_WHERE})",
            _int,
            lambda fmt, where: f"int{fmt.bits}of8{where}",
            ("int4of8",),
            bits=(2, 8),
            roles=("weights",),
        ),
        Family(
            rf"int{_BITS}{_WHERE}(?P<asym>a)?",
            _int,
            lambda fmt, where: f"int{fmt.bits}{where}{'' if fmt.symmetric else 'a'}",
            ("int8", "int4", "int4t", "int4g64", "int4g128a"),
            roles=("weights",),
        ),
    ),
    "uint": (
        Family(
            rf"uint{_BITS}{_WHERE}",
            _number,
            lambda fmt, where: f"uint{fmt.bits}{where}",
            ("uint8",),
        ),
    ),
    "fixed": (
        Family(
            rf"fixed\({_BITS}(?:,(?P<integer>-?\d{{1,2}}))?\)",
            _fixed,
            _fixed_text,
            ("fixed(8,2)", "fixed(8)"),
            bits=(2, 8),
        ),
    ),
    "bipolar": (
        Family(
            rf"bipolar{_BITS}{_WHERE}",
            _number,
            lambda fmt, where: f"bipolar{fmt.bits}{where}",
            ("bipolar4",),
        ),
    ),
    "float": (
        Family(
            rf"fp{_BITS}_e(?P<exponent>\d)m(?P<mantissa>\d){_WHERE}",
            _float,
            lambda f, where: f"fp{f.bits}_e{f.bits - 1 - f.mantissa}m{f.mantissa}{where}",
            ("fp8_e4m3", "fp6_e3m2", "fp4_e2m1"),
            bits=(3, 8),
        ),
    ),
    "mx": (
        Family(
            rf"(?P<element>{'|'.join([*_MX, *_SHORT])})",
            _mx,
            _mx_text,
            ("mxfp4", "mxfp6_e2m3", "mxfp8_e4m3", "mxint8"),
        ),
    ),
    "nvfp4": (Family("nvfp4", _nvfp4, lambda fmt, where: "nvfp4", ("nvfp4",)),),
    "bfp": (
        Family(
            rf"bfp{_BITS}{_WHERE}(?P<order>r)?",
            _bfp,
            lambda fmt, where: f"bfp{fmt.bits}{where}{'r' if fmt.variant else ''}",
            ("bfp4g16", "bfp4g16r"),
            bits=(2, 8),
        ),
    ),
    "nf": (
        Family(
            rf"nf4{_WHERE}(?P<double>d)?",
            _codebook,
            _codebook_text,
            ("nf4g64", "nf4g64d"),
            roles=("weights",),
        ),
    ),
    "bnb": (
        Family(
            rf"bnb4{_WHERE}(?P<double>d)?",
            _codebook,
            _codebook_text,
            ("bnb4g64",),
            roles=("weights",),
        ),
    ),
    "kmeans": (
        Family(
            rf"kmeans{_BITS}(?:o{_SHARE}%)?",
            _kmeans,
            lambda fmt, _: f"kmeans{fmt.bits}{f'o{fmt.share:g}%' if fmt.share else ''}",
            ("kmeans4", "kmeans3o0.45%"),
            roles=("weights",),
        ),
    ),
    "ternary": (
        Family(
            rf"ternary(?P<median>_median)?{_WHERE}",
            lambda found: {"bits": 2, "variant": "median" if found["median"] else ""},
            lambda fmt, where: f"ternary{'_median' if fmt.variant else ''}{where}",
            ("ternary", "ternary_mediang64"),
            roles=("weights",),
        ),
    ),
    "binary": (
        Family(
            rf"residual_binary{_BITS}{_WHERE}",
            _binary("residual"),
            _binary_text,
            ("residual_binary3g64",),
            bits=(2, 8),
            roles=("weights",),
        ),
        Family(
            rf"dual_binary{_WHERE}",
            _binary("dual", 2),
            _binary_text,
            ("dual_binaryg64",),
            roles=("weights",),
        ),
        Family(
            rf"partial_binary{_SHARE}%{_WHERE}",
            _binary("partial", 1),
            _binary_text,
            ("partial_binary10%g128",),
            roles=("weights",),
        ),
        Family(rf"binary{_WHERE}", _binary("", 1), _binary_text, ("binary",), roles=("weights",)),
    ),
    "log2": (_of_activations("log2_", "log2_4"),),
    "logsqrt2": (_of_activations("logsqrt2_", "logsqrt2_4"),),
    "twin": (_of_activations("twin", "twin8"),),
}
_ACTIVATION_INT = Family(
    rf"int{_BITS}(?P<sym>s)?(?P<static>static)?",
    lambda found: (
        _number(found) | {"symmetric": bool(found["sym"]), "static": bool(found["static"])}
    ),
    lambda f, _: f"int{f.bits}{'s' if f.symmetric else ''}{'static' if f.static else ''}",
    ("int8", "int8s", "int8static"),
    roles=("activations",),
)
_ONE_SCALE = ("float", "uint", "bipolar")  # families whose activations have one scale a sample


def written(role: Role) -> list[tuple[str, Family]]:
    """Return the forms that formats of a role are written in, each with its family."""
    found = [(n, f) for n, forms in FAMILIES.items() for f in forms if role in f.roles]
    return [("int", _ACTIVATION_INT), *found] if role == "activations" else found


def examples(role: Role) -> tuple[str, ...]:
    """Return a few formats of every family, for messages and documentation."""
    natives = tuple(NATIVE_BITS) if role == "weights" else ("fp32",)
    texts = (text for _, family in written(role) for text in family.examples)
    # Activations are not reordered: their order is that of the layer before.
    return (*(t for t in texts if role == "weights" or not t.endswith("g16r")), *natives)


def fields_of(text: str, role: Role) -> Fields:
    """Return the fields of the format that `text` writes; raises InvalidInputError."""
    for name, form in written(role):
        found = re.fullmatch(form.pattern, text)
        if found is None:
            continue
        groups = found.groupdict()
        fields = {"family": name, "granularity": _granularity(groups, text), **form.fields(groups)}
        least, most = form.bits
        if not least <= fields["bits"] <= most:
            what = "integer formats" if name == "int" else f"formats of family {name!r}"
            raise InvalidInputError(
                "format", f"{what} have {least} to {most} bits, got {fields['bits']} in {text!r}"
            )
        if role == "activations":
            _check_activation(name, groups, text)
            if name in ("int", "log2", "logsqrt2", "twin", *_ONE_SCALE):
                fields["granularity"] = PerTensor()
        return fields
    raise unknown("format", text, examples(role))


def text_of(fmt: Format, role: Role) -> str:
    """Return the text of a format without wrappers and rounding; inverse of `fields_of`."""
    if fmt.family == "int" and role == "activations":
        return _ACTIVATION_INT.text(fmt, "")
    forms = FAMILIES[fmt.family]
    form = forms[1] if fmt.family == "int" and fmt.variant != "of8" else forms[0]
    where = ""
    if role == "weights" or fmt.family == "bfp":
        match fmt.granularity:
            case PerTensor():
                where = "t"
            case PerGroup(size):
                where = f"g{size}"
    return form.text(fmt, where)


def _granularity(groups: dict[str, str | None], text: str) -> Granularity:
    if groups.get("tensor"):
        return PerTensor()
    if groups.get("group"):
        if int(groups["group"] or 0) < 1:
            raise InvalidInputError("format", f"a group holds at least one weight, got {text!r}")
        return PerGroup(int(groups["group"] or 0))
    return PerChannel()


def _check_activation(name: str, groups: dict[str, str | None], text: str) -> None:
    grouped = groups.get("group") or groups.get("tensor")
    if name in _ONE_SCALE and grouped:
        raise InvalidInputError(
            "format", f"activations have one scale for each sample, got {text!r}: leave it away"
        )
    if name == "bfp" and (groups["order"] or not groups.get("group")):
        raise InvalidInputError(
            "format", f"activations in blocks are written such as 'bfp8g16', got {text!r}"
        )
