"""Number formats of a tensor, and the pair (weights, activations) that a unit runs in."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace

from mpq.core.errors import InvalidInputError, unknown
from mpq.core.format_grammar import NATIVE_BITS, ROUNDINGS, Role, examples, fields_of, text_of
from mpq.core.format_parts import Parts, stored_parts
from mpq.core.granularity import (
    ChannelAxis,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    channel_axes,
    num_scales,
)

_MADE_AHEAD = ("kmeans",)
_INTEGER_CODES = ("int", "uint", "fixed", "bipolar", "ternary", "binary")
_SALIENT_BITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How the elements of one tensor are stored.

    `family` names the numbers that codes stand for (one file each under mpq/nn/quantizers):

    int        integers, with a zero point where not `symmetric`; `variant` "of8": the leading
               bits of an int8 tensor with the same scales (double rounding)
    uint       integers from 0 on, no zero point
    fixed      fixed point: `mantissa` bits are behind the point, no scales are stored; `variant`
               "searched": one such exponent for the tensor, found by the least error
    bipolar    odd integers: sum (2 b_i - 1) 2^i over the bits
    float      minifloats: a sign, an exponent, `mantissa` bits; e4m3 and e5m2 as OCP defines them
    mx, nvfp4  blocks of 32 with a power of two, of 16 with an e4m3 scale and one of the tensor
    bfp        block floating point: a shared exponent; `variant` "reordered": inputs by norm
    nf, bnb    codebooks of 16 numbers; `variant` "double": scales are quantized, too
    kmeans     a codebook for each output channel; `share` percent of outliers stay in 16 bits
    ternary    -1, 0, 1; the scale is the mean magnitude, or (`variant`) the median
    binary     -1, 1; or `variant` "residual", "dual", "partial" (`share` percent in 8 bits)
    log2, logsqrt2, twin    activations only: see mpq/nn/quantizers
    fp32, fp16, bf16        native: left as the network has it

    Scales take `scale_bits` each and an asymmetric format one zero point of `bits` beside each.
    Activations that are `static` have the range of the calibration data; others take their own
    where the kernel can. Around a format of weights there may be a 16-bit branch of a `rank`, or a
    `share` (percent) of output channels, or (`variant` "groups") of groups, in a `high` format.
    `rounding` says how codes are chosen.
    """

    family: str
    bits: int
    granularity: Granularity = field(default_factory=PerChannel)
    symmetric: bool = True
    scale_bits: int = 16
    static: bool = False
    mantissa: int = 0
    variant: str = ""
    share: float = 0.0
    high: Format | None = None
    rank: int = 0
    rounding: str = "nearest"

    @property
    def is_native(self) -> bool:
        """Whether the tensor stays a floating-point tensor without scales."""
        return self.family in NATIVE_BITS

    @property
    def is_plain_integer(self) -> bool:
        """Whether codes are integers with scales (and zero points) and nothing beside them."""
        return self.family == "int" and not self.rank and self.high is None

    @property
    def arithmetic(self) -> str:
        """What multiplies codes as they are: "int", "float", or "" where they are read first."""
        if self.family in _INTEGER_CODES and not (self.family == "binary" and self.variant):
            return "int"
        if self.family == "mx":
            return "int" if self.variant == "int" else "float"
        return "float" if self.family in ("float", "nvfp4") else ""

    @property
    def mean_bits(self) -> float:
        """The mean bits of a code over the shares of a mixed format, else `bits`."""
        if self.family == "binary" and self.share:
            return self.bits + (_SALIENT_BITS - self.bits) * self.share / 100
        if self.high is None:
            return self.bits
        return self.bits + (self.high.bits - self.bits) * self.share / 100

    @property
    def as_stored(self) -> Format:
        """The format however codes are chosen: what a kernel or a file sees."""
        return self if self.rounding == "nearest" else replace(self, rounding="nearest")

    @property
    def made_ahead(self) -> bool:
        """Whether it takes calibration data or a search to store a weight: done once, ahead."""
        special = bool(self.rank or self.share or self.high)
        return special or self.rounding != "nearest" or self.family in _MADE_AHEAD

    @property
    def low(self) -> Format:
        """The format of what is not in the `high` share, or not in the branch."""
        if self.high is None:
            return replace(self, rank=0)
        return replace(self, high=None, share=0.0, variant="")

    def num_scales(self, shape: tuple[int, ...], channel_axis: ChannelAxis = 0) -> int:
        """Return how many scales a tensor of `shape` needs.

        Raises InvalidInputError (`group_size`) where groups do not divide a channel's weights.
        """
        return 0 if self.is_native else num_scales(self.granularity, shape, channel_axis)

    def parts(self, shape: tuple[int, ...], channel_axis: ChannelAxis = 0) -> Parts:
        """Return the exact bits of every array that a weight of `shape` is stored as."""
        return stored_parts(self, shape, channel_axis)

    def storage_bits(self, shape: tuple[int, ...], channel_axis: ChannelAxis = 0) -> int:
        """Return the exact bits of a stored tensor, all its `parts` together."""
        return sum(self.parts(shape, channel_axis).values())

    def storage_bytes(self, shape: tuple[int, ...], channel_axis: ChannelAxis = 0) -> int:
        """Return the bytes of a stored tensor: each part is padded to whole bytes."""
        return sum(-(-bits // 8) for bits in self.parts(shape, channel_axis).values())

    def bits_per_element(self, shape: tuple[int, ...], channel_axis: ChannelAxis = 0) -> float:
        """Return `storage_bits` divided by the number of elements."""
        return self.storage_bits(shape, channel_axis) / math.prod(shape)

    def text(self, role: Role) -> str:
        """Return the text that `parse_format(text, role)` reads back."""
        if self.is_native:
            return self.family
        if self.high is not None:
            of = "groups_" if self.variant == "groups" else ""
            return f"{self.low.text(role)}+{self.share:g}%{of}{self.high.text(role)}"
        rounding = "" if self.rounding == "nearest" else f"@{self.rounding}"
        rank = f"+r{self.rank}" if self.rank else ""
        return f"{text_of(self, role)}{rank}{rounding}"


FP32 = Format(family="fp32", bits=32, granularity=PerTensor())

_BRANCH = re.compile(r"\+r(\d{1,5})")
_SHARE = re.compile(r"\+(\d{1,2}(?:\.\d{1,3})?)%(groups_)?(?=[a-z])")


def parse_format(text: str, role: Role = "weights") -> Format:
    """Read a format from its text form.

    Weights: "int4" (a scale per output channel), "int4t" (one per tensor), "int4g64" (one per
    64 weights), a trailing "a" for asymmetric with zero points; "fp6_e3m2", "mxfp4", "nvfp4",
    "nf4g64d", "ternary", "binary" and others (`mpq formats` lists all). Behind it may stand "+r16"
    (a branch of rank 16), "+10%int8" (a tenth of the output channels in int8) or
    "+25%groups_int4g64", and "@gptq", "@adaround" or "@flexround". Activations: "int8"
    (asymmetric, one scale for the tensor of a sample, as CPU kernels do), "int8s" (symmetric),
    "int8static" (one scale for all, of the calibration data; convolutions always have that),
    "fp8_e4m3", "mxfp8_e4m3", "log2_4", ...
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
    if role == "activations":
        return Format(**fields_of(text, role))
    rest, at, rounding = text.partition("@")
    if at and rounding not in ROUNDINGS:
        raise unknown("rounding", rounding, ROUNDINGS)
    if share := _SHARE.search(rest):
        return _mixed(text, rest, share, rounding)
    rank = 0
    if branch := _BRANCH.search(rest):
        rank = int(branch[1])
        if branch.end() != len(rest) or rank < 1 or rounding:
            raise InvalidInputError(
                "format", f"a branch is written last and alone, 'int4g64+r16', got {text!r}"
            )
        rest = rest[: branch.start()]
    try:
        fmt = Format(**fields_of(rest, role))
    except InvalidInputError as error:
        if rest != text and error.code == "unknown_format":
            raise unknown("format", text, examples(role)) from None
        raise
    return replace(fmt, rank=rank, rounding=rounding or "nearest")


def _mixed(text: str, rest: str, share: re.Match[str], rounding: str) -> Format:
    low, high = (parse_format(t) for t in (rest[: share.start()], rest[share.end() :]))
    percent = float(share[1])
    grouped = [isinstance(fmt.granularity, PerGroup) for fmt in (low, high)]
    problem = ""
    if rounding or low.made_ahead or high.made_ahead or low.is_native or high.is_native:
        problem = "both are plain formats rounded to nearest"
    elif low.variant:
        problem = f"{low.text('weights')} cannot be shared"
    elif not 0 < percent < 100:
        problem = "the share is between 0 and 100 %"
    elif share[2] and not (all(grouped) and low.granularity == high.granularity):
        problem = "both have groups of the same size"
    elif PerTensor() in (low.granularity, high.granularity):
        problem = "a scale of the whole tensor cannot be shared: use channels or groups"
    if problem:
        raise InvalidInputError("format", f"{text!r}: {problem}, such as {_EXAMPLES_OF_SHARES}")
    return replace(low, high=high, share=percent, variant="groups" if share[2] else "channels")


_EXAMPLES_OF_SHARES = "'int4g128a+10%int8' or 'int2g64a+25%groups_int4g64a'"


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
    def as_stored(self) -> Scheme:
        """The scheme however codes are chosen: what a kernel or a file sees."""
        weights = self.weights.as_stored
        return self if weights is self.weights else replace(self, weights=weights)

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


__all__ = [
    "FP32",
    "NATIVE_BITS",
    "ChannelAxis",
    "Format",
    "Granularity",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "Role",
    "Scheme",
    "channel_axes",
    "native_scheme",
    "parse_format",
    "parse_scheme",
]
