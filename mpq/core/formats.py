"""Number formats of a tensor, and the pair (weights, activations) that a unit runs in."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from mpq.core.errors import InvalidInputError, unknown

Role = Literal["weights", "activations"]

NATIVE_BITS = {"fp32": 32, "fp16": 16, "bf16": 16}

ChannelAxis = int | tuple[int, ...]  # of several axes each combination is an output channel


def channel_axes(axis: ChannelAxis) -> tuple[int, ...]:
    """Return the axes that count output channels."""
    return (axis,) if isinstance(axis, int) else axis


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor (activations: of one sample)."""


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale for each output channel."""


@dataclass(frozen=True, slots=True)
class PerGroup:
    """One scale for each run of `size` consecutive weights of one output channel."""

    size: int


Granularity = PerTensor | PerChannel | PerGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How the elements of one tensor are stored.

    `family` is "int" or a native type ("fp32", "fp16", "bf16", left as the network has it).
    Scales take `scale_bits` each (IEEE half) and an asymmetric format one zero point of `bits`
    beside each scale. Native formats have neither. Activations that are `static` have the range
    of the calibration data; others take their own where the kernel can.
    """

    family: str
    bits: int
    granularity: Granularity = field(default_factory=PerChannel)
    symmetric: bool = True
    scale_bits: int = 16
    static: bool = False

    @property
    def is_native(self) -> bool:
        """Whether the tensor stays a floating-point tensor without scales."""
        return self.family in NATIVE_BITS

    def num_scales(self, shape: tuple[int, ...], channel_axis: ChannelAxis = 0) -> int:
        """Return how many scales a tensor of `shape` needs.

        Raises InvalidInputError (`group_size`) where groups do not divide a channel's weights.
        """
        if self.is_native:
            return 0
        channels = math.prod(shape[axis] for axis in channel_axes(channel_axis))
        per_channel = math.prod(shape) // channels if channels else 0
        match self.granularity:
            case PerTensor():
                return 1
            case PerChannel():
                return channels
            case PerGroup(size):
                if per_channel % size:
                    raise InvalidInputError(
                        "group_size",
                        f"group size {size} does not divide the {per_channel} weights of an "
                        f"output channel (shape {list(shape)})",
                    )
                return channels * (per_channel // size)

    def storage_bits(self, shape: tuple[int, ...], channel_axis: ChannelAxis = 0) -> int:
        """Return the exact bits of a stored tensor: codes, scales and zero points."""
        scales = self.num_scales(shape, channel_axis)
        zero_point_bits = 0 if self.symmetric else self.bits
        return math.prod(shape) * self.bits + scales * (self.scale_bits + zero_point_bits)

    def bits_per_element(self, shape: tuple[int, ...], channel_axis: ChannelAxis = 0) -> float:
        """Return `storage_bits` divided by the number of elements."""
        return self.storage_bits(shape, channel_axis) / math.prod(shape)

    def text(self, role: Role) -> str:
        """Return the text that `parse_format(text, role)` reads back."""
        if self.is_native:
            return self.family
        suffix = ""
        if role == "weights":
            match self.granularity:
                case PerTensor():
                    suffix = "t"
                case PerGroup(size):
                    suffix = f"g{size}"
            return f"int{self.bits}{suffix}{'' if self.symmetric else 'a'}"
        return f"int{self.bits}{'s' if self.symmetric else ''}{'static' if self.static else ''}"


FP32 = Format(family="fp32", bits=32, granularity=PerTensor())

_INTEGER = {
    "weights": re.compile(
        r"int(?P<bits>\d{1,9})(?:(?P<tensor>t)|g(?P<group>\d{1,9}))?(?P<asym>a)?"
    ),
    "activations": re.compile(r"int(?P<bits>\d{1,9})(?P<sym>s)?(?P<static>static)?"),
}
_EXAMPLES = {
    "weights": ("int8", "int4", "int4t", "int4g64", "int4g128a", *NATIVE_BITS),
    "activations": ("int8", "int8s", "int8static", "fp32"),
}


def parse_format(text: str, role: Role = "weights") -> Format:
    """Read a format from its text form.

    Weights: "int4" (a scale per output channel), "int4t" (one per tensor), "int4g64" (one per
    64 weights), a trailing "a" for asymmetric with zero points. Activations: "int8" (asymmetric,
    one scale for the tensor of a sample, as CPU kernels do), "int8s" (symmetric), "int8static"
    (one scale for all, of the calibration data; convolutions always have that).
    Raises InvalidInputError for anything else.
    """
    if not isinstance(text, str):
        raise InvalidInputError(
            "format", f"a format is a text such as 'int4g64', got {text!r} ({type(text).__name__})"
        )
    if text in NATIVE_BITS:
        if role == "activations" and text != "fp32":
            raise InvalidInputError(
                "format", f"activations are 'fp32' (left alone) or intN, got {text!r}"
            )
        return Format(family=text, bits=NATIVE_BITS[text], granularity=PerTensor())
    found = _INTEGER[role].fullmatch(text)
    if found is None:
        raise unknown("format", text, _EXAMPLES[role])
    bits = int(found["bits"])
    if not 1 <= bits <= 8:
        raise InvalidInputError(
            "format", f"integer formats have 1 to 8 bits, got {bits} in {text!r}"
        )
    if role == "activations":
        return Format(
            family="int",
            bits=bits,
            granularity=PerTensor(),
            symmetric=found["sym"] is not None,
            static=found["static"] is not None,
        )
    granularity: Granularity = PerChannel()
    if found["tensor"]:
        granularity = PerTensor()
    elif found["group"]:
        if int(found["group"]) < 1:
            raise InvalidInputError("format", f"a group holds at least one weight, got {text!r}")
        granularity = PerGroup(int(found["group"]))
    return Format(family="int", bits=bits, granularity=granularity, symmetric=found["asym"] is None)


@dataclass(frozen=True, slots=True, repr=False)
class Scheme:
    """The formats of a unit's weights and of the activations that enter it."""

    weights: Format
    activations: Format = FP32

    def __repr__(self) -> str:
        return f"Scheme({str(self)!r})"

    def __str__(self) -> str:
        weights = self.weights.text("weights")
        if self.activations == FP32:
            return weights
        return f"{weights}:{self.activations.text('activations')}"

    @property
    def is_native(self) -> bool:
        """Whether nothing is quantized."""
        return self.weights.is_native and self.activations.is_native


def parse_scheme(text: str) -> Scheme:
    """Read "int4g64" (weights only) or "int8:int8" (weights:activations); inverse of `str`."""
    if isinstance(text, Scheme):
        return text
    if not isinstance(text, str):
        raise InvalidInputError(
            "scheme", f"a scheme is a text such as 'int4g64' or 'int8:int8', got {text!r}"
        )
    weights, colon, activations = text.partition(":")
    return Scheme(
        parse_format(weights, "weights"),
        parse_format(activations, "activations") if colon else FP32,
    )


def native_scheme(family: str) -> Scheme:
    """Return the scheme in which a layer whose weights are of a native family is as it is."""
    return Scheme(parse_format(family))
