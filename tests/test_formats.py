from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq.core.errors import InvalidInputError
from mpq.core.format_grammar import FAMILIES, examples
from mpq.core.formats import (
    FP32,
    NATIVE_BITS,
    Format,
    PerChannel,
    PerGroup,
    PerTensor,
    Scheme,
    parse_format,
    parse_scheme,
)
from mpq.format_listing import parse_shape, print_formats
from tests.oracles import slow_storage_bits

natives = st.sampled_from(sorted(NATIVE_BITS)).map(parse_format)
granularities = st.one_of(
    st.just(PerTensor()), st.just(PerChannel()), st.integers(1, 4096).map(PerGroup)
)
integer_weights = st.builds(
    Format,
    family=st.just("int"),
    bits=st.integers(1, 8),
    granularity=granularities,
    symmetric=st.booleans(),
)
integer_activations = st.builds(
    Format,
    family=st.just("int"),
    bits=st.integers(1, 8),
    granularity=st.just(PerTensor()),
    symmetric=st.booleans(),
)
all_schemes = st.builds(Scheme, natives | integer_weights, st.just(FP32) | integer_activations)


@given(integer_weights | natives)
def test_weight_formats_read_back_from_their_text(fmt: Format) -> None:
    assert parse_format(fmt.text("weights")) == fmt


@given(integer_activations | st.just(FP32))
def test_activation_formats_read_back_from_their_text(fmt: Format) -> None:
    assert parse_format(fmt.text("activations"), "activations") == fmt


@given(all_schemes)
def test_schemes_read_back_from_their_text(scheme: Scheme) -> None:
    assert parse_scheme(str(scheme)) == scheme


@given(st.lists(all_schemes, max_size=20))
def test_schemes_with_one_text_are_one_scheme(schemes: list[Scheme]) -> None:
    assert len({str(s) for s in schemes}) == len(set(schemes))


@pytest.mark.parametrize(
    ("text", "granularity", "symmetric"),
    [
        ("int4", PerChannel(), True),
        ("int4t", PerTensor(), True),
        ("int4g64", PerGroup(64), True),
        ("int4g128a", PerGroup(128), False),
        ("int4a", PerChannel(), False),
    ],
)
def test_a_suffix_says_where_the_scales_are(
    text: str, granularity: object, symmetric: bool
) -> None:
    fmt = parse_format(text)
    assert (fmt.bits, fmt.granularity, fmt.symmetric) == (4, granularity, symmetric)


@pytest.mark.parametrize(
    ("text", "symmetric"), [("int8", False), ("int8s", True)], ids=["affine", "symmetric"]
)
def test_activations_are_per_sample_and_affine_unless_told(text: str, symmetric: bool) -> None:
    fmt = parse_format(text, "activations")
    assert (fmt.granularity, fmt.symmetric) == (PerTensor(), symmetric)


@given(
    fmt=integer_weights,
    channels=st.integers(1, 5),
    groups=st.integers(1, 3),
    axis=st.sampled_from([0, 1]),
    spatial=st.integers(1, 2),
)
def test_storage_bits_equal_a_slow_count(
    fmt: Format, channels: int, groups: int, axis: int, spatial: int
) -> None:
    size = min(fmt.granularity.size, 6) if isinstance(fmt.granularity, PerGroup) else 2
    if isinstance(fmt.granularity, PerGroup):
        fmt = Format(
            family="int", bits=fmt.bits, granularity=PerGroup(size), symmetric=fmt.symmetric
        )
    shape = [0, 0, spatial, 1]
    shape[axis], shape[1 - axis] = channels, groups * size
    assert fmt.storage_bits(tuple(shape), axis) == slow_storage_bits(fmt, tuple(shape), axis)


@pytest.mark.parametrize("name", NATIVE_BITS)
def test_native_formats_store_no_scales(name: str) -> None:
    fmt = parse_format(name)
    assert fmt.num_scales((3, 5)) == 0
    assert fmt.storage_bits((3, 5)) == 15 * NATIVE_BITS[name]


def test_bits_per_element_include_scales_and_zero_points() -> None:
    assert parse_format("int4g64").bits_per_element((8, 128)) == 4 + 16 / 64
    assert parse_format("int4g64a").bits_per_element((8, 128)) == 4 + 20 / 64


def test_a_group_that_does_not_divide_a_channel_is_refused_with_both_sizes() -> None:
    with pytest.raises(InvalidInputError, match=r"group size 64 does not divide the 100") as caught:
        parse_format("int4g64").num_scales((8, 100))
    assert caught.value.code == "group_size"


def test_an_empty_weight_needs_no_scales_and_divides_by_nothing() -> None:
    assert parse_format("int4g64").storage_bits((0, 100)) == 0
    assert parse_format("int4").storage_bits((4, 0)) == 4 * 16


BAD = ["", "int0", "int9", "int33", "int-4", "int4.0", "int4g0", "int4ga", "int4tt", "4", " int4"]


@pytest.mark.parametrize("text", [*BAD, "INT4", "int4\n", "int" + "9" * 5000])
def test_a_malformed_format_is_refused_in_one_line_with_the_value(text: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_format(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [4, 4.0, None, ["int4"], b"int4"])
@pytest.mark.parametrize("parse", [parse_format, parse_scheme])
def test_a_format_that_is_no_text_is_refused_with_the_value(parse: object, value: object) -> None:
    with pytest.raises(InvalidInputError, match="is a text such as") as caught:
        parse(value)  # type: ignore[operator]
    assert repr(value) in str(caught.value)


@given(st.text(max_size=12) | st.from_regex(r"(int|fp|g|a|t|\d|:)+", fullmatch=True))
def test_any_text_is_a_scheme_or_refused_in_one_line(text: str) -> None:
    message = ""
    try:
        assert str(parse_scheme(text)) == str(parse_scheme(str(parse_scheme(text))))
    except InvalidInputError as error:
        message = str(error)
    assert "\n" not in message


@pytest.mark.parametrize("bits", [0, 9, 33])
def test_bits_out_of_range_are_named(bits: int) -> None:
    with pytest.raises(InvalidInputError, match=f"1 to 8 bits, got {bits} in 'int{bits}'"):
        parse_format(f"int{bits}")


def test_a_typo_gets_the_nearest_format() -> None:
    with pytest.raises(InvalidInputError, match="did you mean 'int4g64'"):
        parse_format("itn4g64")


@pytest.mark.parametrize("text", ["int8:", "int8:int8:int8", "int8:bf16", "int8:int4g64", ":int8"])
def test_activations_that_no_kernel_has_are_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_scheme(text)


def test_a_parsed_scheme_is_taken_as_it_is() -> None:
    scheme = parse_scheme("int4g64:int8")
    assert parse_scheme(scheme) is scheme  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "native"), [("fp32", True), ("bf16", True), ("bf16:int8", False), ("int8", False)]
)
def test_a_scheme_is_native_only_if_nothing_is_quantized(text: str, native: bool) -> None:
    assert parse_scheme(text).is_native is native


@pytest.mark.parametrize("role", ["weights", "activations"])
def test_examples_of_every_family_read_back(role: str) -> None:
    for text in examples(role):  # type: ignore[arg-type]
        assert parse_format(text, role).text(role) == text  # type: ignore[arg-type]


def test_the_readme_names_a_format_of_every_family() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    named = set()
    for text in re.findall(r"`([^`\n]+)`", readme):
        for role in ("weights", "activations"):
            with contextlib.suppress(InvalidInputError):
                named.add(parse_format(text, role).family)  # type: ignore[arg-type]
    assert named == {*FAMILIES, *NATIVE_BITS}


SHORT = {"mxfp6": "mxfp6_e3m2", "mxfp8": "mxfp8_e4m3"}


@pytest.mark.parametrize("text", SHORT)
def test_a_short_name_is_that_of_the_usual_element(text: str) -> None:
    assert parse_format(text).text("weights") == SHORT[text]


OFF = {
    "fp8_e4m2": "a sign, 4 exponent and 2 mantissa bits are 7 bits, write 'fp7_e4m2'",
    "fp4_e0m3": "has no exponent: write 'int4'",
    "fp2_e1m0": "3 to 8 bits, got 2",
    "residual_binary1": "2 to 8 bits, got 1",
    "kmeans9": "1 to 8 bits, got 9",
    "mxpf4": "did you mean 'mxfp4'",
}


@pytest.mark.parametrize("text", OFF)
def test_what_no_format_is_gets_a_line_that_says_why(text: str) -> None:
    with pytest.raises(InvalidInputError, match=OFF[text]):
        parse_format(text)


@pytest.mark.parametrize("text", ["fp8_e4m3g16", "bfp8", "bfp4g16r", "nf4", "ternary", "kmeans3"])
def test_activations_have_their_own_formats(text: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_format(text, "activations")


def test_formats_are_listed_with_their_exact_bits(capsys: pytest.CaptureFixture[str]) -> None:
    print_formats(parse_shape("96x1536"), as_json=True)
    found = {(one["role"], one["text"]): one for one in json.loads(capsys.readouterr().out)}
    for role in ("weights", "activations"):
        assert {text for of, text in found if of == role} >= set(examples(role))  # type: ignore[arg-type]
    assert found["weights", "int4g64"]["bits"] == 4.25
    assert found["weights", "nvfp4"]["bits"] == 4.5 + 32 / (96 * 1536)
    print_formats(parse_shape("3x7"), as_json=False)
    assert "does not fit" in capsys.readouterr().out
    with pytest.raises(InvalidInputError, match="got '3x0'"):
        parse_shape("3x0")
